"""Build a data set: image/, mask/, metadata.jsonl, soft_label.npy. The same command continues after a stop.

python augmentation.py --data_name=digits --num_aug=32 --output_dir=outputs/digits
accelerate launch --num_processes=8 augmentation.py --data_name=cub --num_aug=10000

Any number of processes may fill one folder, started by a launcher, by a job array or by hand, at any time.
"""

import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from noisecutmix import cli, launch, script
from noisecutmix.ranges import default_dtype

if TYPE_CHECKING:
    from noisecutmix.folder import OutputFolder
    from noisecutmix.generator import NoiseCutMixGenerator

FEW_BLOCKS = 3  # where so few are missing, other processes are probably drawing them


def main() -> None:
    options = cli.parse_augmentation()
    device = script.choose_device(options.device)

    # slow imports, once the arguments are checked
    script.say("loading the libraries")
    from noisecutmix.files import describe_program, pin_model
    from noisecutmix.folder import OutputFolder, describe_data, read_run
    from noisecutmix.plan import Plan
    from noisecutmix.sources import find_commit

    classes, dtype = options.classes, options.dtype or default_dtype(device)
    plan = Plan(num_classes=len(classes.names), **cli.plan_arguments(options))
    model = pin_model(options.model, read_run(options.output_dir, "output_dir"))
    data = describe_data(options.data_flags, classes, model, options.ckpt_path, dtype)
    folder = OutputFolder(options.output_dir, plan, options.num_aug, classes.names, data)
    folder.check_usable()
    if not folder.is_complete(options.verify):
        from noisecutmix import NoiseCutMixGenerator

        # loaded before anything is written, since model and checkpoint may be wrong
        script.say("loading the model")
        arguments = {**cli.generator_arguments(options), "model": model}
        generator = NoiseCutMixGenerator(device, classes, plan=plan, **arguments)
        if options.compile:
            generator.compile()
        run = {
            **describe_program(script.program_words()),
            "data_name": options.data_name,
            "model": options.model,
            "model_commit": find_commit(model),
            "ckpt_path": str(options.ckpt_path.absolute()),
            "batch_size": options.batch_size,
            "device": device,
            "compile": options.compile,
        }
        is_new = folder.begin(run)
        draw_missing(generator, folder, options.batch_size, options.verify, is_new)
        folder.finish()
    if launch.is_first_process():
        print(f"{options.output_dir} is complete: {options.num_aug} items")


def draw_missing(
    generator: "NoiseCutMixGenerator", folder: "OutputFolder", batch_size: int, verify: bool, is_new: bool
) -> None:
    """Draw the blocks of `batch_size` indices in which an item is missing, and write only the missing items."""
    from tqdm import tqdm

    rank, count = launch.rank_and_count()
    missing = folder.find_missing(range(folder.num_items), verify)
    begins_share = count > 1 or (is_new and len(missing) == folder.num_items)
    block_seconds, waits = 0.0, False
    with tqdm(total=len(missing), unit="image", disable=not launch.is_first_process()) as bar:
        while missing:
            bar.total = bar.n + -(-len(missing) // count)  # the share of this process
            blocks = order_blocks(missing, batch_size, rank, count, begins_share)
            # before the last few blocks, wait once for those who are probably drawing them
            waits = len(blocks) <= FEW_BLOCKS and not begins_share and not waits
            if waits:
                time.sleep(block_seconds)
            else:
                block_seconds = draw_blocks(generator, folder, blocks, batch_size, verify, bar) or block_seconds
            begins_share = False
            missing = folder.find_missing(missing, verify) or folder.find_missing(range(folder.num_items))


def draw_blocks(
    generator: "NoiseCutMixGenerator",
    folder: "OutputFolder",
    blocks: Sequence[Sequence[int]],
    batch_size: int,
    verify: bool,
    bar: Any,
) -> float:
    """Draw blocks until one was drawn by another process; return the seconds that the last one took, 0 for none.

    Blocks are always drawn completely, so that a picture's bytes do not depend on what an earlier run left.
    """
    seconds = 0.0
    writing: Iterator[None] = iter(())  # threads write a block while the device draws the next one
    with ThreadPoolExecutor(8) as pool:
        for block in blocks:
            script.check_signals()
            if not folder.find_missing(block, verify):
                break  # another process has drawn the block, and draws those that follow
            start = time.monotonic()
            first = block[0] - block[0] % batch_size
            items = [folder.plan.item(index) for index in range(first, first + batch_size)]
            images = generator.draw(items)
            seconds = time.monotonic() - start
            block = folder.find_missing(block, verify)
            if not block:
                break  # another process has drawn it at the same time
            list(writing)  # wait, and raise the error of a thread
            wanted = [pair for pair in zip(items, images) if pair[0].index in block]
            writing = pool.map(lambda pair: folder.write(*pair), wanted)
            bar.update(len(block))
            folder.write_early_preview()
        list(writing)
    return seconds


def order_blocks(
    missing: Sequence[int], batch_size: int, rank: int, count: int, begins_share: bool
) -> list[Sequence[int]]:
    """Return the missing items of each block, in the order in which process `rank` of `count` draws the blocks.

    A process begins at its own share, and continues into the next one. Later it begins in the longest sequence of
    missing blocks: behind the first two, which are probably being written and drawn, and at a random place near the
    middle, since processes that were started by hand have no rank. So few blocks are drawn twice.
    """
    blocks: dict[int, list[int]] = {}
    for index in missing:
        blocks.setdefault(index // batch_size, []).append(index)
    order = list(blocks)
    start = len(order) * rank // count
    if not begins_share:
        rng = random.Random()
        first = [place for place, number in enumerate(order) if number - 1 not in blocks]
        lengths = [end - begin for begin, end in zip(first, [*first[1:], len(order)])]
        longest = max(lengths)
        start = rng.choice([place for place, length in zip(first, lengths) if length == longest])
        being_drawn = min(2, longest - 1)
        start += being_drawn + int((longest - being_drawn) * rng.uniform(0.25, 0.75))
    return [blocks[number] for number in order[start:] + order[:start]]


if __name__ == "__main__":
    script.run(main)

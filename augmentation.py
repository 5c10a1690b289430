"""Build a data set: image/, mask/, metadata.jsonl, soft_label.npy. The same command continues after a stop.

python augmentation.py --data_name=digits --num_aug=32 --output_dir=outputs/digits
accelerate launch --num_processes=8 augmentation.py --data_name=cub --num_aug=10000

Any number of processes may fill one folder, started by a launcher, by a job array or by hand, at any time.
"""

import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from noisecutmix import cli, script

if TYPE_CHECKING:
    from noisecutmix.folder import OutputFolder
    from noisecutmix.generator import NoiseCutMixGenerator

FEW_BLOCKS = 3  # where so few are missing, other processes are probably drawing them


def main() -> None:
    options = cli.parse_augmentation()
    device = script.choose_device(options.device)

    # slow imports, once the arguments are checked
    from noisecutmix import record
    from noisecutmix.folder import OutputFolder
    from noisecutmix.plan import create_plan

    plan, data_options = create_plan(options), record.data_options(options, device)
    folder = OutputFolder(options.output_dir, plan, options.num_aug, options.classes.names, data_options)
    folder.check_usable()
    if not folder.is_complete(options.verify):
        from noisecutmix.generator import create_generator

        # loaded before anything is written, since model and checkpoint may be wrong
        generator = create_generator(options, device, plan)
        is_new = folder.begin(record.describe_run(options, device))
        draw_missing(generator, folder, options.batch_size, options.verify, is_new)
        folder.finish()
    if script.is_first_process():
        print(f"{options.output_dir} is complete: {options.num_aug} items")


def draw_missing(
    generator: "NoiseCutMixGenerator", folder: "OutputFolder", batch_size: int, verify: bool, is_new: bool
) -> None:
    """Draw the blocks of `batch_size` indices in which an item is missing, and write only the missing items.

    Blocks are always drawn completely, so that a picture's bytes do not depend on what an earlier run left.
    """
    from tqdm import tqdm

    rank, count = script.rank_and_count()
    missing = folder.find_missing(range(folder.num_items), verify)
    begins_share = count > 1 or (is_new and len(missing) == folder.num_items)
    seconds = 0.0  # that the last block took
    waits = False
    bar = tqdm(total=len(missing), unit="image", disable=not script.is_first_process())
    writing: Iterator[None] = iter(())  # threads write a block while the device draws the next one
    with ThreadPoolExecutor(8) as pool, bar:
        while missing:
            bar.total = bar.n + -(-len(missing) // count)  # the share of this process
            blocks = order_blocks(missing, batch_size, rank, count, begins_share)
            waits = len(blocks) <= FEW_BLOCKS and not (waits or begins_share)
            if waits:
                time.sleep(seconds)
                blocks = []
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
            list(writing)
            begins_share = False
            missing = folder.find_missing(missing, verify) or folder.find_missing(range(folder.num_items))


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

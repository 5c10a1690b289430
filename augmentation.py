"""Build a data set: image/, mask/, metadata.jsonl, soft_label.npy. The same command continues after a stop.

python augmentation.py --data_name=digits --num_aug=32 --output_dir=outputs/digits
accelerate launch --num_processes=8 augmentation.py --data_name=cub --num_aug=10000
"""

import contextlib
from typing import TYPE_CHECKING

from noisecutmix import cli, script
from noisecutmix.launch import Launch, choose_device

if TYPE_CHECKING:
    import numpy as np

    from noisecutmix.folder import OutputFolder
    from noisecutmix.generator import NoiseCutMixGenerator


def main() -> None:
    options = cli.parse_augmentation()
    launch = Launch()
    device = choose_device(options.device)

    # slow imports, once the arguments are checked
    import numpy as np

    from noisecutmix import record
    from noisecutmix.folder import OutputFolder
    from noisecutmix.plan import Plan

    plan = Plan(options.seed, len(options.classes.names), options.alpha, options.resolution)
    folder = OutputFolder(options.output_dir, plan, options.num_aug, options.classes.names)
    # each block of indices is drawn as one batch; of n processes, each draws every n-th block
    blocks = np.arange(options.num_aug) // options.batch_size
    share = np.flatnonzero(blocks % launch.count == launch.rank)

    with script.adding_progress(lambda: folder.describe_progress(options.overwrite), options.overwrite), launch:
        shape = record.describe_shape(options, device)
        record.check_same_as_main(shape, launch.broadcast(shape))
        with folder.held(shape, options.overwrite) if launch.is_main else contextlib.nullcontext():
            is_complete = launch.broadcast(
                launch.is_main and not options.overwrite and folder.has_planned_labels(options.verify)
            ) and all(launch.gather(folder.has_whole_files(share, options.verify)))
            if not is_complete:
                from noisecutmix.generator import create_generator

                # loaded before anything is written, since model and checkpoint may be wrong
                generator = create_generator(options, device, plan)
                if launch.is_main:
                    folder.begin(shape, record.describe_run(options, device), options.overwrite)
                folder.join(launch.broadcast(folder.identity))
                draw_missing(generator, folder, launch, share, options.batch_size, options.verify)
                launch.wait_for_others()
                if launch.is_main:
                    folder.finish()
    if launch.is_main:
        print(f"{options.output_dir} is complete: {options.num_aug} items")


def draw_missing(
    generator: "NoiseCutMixGenerator",
    folder: "OutputFolder",
    launch: Launch,
    share: "np.ndarray",
    batch_size: int,
    verify: bool,
) -> None:
    """Draw each block of this share in which an item is missing, and write only its missing items.

    Blocks are always drawn completely, so that a picture's bytes do not depend on what an earlier run left.
    """
    from tqdm import tqdm

    from noisecutmix.files import BackgroundWriter

    missing = set(folder.mend(share, verify).tolist())
    bar = tqdm(
        total=len(share),
        initial=len(share) - len(missing),
        unit="image",
        desc=f"process 0 of {launch.count}" if launch.count > 1 else None,
        disable=not launch.is_main,
    )
    with BackgroundWriter(folder.write) as writer, bar:
        for start in sorted({index - index % batch_size for index in missing}):
            script.check_signals()
            launch.check_others()
            items = [folder.plan.item(index) for index in range(start, start + batch_size)]
            images = generator.draw(items)
            wanted = [(item, image) for item, image in zip(items, images) if item.index in missing]
            writer.submit(*zip(*wanted))
            bar.update(len(wanted))


if __name__ == "__main__":
    script.run(main)

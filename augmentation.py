"""Build a data set: image/, mask/, metadata.jsonl, soft_label.npy. The same command goes on after a stop.

python augmentation.py --data_name=digits --num_aug=32 --output_dir=outputs/digits
accelerate launch --num_processes=8 augmentation.py --data_name=cub --num_aug=10000
"""

from typing import TYPE_CHECKING

from noisecutmix import cli, script

if TYPE_CHECKING:
    import numpy as np

    from noisecutmix.folder import OutputFolder
    from noisecutmix.generator import NoiseCutMixGenerator
    from noisecutmix.launch import Processes


def main() -> None:
    options = cli.parse_augmentation()
    device = script.choose_device(options.device)

    # heavy imports, once the arguments are known to be good
    from noisecutmix.folder import OutputFolder
    from noisecutmix.launch import Processes
    from noisecutmix.plan import Plan

    class_names = options.classes.names
    plan = Plan(options.seed, len(class_names), options.alpha, options.resolution)
    folder = OutputFolder(options.output_dir, plan, options.num_aug, class_names)
    processes = Processes()
    try:
        with script.telling_progress(folder, options.overwrite):
            shaping = script.options_that_shape_the_data(options, device)
            script.compare_with_main_process(shaping, processes.broadcast(shaping))
            if processes.is_main:
                folder.take(shaping, options.overwrite)
            is_complete = processes.is_main and not options.overwrite and folder.is_complete()
            if not processes.broadcast(is_complete):
                # before anything is written: model and checkpoint may be wrong
                from noisecutmix.generator import create_generator

                generator = create_generator(options, processes.own_device(device), plan)
                if processes.is_main:
                    folder.begin(script.describe_run(options, device))
                missing = processes.broadcast(folder.find_missing() if processes.is_main else None)
                draw_missing(generator, options.batch_size, processes, folder, missing)
                if processes.is_main:
                    folder.finish()
    finally:
        folder.close()
    if processes.is_main:
        print(f"{options.output_dir} is complete: {options.num_aug} items")


def draw_missing(
    generator: "NoiseCutMixGenerator",
    batch_size: int,
    processes: "Processes",
    folder: "OutputFolder",
    missing: "np.ndarray",
) -> None:
    """Draw this process's share: of the batches of missing items, every n-th, n being the number of processes."""
    import numpy as np
    from tqdm import tqdm

    from noisecutmix.files import BackgroundWriter

    batch_of = np.arange(len(missing)) // batch_size
    shares = [missing[batch_of % processes.count == rank] for rank in range(processes.count)]
    seen = [0] * processes.count
    done = folder.num_items - len(missing)
    with tqdm(total=folder.num_items, initial=done, unit="image", disable=not processes.is_main) as bar:

        def show_peers() -> None:
            for rank, share in enumerate(shares):
                is_shown = processes.is_main and rank != processes.rank
                while is_shown and seen[rank] < len(share) and folder.image_file(share[seen[rank]]).exists():
                    seen[rank] += 1
                    bar.update()

        with BackgroundWriter(folder.write) as writer:
            own = shares[processes.rank]
            for start in range(0, len(own), batch_size):
                items = [folder.plan.item(index) for index in own[start : start + batch_size].tolist()]
                for item, image in zip(items, generator.draw(items)):
                    writer.submit(item, image)
                bar.update(len(items))
                show_peers()
        processes.wait(while_waiting=show_peers)
        show_peers()


if __name__ == "__main__":
    script.run(main)

"""Draw a few pictures to look at: gen_0000.png … and preview.png.

python generation.py --data_name=digits --num_gen=8
python generation.py --data_name=cub --device=cuda --target_class="Blue Jay" --aug_class=Cardinal
"""

from noisecutmix import cli, script
from noisecutmix.launch import Launch, choose_device
from noisecutmix.pictures import PictureFolder


def main() -> None:
    options = cli.parse_generation()
    if not Launch().is_main:
        return  # in a launch of several processes only one draws
    folder = PictureFolder(options.output_dir, options.num_gen)
    device = choose_device(options.device)

    # slow imports, once the arguments are checked
    from PIL import Image
    from tqdm import tqdm

    from noisecutmix.generator import create_generator
    from noisecutmix.plan import Plan
    from noisecutmix.preview import MOST_PICTURES, draw_preview

    plan = Plan(options.seed, len(options.classes.names), options.alpha, options.resolution)
    generator = create_generator(options, device, plan)
    folder.begin()
    items = [plan.item(i, options.target_class, options.aug_class) for i in range(options.num_gen)]
    shown: list[Image.Image] = []
    with tqdm(total=len(items), unit="image") as bar:
        for start in range(0, len(items), options.batch_size):
            script.check_signals()
            batch = items[start : start + options.batch_size]
            images = generator.draw(batch)
            for item, image in zip(batch, images):
                folder.write(item.index, image)
            shown += images[: MOST_PICTURES - len(shown)]
            bar.update(len(batch))
    folder.write_preview(draw_preview(shown, items, options.classes.names))
    print(f"wrote {len(items)} pictures and preview.png to {options.output_dir}")


if __name__ == "__main__":
    script.run(main)

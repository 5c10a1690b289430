"""Draw a few pictures to look at: gen_0000.png … and preview.png.

python generation.py --data_name=digits --num_gen=8
python generation.py --data_name=cub --device=cuda --target_class="Blue Jay" --aug_class=Cardinal
"""

from PIL import Image

from noisecutmix import cli, script


def main() -> None:
    options = cli.parse_generation()

    # heavy imports, once the arguments are known to be good
    device = script.choose_device(options.device)
    from tqdm import tqdm

    from noisecutmix.files import write_png
    from noisecutmix.generator import create_generator
    from noisecutmix.plan import Plan
    from noisecutmix.preview import MOST_PICTURES, draw_preview

    plan = Plan(options.seed, len(options.classes.names), options.alpha, options.resolution)
    generator = create_generator(options, device, plan)
    script.make_output_dir(options.output_dir)
    items = [generator.plan.item(i, options.target_class, options.aug_class) for i in range(options.num_gen)]
    digits = max(4, len(str(options.num_gen - 1)))
    shown: list[Image.Image] = []
    with tqdm(total=len(items), unit="image") as bar:
        for start in range(0, len(items), options.batch_size):
            batch = items[start : start + options.batch_size]
            images = generator.draw(batch)
            for item, image in zip(batch, images):
                write_png(options.output_dir / f"gen_{item.index:0{digits}d}.png", image)
            shown += images[: MOST_PICTURES - len(shown)]
            bar.update(len(batch))
    write_png(options.output_dir / "preview.png", draw_preview(shown, items, generator.class_names))
    print(f"wrote {len(items)} pictures and preview.png to {options.output_dir}")


if __name__ == "__main__":
    script.run(main)

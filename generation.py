"""Draw a few pictures to look at: gen_0000.png … and preview.png.

python generation.py --data_name=digits --num_gen=8
python generation.py --data_name=cub --device=cuda --target_class="Blue Jay" --aug_class=Cardinal
"""

from pathlib import Path

from noisecutmix import cli, launch, script
from noisecutmix.errors import InputError

COMMENT = "drawn by generation.py of NoiseCutMix"


def main() -> None:
    options = cli.parse_generation()
    if launch.rank_and_count()[0] > 0:
        return  # of several processes only one draws
    if any((options.output_dir / name).exists() for name in ("run.json", "metadata.jsonl", "soft_label.npy")):
        raise InputError(f"{options.output_dir} holds a data set; choose another folder", "output_dir")
    device = script.choose_device(options.device)

    # slow imports, once the arguments are checked
    script.say("loading the libraries")
    from PIL import Image
    from tqdm import tqdm

    from noisecutmix import NoiseCutMixGenerator
    from noisecutmix.files import write_png
    from noisecutmix.plan import Plan
    from noisecutmix.preview import MAX_PICTURES, draw_preview

    names = options.classes.names
    plan = Plan(num_classes=len(names), **cli.plan_arguments(options))
    script.say("loading the model")
    generator = NoiseCutMixGenerator(device, options.classes, plan=plan, **cli.generator_arguments(options))
    if options.compile:
        generator.compile()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    delete_earlier_pictures(options.output_dir)
    items = [plan.item(i, options.target_class, options.aug_class) for i in range(options.num_gen)]
    shown: list[Image.Image] = []
    with tqdm(total=len(items), unit="image") as bar:
        for start in range(0, len(items), options.batch_size):
            script.check_signals()
            batch = items[start : start + options.batch_size]
            images = generator.draw(batch)
            for item, image in zip(batch, images):
                write_png(options.output_dir / f"gen_{item.index:04d}.png", image, COMMENT)
            shown += images[: MAX_PICTURES - len(shown)]
            bar.update(len(batch))
    write_png(options.output_dir / "preview.png", draw_preview(shown, items, names), COMMENT)
    print(f"wrote {len(items)} pictures and preview.png to {options.output_dir}")


def delete_earlier_pictures(folder: Path) -> None:
    """Delete the pictures that an earlier run of this script wrote into the folder, and no others."""
    for file in (*folder.glob("gen_*.png"), *folder.glob("preview.png")):
        with open(file, "rb") as content:
            is_ours = COMMENT.encode() in content.read(200)
        if is_ours:
            file.unlink()


if __name__ == "__main__":
    script.run(main)

"""Draw img/overview.png: one denoising step of NoiseCutMix and some outputs, all computed with the demo model.

uv run --group dev img/make_overview.py
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from noisecutmix import NoiseCutMixGenerator
from noisecutmix.files import write_png
from noisecutmix.plan import Item, Plan, draw_mask
from noisecutmix.preview import AUG_COLOR, TARGET_COLOR

STEP = 3  # of the 25, counted from 1
COLUMNS = 9
FEATURED = 2  # the column whose step is shown

WIDTH, MARGIN = 1600, 36
PANEL, PICTURE = 208, 272
CELL, CELL_GAP = 128, 16
FRAME = 6
GRAY = (110, 110, 110)
BLACK = (0, 0, 0)
HEADING, TEXT = ImageFont.load_default(34), ImageFont.load_default(27)


class Step(NamedTuple):
    """One denoising step of one picture: guided noise estimates (4, h, w) and the pictures that they predict."""

    mask: Image.Image
    estimates: dict[str, torch.Tensor]
    pictures: dict[str, Image.Image]


def choose_items(plan: Plan, count: int) -> list[Item]:
    """Return the plan's first items with at least 0.3 of the label for each class; no pair of classes occurs twice."""
    chosen: dict[frozenset[int], Item] = {}
    index = 0
    while len(chosen) < count:
        item = plan.item(index)
        if 0.3 <= item.ratio <= 0.7:
            chosen.setdefault(frozenset((item.target, item.aug)), item)
        index += 1
    return list(chosen.values())


def draw_alone(generator: NoiseCutMixGenerator, items: Sequence[Item], shown: str) -> list[Image.Image]:
    """Draw the items' target or aug class under an all-white mask, from the same noise."""
    side = generator.plan.resolution
    whole = [replace(item, box=(0, 0, side, side), ratio=1.0) for item in items]
    if shown == "aug":
        whole = [replace(item, target=item.aug, aug=item.target) for item in whole]
    return generator.draw(whole)


def draw_and_watch(generator: NoiseCutMixGenerator, items: Sequence[Item]) -> tuple[list[Image.Image], Step]:
    """Draw the items in one batch; return the pictures and one denoising step of the featured picture."""
    pipe = generator.pipe
    calls = []
    hook = pipe.unet.register_forward_hook(lambda unet, inputs, outputs: calls.append((*inputs, outputs[0])))
    images = generator.draw(items)
    hook.remove()

    latents, timestep, estimates = calls[STEP - 1]
    for_target, for_aug, for_nothing = (chunk[FEATURED] for chunk in estimates.chunk(3))  # each (4, h, w)
    mask = draw_mask(items[FEATURED].box, *images[FEATURED].size)
    height, width = latents.shape[-2:]
    latent_mask = pipe.mask_processor.preprocess(mask, height=height, width=width)[0]  # (1, h, w)
    merged = latent_mask * for_target + (1 - latent_mask) * for_aug
    signal = pipe.scheduler.alphas_cumprod[int(timestep)].sqrt()
    noise = (1 - signal**2).sqrt()
    guided, pictures = {}, {}
    for name, estimate in (("target", for_target), ("aug", for_aug), ("merged", merged)):
        guided[name] = for_nothing + generator.guidance_scale * (estimate - for_nothing)
        clean = (latents[FEATURED] - noise * guided[name]) / signal / pipe.vae.config.scaling_factor
        with torch.no_grad():
            decoded = pipe.vae.decode(clean[None]).sample
        pictures[name] = pipe.image_processor.postprocess(decoded, output_type="pil")[0]
    small_mask = Image.fromarray(np.uint8(np.round(latent_mask[0].numpy() * 255)))
    return images, Step(small_mask, guided, pictures)


def paste(target: Image.Image, aug: Image.Image, item: Item) -> Image.Image:
    return Image.composite(target, aug, draw_mask(item.box, target.height, target.width))


def show_estimate(estimate: torch.Tensor) -> Image.Image:
    """Show the first three of four latent channels as red, green and blue: 0 is grey, and ±3 are the limits."""
    pixels = (estimate[:3].permute(1, 2, 0).numpy() / 6 + 0.5).clip(0, 1)
    return Image.fromarray(np.uint8(np.round(pixels * 255)))


class Sheet:
    """A white picture, with methods that add text, pictures and arrows to it."""

    def __init__(self, height: int):
        self.image = Image.new("RGB", (WIDTH, height), "white")
        self.draw = ImageDraw.Draw(self.image)

    def write(self, position, text, color=BLACK, anchor="lm", font=TEXT):
        self.draw.text(position, text, fill=color, anchor=anchor, font=font)

    def show(self, image, left, top, side, frame=None, resample=Image.Resampling.BICUBIC):
        """Paste a picture at a size, with a frame around it."""
        if frame is not None:
            box = (left - FRAME, top - FRAME, left + side + FRAME - 1, top + side + FRAME - 1)
            self.draw.rectangle(box, fill=frame)
        self.image.paste(image.convert("RGB").resize((side, side), resample), (left, top))

    def point(self, left, right, middle):
        """Draw an arrow to the right."""
        self.draw.rectangle((left, middle - 3, right - 16, middle + 3), fill=GRAY)
        self.draw.polygon([(right - 20, middle - 15), (right, middle), (right - 20, middle + 15)], fill=GRAY)


def draw_step(sheet: Sheet, top: int, item: Item, step: Step, image: Image.Image, names: Sequence[str]) -> int:
    """Draw the upper half; return the y coordinate of its end."""
    target, aug = names[item.target], names[item.aug]
    sheet.write((MARGIN, top + 20), f"One denoising step ({STEP} of 25)", font=HEADING)
    explanation = "Noise estimates, with guidance: three of their four latent channels as red, green and blue."
    sheet.write((MARGIN, top + 64), explanation, GRAY)
    upper = top + 184
    lower = upper + PANEL + 72
    end = lower + PANEL
    middle = (upper + end) // 2
    lefts = {"target": MARGIN + FRAME, "aug": MARGIN + PANEL + 40, "mask": MARGIN + 2 * PANEL + 74}
    lefts["merged"] = lefts["mask"] + PANEL + 74
    lefts["picture"] = lefts["merged"] + PANEL + 74
    lefts["label"] = lefts["picture"] + PICTURE + 44

    captions = {
        "target": (f"for {target}", TARGET_COLOR),
        "aug": (f"for {aug}", AUG_COLOR),
        "merged": ("merged", BLACK),
    }
    for name, (caption, color) in captions.items():
        left, center = lefts[name], lefts[name] + PANEL // 2
        sheet.write((center, upper - 60), "noise estimate", color, "mm")
        sheet.write((center, upper - 28), caption, color, "mm")
        sheet.show(show_estimate(step.estimates[name]), left, upper, PANEL, color, Image.Resampling.NEAREST)
        sheet.write((center, lower - 36), "predicted picture", GRAY, "mm")
        sheet.show(step.pictures[name], left, lower, PANEL, color)

    mask_top = middle - PANEL // 2
    sheet.write((lefts["mask"] + PANEL // 2, mask_top - 30), "mask", BLACK, "mm")
    sheet.show(step.mask, lefts["mask"], mask_top, PANEL, GRAY, Image.Resampling.NEAREST)
    sheet.write((lefts["mask"] + PANEL // 2, mask_top + PANEL + 30), f"white: {target}", TARGET_COLOR, "mm")
    sheet.write((lefts["mask"] + PANEL // 2, mask_top + PANEL + 64), f"black: {aug}", AUG_COLOR, "mm")
    sheet.point(lefts["mask"] + PANEL + 20, lefts["merged"] - 20, middle)

    sheet.point(lefts["merged"] + PANEL + 20, lefts["picture"] - 20, middle)
    picture_top = middle - PICTURE // 2
    sheet.write((lefts["picture"] + PICTURE // 2, picture_top - 30), "picture after 25 steps", BLACK, "mm")
    sheet.show(image, lefts["picture"], picture_top, PICTURE, BLACK)

    left = lefts["label"]
    sheet.write((left, picture_top - 30), "soft label", BLACK)
    room = WIDTH - MARGIN - left
    for row, (name, share, color) in enumerate(((target, item.ratio, TARGET_COLOR), (aug, 1 - item.ratio, AUG_COLOR))):
        line = picture_top + 70 + row * 110
        sheet.write((left, line - 26), f"{name} {share:.2f}", color)
        sheet.draw.rectangle((left, line, left + room - 1, line + 35), fill=(232, 232, 232))
        sheet.draw.rectangle((left, line, left + round(room * share) - 1, line + 35), fill=color)
    return end


def draw_outputs(
    sheet: Sheet, top: int, items: Sequence[Item], rows: dict[str, list[Image.Image]], names: Sequence[str]
) -> int:
    """Draw the lower half; return the y coordinate of its end."""
    sheet.write((MARGIN, top + 20), "Outputs", font=HEADING)
    explanation = (
        "The first pairs of seed 0 in which each class has at least 0.3 of the label. "
        "The pictures of a column start from the same noise."
    )
    sheet.write((MARGIN, top + 64), explanation, GRAY)
    first = WIDTH - MARGIN - COLUMNS * (CELL + CELL_GAP) + CELL_GAP
    top += 120
    for column, item in enumerate(items):
        center = first + column * (CELL + CELL_GAP) + CELL // 2
        sheet.write((center, top), names[item.target], TARGET_COLOR, "mm")
        sheet.write((center, top + 32), names[item.aug], AUG_COLOR, "mm")
    top += 58
    for caption, images in rows.items():
        sheet.draw.multiline_text((MARGIN, top + CELL // 2), caption, fill=BLACK, anchor="lm", font=TEXT, spacing=8)
        for column, image in enumerate(images):
            resample = Image.Resampling.NEAREST if image.mode == "L" else Image.Resampling.BICUBIC
            sheet.show(image, first + column * (CELL + CELL_GAP), top, CELL, resample=resample)
        top += CELL + CELL_GAP
    sheet.write((MARGIN, top + 14), "soft label")
    for column, item in enumerate(items):
        left = first + column * (CELL + CELL_GAP)
        split = left + round(CELL * item.ratio)
        sheet.draw.rectangle((left, top, split - 1, top + 27), fill=TARGET_COLOR)
        sheet.draw.rectangle((split, top, left + CELL - 1, top + 27), fill=AUG_COLOR)
    return top + 28


def draw_overview() -> Image.Image:
    generator = NoiseCutMixGenerator(device="cpu", data_name="digits", batch_size=COLUMNS)
    items = choose_items(generator.plan, COLUMNS)
    targets, augs = (draw_alone(generator, items, shown) for shown in ("target", "aug"))
    mixed, step = draw_and_watch(generator, items)
    side = generator.plan.resolution
    rows = {
        "red class alone": targets,
        "blue class alone": augs,
        "mask": [draw_mask(item.box, side, side) for item in items],
        "pasted (CutMix)": [paste(*each) for each in zip(targets, augs, items)],
        "NoiseCutMix": mixed,
    }
    sheet = Sheet(2000)
    end = draw_step(sheet, 20, items[FEATURED], step, mixed[FEATURED], generator.class_names)
    end = draw_outputs(sheet, end + 50, items, rows, generator.class_names)
    return sheet.image.crop((0, 0, WIDTH, end + MARGIN))


def main() -> None:
    torch.set_num_threads(1)  # so that the file does not depend on the number of cores
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("overview.png"), metavar="FILE")
    arguments = parser.parse_args()
    write_png(arguments.output, draw_overview())
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()

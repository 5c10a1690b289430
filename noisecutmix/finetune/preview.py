"""A look at a checkpoint: pictures of its classes beside real ones."""

from pathlib import Path

from PIL import Image

from .. import script
from ..classes import Classes
from ..files import write_png
from ..generator import NoiseCutMixGenerator
from ..photos import Photos, crop_square
from ..plan import Item, Plan
from ..preview import MAX_PICTURES, Caption, draw_grid
from .folder import Recipe

DRAWN_PER_CLASS = 2  # pictures, beside a real one
REAL_COLOR, DRAWN_COLOR = (0, 0, 0), (31, 119, 180)


def draw_preview(file: Path, recipe: Recipe, photos: Photos, *, model: str, device: str, batch_size: int) -> None:
    """Write a preview: for up to 16 classes, a real picture and two drawn with the checkpoint in the file's folder.

    The noise is the same in every preview. After a signal, nothing is written.
    """
    # The class alone, as in a data set with --single_class
    side, size = recipe.resolution, min(batch_size, MAX_PICTURES)
    classes = Classes(photos.class_names, recipe.meta_class, model, file.parent, side)
    plan = Plan(recipe.seed, len(photos.class_names), 1.0, side, single_class=True)
    generator = NoiseCutMixGenerator(device, classes, dtype=recipe.dtype, batch_size=size, plan=plan)
    names = photos.class_names[:MAX_PICTURES]
    numbers, box = range(DRAWN_PER_CLASS * len(names)), (0, 0, side, side)
    items = [Item(number, number // DRAWN_PER_CLASS, 0, box, 1.0, recipe.seed + number, side) for number in numbers]
    drawn: list[Image.Image] = []
    for start in range(0, len(items), size):
        if script.is_stopping():
            return
        drawn += generator.draw(items[start : start + size])

    # Beside a real picture of each class; more than four classes get two columns
    images: list[Image.Image] = []
    captions: list[list[Caption]] = []
    for label in range(len(names)):
        real = crop_square(photos.open(photos.labels.index(label)), side)
        images += [real, *drawn[DRAWN_PER_CLASS * label : DRAWN_PER_CLASS * (label + 1)]]
        captions += [[("", label, REAL_COLOR)], *[[("", label, DRAWN_COLOR)]] * DRAWN_PER_CLASS]
    legend = [("black: a real picture", REAL_COLOR), ("blue: drawn by the model", DRAWN_COLOR)]
    columns = (1 + DRAWN_PER_CLASS) * (2 if len(names) > 4 else 1)
    write_png(file, draw_grid(images, captions, names, legend, columns))

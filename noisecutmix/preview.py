"""preview.png: what was drawn, at a glance."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .plan import Item

MOST_PICTURES = 16
COLUMNS = 4
SIDE = 256
CAPTION_HEIGHT = 54
MARGIN = 12
TARGET_COLOR = (214, 39, 40)
AUG_COLOR = (31, 119, 180)


def draw_preview(images: Sequence[Image.Image], items: Sequence[Item], class_names: Sequence[str]) -> Image.Image:
    """Return a grid of up to 16 pictures, the box outlined, both classes with their shares of the label below."""
    images, items = images[:MOST_PICTURES], items[:MOST_PICTURES]
    columns = min(COLUMNS, len(images))
    rows = -(-len(images) // columns)
    cell_width, cell_height = SIDE + MARGIN, SIDE + CAPTION_HEIGHT + MARGIN
    grid = Image.new("RGB", (columns * cell_width + MARGIN, rows * cell_height + MARGIN), "white")
    for number, (image, item) in enumerate(zip(images, items)):
        left = MARGIN + number % columns * cell_width
        top = MARGIN + number // columns * cell_height
        grid.paste(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left, top))
        _outline(grid, item, image.size, left, top)
        target, aug = class_names[item.target], class_names[item.aug]
        _write(grid, f"{item.ratio:.2f} {target}", (left, top + SIDE + 4), TARGET_COLOR)
        _write(grid, f"{1 - item.ratio:.2f} {aug}", (left, top + SIDE + 28), AUG_COLOR)
    return grid


def _outline(grid: Image.Image, item: Item, size: tuple[int, int], left: int, top: int) -> None:
    x_scale, y_scale = SIDE / size[0], SIDE / size[1]
    box_left, box_top, box_right, box_bottom = item.box
    if box_right <= box_left or box_bottom <= box_top:
        return
    outline = (
        left + round(box_left * x_scale),
        top + round(box_top * y_scale),
        left + max(round(box_right * x_scale) - 1, round(box_left * x_scale)),
        top + max(round(box_bottom * y_scale) - 1, round(box_top * y_scale)),
    )
    ImageDraw.Draw(grid).rectangle(outline, outline=TARGET_COLOR, width=3)


def _write(grid: Image.Image, text: str, position: tuple[int, int], color: tuple[int, int, int]) -> None:
    """Write one line, in a smaller size where it would not fit."""
    size = 20
    while size > 10 and ImageFont.load_default(size).getlength(text) > SIDE:
        size -= 1
    ImageDraw.Draw(grid).text(position, text, fill=color, font=ImageFont.load_default(size))


def draw_comparison(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Return each class's real picture and drawn ones side by side under its name, in two columns where there are many.

    Args:
        rows: (class name, pictures, the real one first), as many pictures in each.
    """
    side, top = SIDE // 2, 30
    columns = 2 if len(rows) > 4 else 1
    step = side + MARGIN
    width, height = step * len(rows[0][1]) + MARGIN, step + top
    grid = Image.new("RGB", (width * columns, height * -(-len(rows) // columns)), "white")
    for number, (name, images) in enumerate(rows):
        row = Image.new("RGB", (width, height), "white")  # a picture of its own, so that a long name is cut off
        ImageDraw.Draw(row).text((MARGIN, 4), f"{name}: real, then drawn", "black", ImageFont.load_default(18))
        for place, image in enumerate(images):
            row.paste(image.resize((side, side), Image.Resampling.BICUBIC), (MARGIN + step * place, top))
        grid.paste(row, (number % columns * width, number // columns * height))
    return grid

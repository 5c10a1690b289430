"""preview.png and other grids of pictures with captions."""

import contextlib
import functools
import re
import unicodedata
from collections.abc import Sequence

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

from .plan import Item

MAX_PICTURES, COLUMNS = 16, 4
SIDE, MARGIN, LINE_WIDTH = 256, 12, 3  # in pixels, as the next ones
CAPTION_HEIGHT, LINE_HEIGHT, LEGEND_HEIGHT, LEGEND_SIZE = 54, 24, 30, 14
TARGET_COLOR, AUG_COLOR = (214, 39, 40), (31, 119, 180)
LEGEND = [
    ("red: target class, inside the outline", TARGET_COLOR),
    ("blue: aug class, outside", AUG_COLOR),
    ("numbers: shares of the soft label", (0, 0, 0)),
]
FONT_SIZES = range(20, 12, -1)  # in pixels, the preferred one first
BUILT_IN = ""
FONTS = (BUILT_IN, "DejaVuSans.ttf", "arial.ttf")  # the built-in one has ASCII letters only
SHOWN = re.compile("[\0-\u052f\u2010-\u2027]*")  # Latin, Greek, Cyrillic and punctuation, which the other fonts have

Color = tuple[int, int, int]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
Caption = tuple[str, int, Color]  # text, label of the class, colour


def draw_preview(images: Sequence[Image.Image], items: Sequence[Item], class_names: Sequence[str]) -> Image.Image:
    """Return a grid of the pictures, each with its mask outlined and both classes with their label shares below it."""
    captions = []
    for item in items[: len(images)]:
        shares = ((item.target, item.ratio, TARGET_COLOR), (item.aug, 1 - item.ratio, AUG_COLOR))
        captions.append([(f"{share:.2f}", label, color) for label, share, color in shares if share])
    outlined = [_outline(image, item.mask()) for image, item in zip(images, items)]
    return draw_grid(outlined, captions, class_names, LEGEND)


def draw_grid(
    images: Sequence[Image.Image],
    captions: Sequence[Sequence[Caption]],
    class_names: Sequence[str],
    legend: Sequence[tuple[str, Color]],
    columns: int = COLUMNS,
) -> Image.Image:
    """Return a grid of `columns` pictures a row, each with lines below it: a text, the name of a class, and a colour.

    The legend, texts and their colours, stands above as many columns as there are texts, or in as many lines, where
    there are fewer columns or a text is wider than one.
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    caption_height = CAPTION_HEIGHT + LINE_HEIGHT * (max(2, *map(len, captions)) - 2)
    cell_width, cell_height = SIDE + MARGIN, SIDE + caption_height + MARGIN
    font = _load_font(BUILT_IN, LEGEND_SIZE)
    texts_a_row = columns if all(font.getlength(text) <= SIDE for text, _ in legend) else 1
    legend_rows = -(-len(legend) // texts_a_row)
    above = LEGEND_HEIGHT * legend_rows
    grid = Image.new("RGB", (columns * cell_width + MARGIN, rows * cell_height + MARGIN + above), "white")
    for number, (text, color) in enumerate(legend):
        place = MARGIN + number % texts_a_row * cell_width, 6 + number // texts_a_row * LEGEND_HEIGHT
        ImageDraw.Draw(grid).text(place, text, fill=color, font=font)
    for number, (image, lines) in enumerate(zip(images, captions)):
        left = MARGIN + number % columns * cell_width
        top = above + MARGIN + number // columns * cell_height
        grid.paste(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left, top))
        for line, (start, label, color) in enumerate(lines):
            text, own_font = _fit_caption(start, class_names[label], label)
            ImageDraw.Draw(grid).text((left, top + SIDE + 4 + LINE_HEIGHT * line), text, fill=color, font=own_font)
    return grid


def _outline(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Return a picture of the grid's size, with the inner edge of the mask's white part drawn."""
    scaled = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    # with a black border, so that the mask has an edge at the picture's border, too
    white = ImageOps.expand(mask.resize((SIDE, SIDE), Image.Resampling.NEAREST), LINE_WIDTH)
    inner = white.filter(ImageFilter.MinFilter(2 * LINE_WIDTH + 1))
    edge = ImageOps.crop(ImageChops.subtract(white, inner), LINE_WIDTH)
    scaled.paste(TARGET_COLOR, (0, 0), edge)
    return scaled


def _fit_caption(start: str, class_name: str, label: int) -> tuple[str, Font]:
    """Return a caption of at most the picture's width, and its font; "class 17" for a name that no font can show."""
    name = unicodedata.normalize("NFC", " ".join(class_name.split()))
    file = next((file for file in FONTS if name.isprintable() and _can_show(file, name)), None)
    if file is None:
        file, name = BUILT_IN, f"class {label}"
    text = f"{start} {name}".strip()
    for size in FONT_SIZES:
        font = _load_font(file, size)
        if font.getlength(text) <= SIDE:
            return text, font
    text = text[: SIDE // 2]  # no letter is narrower than two pixels
    while font.getlength(f"{text}...") > SIDE:
        text = text[:-1]
    return f"{text.rstrip()}...", font


@functools.lru_cache
def _load_font(file: str, size: int) -> Font:
    if file == BUILT_IN:
        return ImageFont.load_default(size)
    # not every Pillow has the other layout engine, and captions shall look the same everywhere
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


def _can_show(file: str, text: str) -> bool:
    """Return whether a font is installed and shows a text, letter by letter."""
    if file == BUILT_IN:
        return text.isascii()
    with contextlib.suppress(OSError):  # the font is not installed
        _load_font(file, FONT_SIZES[0])
        return bool(SHOWN.fullmatch(text)) and not any(map(unicodedata.combining, text))
    return False

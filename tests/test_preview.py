"""preview.png: the captions are legible for all class names."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from noisecutmix import preview
from noisecutmix.plan import Item
from noisecutmix.preview import CAPTION_HEIGHT, LEGEND, LEGEND_HEIGHT, MARGIN, SIDE, draw_preview


def draw(names, label=0, copies=1):
    """Return the preview of pictures of one pair of classes, with class `label` inside the box."""
    item = Item(0, label, 1 - label if label < 2 else 0, (8, 8, 24, 24), 0.25, 0, 32)
    return np.asarray(draw_preview([Image.new("RGB", (32, 32))] * copies, [item] * copies, names))


def caption(name, label=0):
    """Return the pixels of the caption of a class."""
    names = ["other"] * 20
    names[label] = name
    top = MARGIN + SIDE + LEGEND_HEIGHT * len(LEGEND)  # above a single column, a line each
    return draw(names, label)[top : top + CAPTION_HEIGHT // 2].tolist()


@pytest.fixture
def a_font_with_letters():
    """Skip the test if no font is installed."""
    try:
        ImageFont.truetype("arial.ttf" if sys.platform == "win32" else "DejaVuSans.ttf")
    except OSError:
        pytest.skip("no font with all letters is installed")


NAMES = ["Vögelchen", "Žluťoučký", "Зимородок", "Αλκυόνα", "café", "Łabędź", "Ærø", "İbibik", "½ × ʻa’"]


@pytest.mark.parametrize("name", NAMES)
def test_each_letter_is_drawn(a_font_with_letters, name):
    """A missing glyph would be drawn as a box, the same for every such letter."""
    shown = caption(name)
    assert shown != caption("class 0")
    for position, letter in enumerate(name):
        if not letter.isascii():
            other = "ж" if letter != "ж" else "λ"
            assert caption(name[:position] + other + name[position + 1 :]) != shown


def test_the_same_letters_look_the_same_however_composed(a_font_with_letters):
    assert caption("Vo\u0308gelchen") == caption("V\u00f6gelchen")


@pytest.mark.parametrize("name", ["नीलकंठ", "עורב", "بلبل", "x\u0301y", "\ue000", "a\u200fb", "a\x07b"])
def test_a_name_that_cannot_be_drawn_is_replaced_by_its_label(name):
    assert caption(name, label=17) == caption("class 17", label=17)


@pytest.mark.parametrize("name", ["翠鸟", "Vögelchen"])
def test_a_machine_without_fonts_shows_labels(monkeypatch, name):
    monkeypatch.setattr(preview, "FONTS", (preview.BUILT_IN, "nonesuch.ttf"))
    assert caption(name, label=17) == caption("class 17", label=17)
    assert caption("Cardinal") != caption("class 0")


@pytest.mark.parametrize("name", ["a name of many words " * 3, "x" * 500, "Ü" * 80, "a\nb\tc", "W" * 29])
def test_captions_stay_below_their_pictures(name):
    """The space between rows and between columns remains white."""
    pixels = draw([name, name], copies=8)[LEGEND_HEIGHT:]  # above four columns, one line
    for column in range(5):
        left = column * (SIDE + MARGIN)
        assert (pixels[:, left : left + MARGIN] == 255).all()
    for row in range(3):
        top = row * (SIDE + CAPTION_HEIGHT + MARGIN)
        assert (pixels[top : top + MARGIN] == 255).all()


def test_a_long_name_is_shown_as_truncated():
    fits = "W" * 10
    assert caption("W" * 200) == caption("W" * 300) != caption(fits)


@pytest.mark.parametrize("box", [(8, 8, 24, 24), (0, 0, 32, 32), (0, 5, 9, 32), (3, 3, 3, 3)])
def test_the_inner_edge_of_the_mask_is_outlined(box):
    """As a rectangle of three pixels would be drawn, also along the picture's border."""
    item = Item(0, 0, 1, box, 0.25, 0, 32)
    top = MARGIN + LEGEND_HEIGHT * len(LEGEND)
    grid = np.asarray(draw_preview([Image.new("RGB", (32, 32))], [item], ["a", "b"]))[top : top + SIDE]
    expected = Image.new("RGB", (SIDE, SIDE))
    if box[0] < box[2]:
        left, upper, right, lower = (8 * edge for edge in box)
        corners = (left, upper, right - 1, lower - 1)
        ImageDraw.Draw(expected).rectangle(corners, outline=preview.TARGET_COLOR, width=3)
    assert np.array_equal(grid[:, MARGIN : MARGIN + SIDE], np.asarray(expected))


def test_a_legend_says_what_the_colours_mean():
    pixels = draw(["a", "b"], copies=4)[:LEGEND_HEIGHT]
    for color in (preview.TARGET_COLOR, preview.AUG_COLOR):
        assert (np.abs(pixels.astype(int) - color).sum(2) < 40).any()

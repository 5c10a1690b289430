"""The CutMix box: its position, its share of the picture, and its mask."""

import math

import numpy as np
from PIL import Image

from .ranges import RANGES, Range

Box = tuple[int, int, int, int]


def sample_box(height: int, width: int, alpha: float, rng: np.random.Generator) -> Box:
    """Draw a CutMix box (left, top, right, bottom) in pixels, right and bottom excluded.

    lambda ~ Beta(alpha, alpha); the box's sides are sqrt(1 - lambda) of the picture's, its centre is uniform over the
    pixels, and the box is clipped at the picture's edges (Yun et al., CutMix, ICCV 2019, section 3.1, equations 2 and
    3). A box less than two pixels wide is empty.
    """
    side = math.sqrt(1.0 - rng.beta(alpha, alpha))
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    row, column = int(rng.random() * height), int(rng.random() * width)
    left, right = max(column - half_width, 0), min(column + half_width, width)
    top, bottom = max(row - half_height, 0), min(row + half_height, height)
    return left, top, right, bottom


def area_ratio(box: Box, height: int, width: int) -> float:
    """Return the area of the box over the area of the picture, 0 to 1: the target class's share of the label."""
    left, top, right, bottom = box
    return (right - left) * (bottom - top) / (height * width)


def draw_mask(box: Box, height: int, width: int) -> Image.Image:
    """Return the mask as an 8-bit "L" picture: 255 inside the box, 0 outside."""
    left, top, right, bottom = box
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[top:bottom, left:right] = 255
    return Image.fromarray(pixels)


def make_mask_and_ratio(
    size: tuple[int, ...], alpha: float, rng: np.random.Generator | None = None
) -> tuple[Image.Image, float]:
    """Draw a CutMix mask for a picture of `size` (H, W, C) or (H, W), in pixels.

    Args:
        size: the picture's height and width; further entries are ignored.
        alpha: both parameters of the Beta distribution, 1e-6 to 1e6. At 1, lambda is uniform.
        rng: the random generator; None takes fresh entropy. The global random state is never used.

    Returns:
        The mask ("L", 255 inside the box, 0 outside) and the share of the picture that is white, 0 to 1.

    Raises:
        ValueError: alpha is not a number within its range, or `size` does not hold two whole numbers above 0.
    """
    try:
        height, width = size[:2]
    except (TypeError, ValueError) as error:
        raise ValueError(f"`size`: has to be (H, W, C) or (H, W), not {size!r}") from error
    height, width = (Range(int, 1).check("size", side) for side in (height, width))
    alpha = RANGES["alpha"].check("alpha", alpha)
    box = sample_box(height, width, alpha, rng if rng is not None else np.random.default_rng())
    return draw_mask(box, height, width), area_ratio(box, height, width)

"""The plan of a data set: the classes, CutMix box, mask and noise seed of each item, known before anything is drawn."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .errors import InputError
from .ranges import RANGES, Range

WHOLE_NUMBER, SHARE = Range(int, 0), Range(float, 0, 1)

Box = tuple[int, int, int, int]


def seed_record(seed: int) -> dict[str, int]:
    """Return what a record says of a seed of 2**32 or more, whose random numbers were others in earlier versions."""
    return {"seed_sequence": 2} if seed >> 32 else {}


def seed_sequence(seed: int, *numbers: int) -> np.random.SeedSequence:
    """Return the entropy of a seed below 2**63 and numbers below 2**32, different for different ones.

    numpy reads a larger number as two, so of [seed, index] the pairs (3 * 2**32 + 5, 0) and (5, 3) would be the same.
    """
    return np.random.SeedSequence([seed % 2**32, *numbers, *([seed >> 32] if seed >> 32 else [])])


def sample_cutmix_box(height: int, width: int, alpha: float, rng: np.random.Generator) -> Box:
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
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


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
        InputError: alpha is not within its range, or a side is not a whole number above 0.
    """
    height, width = (Range(int, 1).check("size", side) for side in size[:2])
    alpha = RANGES["alpha"].check("alpha", alpha)
    box = sample_cutmix_box(height, width, alpha, rng if rng is not None else np.random.default_rng())
    return draw_mask(box, height, width), area_ratio(box, height, width)


@dataclass(frozen=True)
class Item:
    """One picture to draw, square, `resolution` pixels a side.

    `target` and `aug` are labels from 0; `ratio` is the target's share of the area, inside `box`.

    Raises:
        InputError: an index or a label that is not a whole number, or a ratio outside 0 to 1.
    """

    index: int
    target: int
    aug: int
    box: Box
    ratio: float
    noise_seed: int
    resolution: int

    def __post_init__(self) -> None:
        for name, valid in (("index", WHOLE_NUMBER), ("target", WHOLE_NUMBER), ("aug", WHOLE_NUMBER), ("ratio", SHARE)):
            object.__setattr__(self, name, valid.check(name, getattr(self, name)))

    def mask(self) -> Image.Image:
        """Return the mask, "L": 255 where the target class is drawn, 0 where the aug class is."""
        return draw_mask(self.box, self.resolution, self.resolution)

    def soft_label(self, num_classes: int) -> np.ndarray:
        """Return r * onehot(target) + (1 - r) * onehot(aug): float32, (num_classes,), sum 1."""
        label = np.zeros(num_classes, dtype=np.float32)
        label[self.target] += self.ratio
        label[self.aug] += 1.0 - self.ratio
        return label


@dataclass(frozen=True)
class Plan:
    """Items as a pure function of (seed, index, number of classes, alpha, resolution).

    Everything in item i is drawn from `seed_sequence(seed, i)`, so it does not depend on the batch, the process, an
    interruption or the number of items. Target classes are uniform; the aug class is uniform over the other classes.
    With `single_class`, the box is the whole picture, so the item is of the target class alone; all else is the same.

    Raises:
        InputError: an argument of the wrong kind or outside its range (see `RANGES`), or fewer than two classes.
    """

    seed: int
    num_classes: int
    alpha: float
    resolution: int
    single_class: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_classes", Range(int, 2).check("num_classes", self.num_classes))
        for name in ("seed", "alpha", "resolution"):
            object.__setattr__(self, name, RANGES[name].check(name, getattr(self, name)))

    def item(self, index: int, target: int | None = None, aug: int | None = None) -> Item:
        """Return item `index`; `target` and `aug` replace the drawn classes, but change neither box nor noise.

        Raises:
            InputError: an index or a label is not a whole number or out of range, or target and aug are equal.
        """
        index = WHOLE_NUMBER.check("index", index)
        for name, label in (("target", target), ("aug", aug)):
            if label is not None:
                Range(int, 0, self.num_classes - 1).check(name, label)
        if target is not None and target == aug:
            raise InputError(f"target and aug have to differ but are both {target}")
        rng = np.random.Generator(np.random.PCG64(seed_sequence(self.seed, index)))
        box = sample_cutmix_box(self.resolution, self.resolution, self.alpha, rng)
        noise_seed = int(rng.integers(2**63 - 1))
        first, second = int(rng.random() * self.num_classes), int(rng.random() * (self.num_classes - 1))
        if target is None:
            target = first if aug is None else second + (second >= aug)
        if aug is None:
            aug = second + (second >= target)
        if self.single_class:
            box = (0, 0, self.resolution, self.resolution)
        ratio = area_ratio(box, self.resolution, self.resolution)
        return Item(index, target, aug, box, ratio, noise_seed, self.resolution)

    def items(self, num_items: int) -> Iterator[Item]:
        """Yield items 0 to num_items - 1 in order."""
        return map(self.item, range(num_items))

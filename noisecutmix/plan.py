"""The plan: what item i of a data set is, known before anything is drawn."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .cutmix import Box, area_ratio, sample_box


@dataclass(frozen=True)
class Item:
    """One picture to draw, square, `resolution` pixels a side.

    `target` and `aug` are labels from 0; `ratio` is the target's share of the area, inside `box`.
    """

    index: int
    target: int
    aug: int
    box: Box
    ratio: float
    noise_seed: int
    resolution: int

    def soft_label(self, num_classes: int) -> np.ndarray:
        """Return r * onehot(target) + (1 - r) * onehot(aug): float32, (num_classes,), sum 1."""
        label = np.zeros(num_classes, dtype=np.float32)
        label[self.target] += self.ratio
        label[self.aug] += 1.0 - self.ratio
        return label


@dataclass(frozen=True)
class Plan:
    """Items as a pure function of (seed, index, number of classes, alpha, resolution).

    Item i draws everything from `SeedSequence([seed, i])`, so it does not depend on the batch, the process, an
    interruption or the number of items. Target classes are uniform, the aug class is uniform over the others.

    Raises:
        ValueError: a negative seed, fewer than two classes, an alpha that is not positive, or a side below 1 pixel.
    """

    seed: int
    num_classes: int
    alpha: float
    resolution: int

    def __post_init__(self) -> None:
        if self.seed < 0 or self.num_classes < 2 or self.resolution < 1:
            raise ValueError(f"`seed`, `num_classes` and `resolution` have to be at least 0, 2 and 1 but are: {self}.")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"`alpha` has to be a positive number but is {self.alpha}.")

    def item(self, index: int, target: int | None = None, aug: int | None = None) -> Item:
        """Return item `index`; `target` and `aug` replace the drawn classes, box and noise stay the same.

        Raises:
            ValueError: target and aug are given and equal.
        """
        if target is not None and target == aug:
            raise ValueError(f"`target` and `aug` have to differ but are both {target}.")
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, index])))
        box = sample_box(self.resolution, self.resolution, self.alpha, rng)
        noise_seed = int(rng.integers(2**63 - 1))
        first, second = int(rng.random() * self.num_classes), int(rng.random() * (self.num_classes - 1))
        if target is None:
            target = first if aug is None else second + (second >= aug)
        if aug is None:
            aug = second + (second >= target)
        ratio = area_ratio(box, self.resolution, self.resolution)
        return Item(index, target, aug, box, ratio, noise_seed, self.resolution)

    def items(self, num_items: int) -> Iterator[Item]:
        """Yield items 0 to num_items - 1 in order."""
        return map(self.item, range(num_items))

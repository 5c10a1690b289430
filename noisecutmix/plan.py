"""The plan of a data set: the classes, box and noise seed of each item, known before anything is drawn."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .cutmix import Box, area_ratio, sample_box
from .ranges import RANGES, Range

WHOLE_NUMBER, SHARE = Range(int, 0), Range(float, 0, 1)


@dataclass(frozen=True)
class Item:
    """One picture to draw, square, `resolution` pixels a side.

    `target` and `aug` are labels from 0; `ratio` is the target's share of the area, inside `box`.

    Raises:
        ValueError: an index or a label that is not a whole number, or a ratio outside 0 to 1.
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

    def soft_label(self, num_classes: int) -> np.ndarray:
        """Return r * onehot(target) + (1 - r) * onehot(aug): float32, (num_classes,), sum 1."""
        label = np.zeros(num_classes, dtype=np.float32)
        label[self.target] += self.ratio
        label[self.aug] += 1.0 - self.ratio
        return label


@dataclass(frozen=True)
class Plan:
    """Items as a pure function of (seed, index, number of classes, alpha, resolution).

    Everything in item i is drawn from `SeedSequence([seed, i])`, so it does not depend on the batch, the process, an
    interruption or the number of items. Target classes are uniform; the aug class is uniform over the other classes.

    Raises:
        ValueError: an argument of the wrong kind or outside its range (see `RANGES`), or fewer than two classes.
    """

    seed: int
    num_classes: int
    alpha: float
    resolution: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_classes", Range(int, 2).check("num_classes", self.num_classes))
        for name in ("seed", "alpha", "resolution"):
            object.__setattr__(self, name, RANGES[name].check(name, getattr(self, name)))

    def item(self, index: int, target: int | None = None, aug: int | None = None) -> Item:
        """Return item `index`; `target` and `aug` replace the drawn classes, but change neither box nor noise.

        Raises:
            ValueError: an index or a label is not a whole number or out of range, or target and aug are equal.
        """
        index = WHOLE_NUMBER.check("index", index)
        for name, label in (("target", target), ("aug", aug)):
            if label is not None:
                Range(int, 0, self.num_classes - 1).check(name, label)
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

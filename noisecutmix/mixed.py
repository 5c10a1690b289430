"""Real pictures that are replaced by augmented ones at random, with classes paired by name."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from .classes import match_classes
from .errors import InputError
from .plan import seed_sequence
from .ranges import RANGES, Range

MAX_SUM_ERROR = 0.01  # of a soft label; float16 of 200 classes stays well below


class MixedDataset(Dataset[tuple[Any, torch.Tensor]]):
    """Real pictures, each replaced by a random augmented one with a given probability, as in Diff-Mix's training.

    Item i is (image, soft label float32 (num_classes,)), so `torch.nn.functional.cross_entropy(logits, soft_labels)`
    takes every batch. Item i depends only on the seed, the epoch, i, and how often i was drawn since `set_epoch`, but
    not on the process or on a DataLoader's workers and order. There is one exception: if a sampler repeats an item, and
    several workers draw it at the same time, chance decides which of them draws it first.

    Args:
        real: a data set of (image, label), the label a class number or a soft label (num_classes,).
        augmented: a data set of (image, soft label), transformed as `real` is. It has `class_names`, or is a Subset or
            ConcatDataset of data sets that have.
        probability: of an augmented item, 0 to 1.
        class_names: the classes in the order of `real`'s labels. None takes them from `real`: see `find_class_names`.
        seed: 0 to 2**63 - 1; determines which pictures are replaced, and by which.

    Attributes:
        class_names: the class of each place in a label, in the order of `real`'s labels.
        num_classes: their number.
        transform: that of `real`; where it is set, as timm's create_loader does, `augmented` gets the same.

    Raises:
        InputError: a number is out of its range, the class names of `real` or `augmented` are not known, or they are
            not the same classes.
        ValueError: from [i], the label does not fit.
    """

    def __init__(
        self,
        real: Dataset[Any],
        augmented: Dataset[tuple[Any, torch.Tensor]],
        probability: float,
        class_names: Sequence[str] | None = None,
        seed: int = 0,
    ):
        Range(float, 0, 1).check("probability", probability)
        RANGES["seed"].check("seed", seed)
        if isinstance(class_names, str | int):
            raise InputError(
                f"has to be a list of names in the order of the labels, not {class_names!r}", "class_names"
            )
        names = find_class_names(real) if class_names is None else class_names
        own_names = find_class_names(augmented)
        if names is None:
            raise InputError(
                "the real data set does not tell which class its label 0 is, so the augmented labels "
                "cannot be put into its order; give the class names in the order of its labels",
                "class_names",
            )
        if own_names is None:
            raise InputError("has no class_names; give an AugmentedDataset, or set its class_names", "augmented")
        try:
            self._order = match_classes(names, own_names, "the real data set", "the augmented data set")
        except InputError as error:
            hint = "" if class_names else "; if it names them otherwise, give class_names in its labels' order"
            raise InputError(f"{error}{hint}") from error
        self.class_names = list(names)
        self.num_classes = len(self.class_names)
        self.real: Any = real
        self.augmented: Any = augmented
        self.probability = probability
        self.seed = seed
        self._share_counts()

    @property
    def transform(self) -> Any:
        return next(_parts(self.real)).transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        parts = [*_parts(self.real), *_parts(self.augmented)]
        for part in parts:
            if not hasattr(part, "transform"):
                raise InputError(f"{type(part).__name__} has no transform that could be set", "real")
        for part in parts:
            part.transform = transform

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, as with DistributedSampler; call it in every process, before the DataLoader is iterated.

        It also reaches a DataLoader's running workers. A training that is resumed at epoch e draws the same as an
        uninterrupted one. Without this call, the epochs of one process still differ, since the draws are counted.

        Args:
            epoch: its number, at least 0.
        """
        Range(int, 0, 2**32 - 1).check("epoch", epoch)
        if self._process != os.getpid():  # a rank that got the data set from its launcher needs its own counts
            self._share_counts()
        self._counts[0] = epoch
        self._counts[1:] = 0

    def __len__(self) -> int:
        return len(self.real)

    def __getitem__(self, index: int) -> tuple[Any, torch.Tensor]:
        index = range(len(self))[index]
        epoch, draws = int(self._counts[0]), int(self._counts[1 + index])
        self._counts[1 + index] += 1
        rng = np.random.default_rng(seed_sequence(self.seed, epoch, index, draws))
        if rng.random() < self.probability:
            image, label = self.augmented[int(rng.integers(len(self.augmented)))]
            return image, self._soften(label)[self._order]
        image, label = self.real[index]
        return image, self._soften(label)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._counts.share_memory_()  # the counts of a copy are not shared yet

    def _share_counts(self) -> None:
        """Set the epoch (element 0) and how often each item was drawn in it to 0, in memory that workers share."""
        counts = torch.zeros(1 + len(self), dtype=torch.int64)
        self._counts = counts.share_memory_()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._process = os.getpid()

    def _soften(self, label_or_class: Any) -> torch.Tensor:
        wrong = f"a label has to be a class below {self.num_classes} or that many shares of sum 1, not {label_or_class}"
        try:
            label: torch.Tensor = torch.as_tensor(label_or_class)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(wrong) from error
        is_class = label.ndim == 0 and not label.is_floating_point() and label.dtype != torch.bool
        if is_class and 0 <= label < self.num_classes:
            label = torch.nn.functional.one_hot(label.long(), self.num_classes)
        if label.shape != (self.num_classes,) or label.min() < 0 or not abs(label.sum() - 1) < MAX_SUM_ERROR:
            raise ValueError(wrong)
        return label.float()


def _parts(data_set: Any) -> Iterator[Any]:
    """Yield the data sets of which a Subset or ConcatDataset consists, or the data set itself."""
    if isinstance(data_set, Subset):
        yield from _parts(data_set.dataset)
    elif isinstance(data_set, ConcatDataset):
        for part in data_set.datasets:
            yield from _parts(part)
    else:
        yield data_set


def find_class_names(data_set: Any) -> list[str] | None:
    """Return the classes of a data set in the order of its labels, None if they are not known for certain.

    They are read from `class_names`; torchvision's `class_to_idx` or `classes`; timm's reader; the ClassLabel of a
    Hugging Face data set; also through Subset and ConcatDataset. A `target_transform` may change the labels, so then
    they are not known.
    """
    if isinstance(data_set, Subset):
        return find_class_names(data_set.dataset)
    if isinstance(data_set, ConcatDataset):
        each = [find_class_names(part) for part in data_set.datasets]
        return each[0] if all(names == each[0] for names in each) else None
    if getattr(data_set, "target_transform", None) is not None:
        return None
    if isinstance(names := getattr(data_set, "class_names", None), list | tuple):
        return _as_names(names)
    labels = getattr(getattr(data_set, "reader", data_set), "class_to_idx", None)
    if isinstance(labels, dict) and labels:
        by_label = {label: name for name, label in labels.items()}
        is_one_to_one = set(by_label) == set(range(len(labels)))
        return _as_names([by_label[label] for label in range(len(labels))]) if is_one_to_one else None
    if isinstance(features := getattr(data_set, "features", None), dict):
        found = [feature.names for feature in features.values() if type(feature).__name__ == "ClassLabel"]
        return _as_names(found[0]) if len(found) == 1 else None
    return _as_names(getattr(data_set, "classes", None))


def _as_names(names: Any) -> list[str] | None:
    """Return a list of texts, None if something else was found."""
    is_list = isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names)
    return list(names) if is_list else None

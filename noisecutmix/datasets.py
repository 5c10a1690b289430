"""Output folders as torch data sets; real pictures that are replaced by augmented ones at random."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset

from .classes import match_classes
from .errors import InputError
from .files import recorded_command
from .folder import LABELS_FILE, METADATA_FILE, PREFIXES, item_file_name, read_run
from .plan import seed_sequence
from .ranges import RANGES, Range

MAX_SUM_ERROR = 0.01  # of a soft label; float16 of 200 classes stays well below


class AugmentedDataset(Dataset[tuple[Any, torch.Tensor]]):
    """The pictures and soft labels of a folder that `augmentation.py` completed.

    Item i is (image, soft label): the label is float32, (num_classes,), sum 1. Labels are memory-mapped and file names
    are computed from the index, so a DataLoader's workers need no memory for either.

    Args:
        root: the output folder.
        transform: a function from an RGB picture to the model's input; None gives the PIL picture.
        class_names: the data set's classes in the order that the labels shall have (see `match_classes`), such as that
            of a folder of photos; None is the data set's own order.

    Attributes:
        class_names: the class of each place in a label.

    Raises:
        InputError: the folder is not a data set, cannot be read, is not complete (the message says how many items are
            done), lacks a picture, has damaged labels (the message gives the command that repairs it), or has other
            classes.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Callable[[Image.Image], Any] | None = None,
        class_names: Sequence[str] | None = None,
    ):
        self.root, self.transform = Path(root).absolute(), transform  # the working directory may change later
        record = read_run(self.root, "root")
        if record is None or not isinstance(own_names := record["options"].get("class_names"), list):
            raise InputError(f"{self.root} has no run.json with class names; it is not a data set of augmentation.py")
        self.class_names = list(own_names if class_names is None else class_names)
        order = match_classes(self.class_names, own_names, "class_names", str(self.root))
        self._order = None if order == list(range(len(order))) else order
        self._command = recorded_command(record, f"--output_dir={self.root}")  # the last one: it may be a copy
        try:
            self._check_files(record["num_aug"])
        except OSError as error:
            raise InputError(f"{error.filename or self.root} cannot be read: {error.strerror}") from error

    @property
    def soft_labels(self) -> np.ndarray:
        """All soft labels: float32, (items, num_classes); in the data set's own order memory-mapped and read-only."""
        return self._labels if self._order is None else self._labels[:, self._order]

    @cached_property
    def _labels(self) -> np.ndarray:
        try:
            labels: np.ndarray = np.load(self.root / LABELS_FILE, mmap_mode="r", allow_pickle=False)
            if labels.shape != (len(labels), self.num_classes) or not len(labels) or labels.dtype != np.float32:
                raise ValueError(f"it holds {labels.dtype} of the shape {labels.shape}")
        except OSError:
            raise
        except Exception as error:  # numpy raises many kinds of errors for a damaged header
            raise self._unfit(f"{LABELS_FILE} is damaged") from error
        return labels

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def file_names(self) -> list[str]:
        """The pictures' paths below `root`, in order; made on first use."""
        template = item_file_name("image", len(self))
        return [template % index for index in range(len(self))]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Any, torch.Tensor]:
        index = range(len(self))[index]  # negative ones count from the end
        with Image.open(self.root / (item_file_name("image", len(self)) % index)) as file:
            image = file.convert("RGB")
        label = torch.from_numpy(np.array(self._labels[index, self._order or slice(None)]))
        return (image if self.transform is None else self.transform(image)), label

    def metadata(self, index: int) -> dict[str, Any]:
        """Return an item's line of metadata.jsonl: classes (as places in a soft label), ratio, box and more."""
        index = range(len(self))[index]
        try:
            item: dict[str, Any] = json.loads(self._metadata_lines[index])
            order = self._order or range(self.num_classes)
            places = {name: order.index(item[name]) for name in ("target_label", "aug_label")}
        except (ValueError, LookupError, TypeError) as error:
            raise self._unfit(f"{METADATA_FILE} is damaged") from error
        return {**item, **places}

    def mask(self, index: int) -> Image.Image:
        """Return an item's mask, "L": 255 inside the box, which shows the target class, 0 outside."""
        name = item_file_name("mask", len(self)) % range(len(self))[index]
        return Image.open(self.root / name).convert("L")

    @cached_property
    def _metadata_lines(self) -> list[bytes]:
        return (self.root / METADATA_FILE).read_bytes().split(b"\n")

    def __getstate__(self) -> dict[str, Any]:
        made_on_use = ("_labels", "file_names", "_metadata_lines")  # a worker maps the file itself
        return {name: value for name, value in self.__dict__.items() if name not in made_on_use}

    def _check_files(self, num_planned: int) -> None:
        """Raise an InputError if a file is missing."""
        if not all((self.root / name).is_file() for name in (METADATA_FILE, LABELS_FILE)):
            done = sum(1 for _ in (self.root / "image").glob(f"{PREFIXES['image']}_*.png"))
            raise self._unfit(f"the data set is not complete, {done} of {num_planned} items are done", "continue")
        folder, _, template = item_file_name("image", len(self)).partition("/")
        # to list the folder once is cheaper than to look for each file
        there = set(os.listdir(self.root / folder)) if (self.root / folder).is_dir() else set()
        for index in range(len(self)):
            if template % index not in there:
                raise self._unfit(f"{folder}/{template % index} is missing")

    def _unfit(self, problem: str, remedy: str = "repair") -> InputError:
        return InputError(f"{self.root}: {problem}; {remedy} with: {self._command}")


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
            raise InputError(f"has to be a list of names, not {class_names!r}", "class_names")
        names = find_class_names(real) if class_names is None else class_names
        own_names = find_class_names(augmented)
        if names is None:
            lack = "the real data set does not tell which class its label 0 is"
            raise InputError(f"{lack}; give the class names in the order of its labels", "class_names")
        if own_names is None:
            raise InputError("has no class_names; give an AugmentedDataset, or set its class_names", "augmented")
        self._order = match_classes(names, own_names, "the real data", "the augmented data", option="class_names")
        self.class_names, self.num_classes = list(names), len(names)
        self.real: Any = real
        self.augmented: Any = augmented
        self.probability, self.seed = probability, seed
        self._share_counts()

    @property
    def transform(self) -> Any:
        return next(_parts(self.real)).transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        parts = [*_parts(self.real), *_parts(self.augmented)]
        if lacking := [type(part).__name__ for part in parts if not hasattr(part, "transform")]:
            raise InputError(f"{lacking[0]} has no transform that could be set", "real")
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
    is_list = isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names)
    return list(names) if is_list else None

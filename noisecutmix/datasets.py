"""Output folders as torch data sets, alone and mixed with real pictures."""

import os
import shlex
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from .errors import InputError
from .ranges import Range
from .record import LABELS_FILE, METADATA_FILE, PREFIXES, item_file_name, read_run

LARGEST_SUM_ERROR = 0.01  # of a soft label; float16 of 200 classes stays well below


class AugmentedDataset(Dataset[tuple[Any, torch.Tensor]]):
    """The pictures and soft labels of a folder that `augmentation.py` completed.

    Item i is (image, soft label): the label is float32, (num_classes,), sum 1. Labels are memory-mapped and file names
    are computed from the index, so a DataLoader's workers need no memory for either.

    Args:
        root: the output folder.
        transform: a function from an RGB picture to the model's input; None gives the PIL picture.

    Raises:
        InputError: the folder is not a data set, cannot be read, is not complete (the message says how many items are
            done), lacks a picture, or has damaged labels. The message gives the command that repairs it.
    """

    def __init__(self, root: str | Path, transform: Callable[[Image.Image], Any] | None = None):
        self.root = Path(root).absolute()  # so that the working directory may change later
        self.transform = transform
        self._soft_labels: np.ndarray | None = None
        record = read_run(self.root, "root")
        if record is None:
            raise InputError(f"{self.root} has no run.json; it is not a data set of augmentation.py")
        # the last --output_dir counts: the folder may be a copy
        command = [*map(str, record.get("command", ["python", "augmentation.py"])), f"--output_dir={self.root}"]
        self._command = shlex.join(command)
        try:
            self._check_files(record["num_aug"])
        except OSError as error:
            raise InputError(f"{error.filename or self.root} cannot be read: {error.strerror}") from error

    @property
    def soft_labels(self) -> np.ndarray:
        """All soft labels: float32, (items, num_classes), memory-mapped and read-only."""
        if self._soft_labels is None:
            try:
                labels = np.load(self.root / LABELS_FILE, mmap_mode="r", allow_pickle=False)
                if labels.ndim != 2 or not len(labels) or labels.dtype != np.float32:
                    raise ValueError(f"it holds {labels.dtype} of the shape {labels.shape}")
            except OSError:
                raise
            except Exception as error:  # numpy raises many kinds of errors for a damaged header
                raise self._unfit(f"{LABELS_FILE} is damaged") from error
            self._soft_labels = labels
        return self._soft_labels

    @property
    def num_classes(self) -> int:
        return int(self.soft_labels.shape[1])

    @cached_property
    def file_names(self) -> list[str]:
        """The pictures' paths below `root`, in order; made on first use."""
        template = item_file_name("image", len(self))
        return [template % index for index in range(len(self))]

    def __len__(self) -> int:
        return len(self.soft_labels)

    def __getitem__(self, index: int) -> tuple[Any, torch.Tensor]:
        index = range(len(self))[index]  # negative ones count from the end
        with Image.open(self.root / (item_file_name("image", len(self)) % index)) as file:
            image = file.convert("RGB")
        label = torch.from_numpy(np.array(self.soft_labels[index]))
        return (image if self.transform is None else self.transform(image)), label

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_soft_labels": None}  # a worker maps the file itself
        state.pop("file_names", None)
        return state

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
    not on the process or on a DataLoader's workers and order.

    Args:
        real: a data set of (image, label), the label a class number or a soft label (num_classes,).
        augmented: a data set of (image, soft label), transformed as `real` is.
        probability: of an augmented item, 0 to 1.
        num_classes: the length of the soft labels.
        seed: at least 0; determines which pictures are replaced, and by which.

    Raises:
        InputError: a number is out of its range, or `augmented` has another number of classes.
        ValueError: from [i], the label does not fit.
    """

    def __init__(
        self,
        real: Dataset[Any],
        augmented: Dataset[tuple[Any, torch.Tensor]],
        probability: float,
        num_classes: int,
        seed: int = 0,
    ):
        Range(float, 0, 1).check("probability", probability)
        Range(int, 1).check("num_classes", num_classes)
        Range(int, 0).check("seed", seed)
        if getattr(augmented, "num_classes", num_classes) != num_classes:
            raise InputError(
                f"`num_classes`: is {num_classes}, but the augmented labels have another number of classes"
            )
        self.real: Any = real
        self.augmented: Any = augmented
        self.probability = probability
        self.num_classes = num_classes
        self.seed = seed
        self._share_counts()

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, as with DistributedSampler; call it in every process, before the DataLoader is iterated.

        It also reaches a DataLoader's running workers. A training that is resumed at epoch e draws the same as an
        uninterrupted one. Without this call, the epochs of one process still differ, since the draws are counted.

        Args:
            epoch: its number, at least 0.
        """
        Range(int, 0).check("epoch", epoch)
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
        rng = np.random.default_rng([self.seed, epoch, index, draws])
        if rng.random() < self.probability:
            image, label = self.augmented[int(rng.integers(len(self.augmented)))]
        else:
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
        if label.shape != (self.num_classes,) or label.min() < 0 or not abs(label.sum() - 1) < LARGEST_SUM_ERROR:
            raise ValueError(wrong)
        return label.float()

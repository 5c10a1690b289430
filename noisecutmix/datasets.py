"""Output folders as torch data sets."""

import json
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from .classes import match_classes
from .errors import InputError
from .files import recorded_command
from .folder import LABELS_FILE, METADATA_FILE, PREFIXES, item_file_name, read_run


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
        self.root = Path(root).absolute()  # so that the working directory may change later
        self.transform = transform
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
        row = self._labels[index]
        label = torch.from_numpy(np.array(row if self._order is None else row[self._order]))
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
        mask: Image.Image = Image.open(self.root / name).convert("L")
        return mask

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

"""An output folder as a torch data set, alone and mixed with real pictures."""

import json
import shlex
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from .errors import InputError


class AugmentedDataset(Dataset[tuple[Any, torch.Tensor]]):
    """The pictures and soft labels of a folder that `augmentation.py` completed, by row.

    Args:
        root: the output folder.
        transform: what makes the model's input of an RGB picture; None gives the PIL picture.

    Item i is (image, soft label): the label is float32, (num_classes,), sum 1. The label array is memory-mapped, so
    DataLoader workers share it, also where they are spawned.

    Raises:
        InputError: the folder is no data set, not complete (the message tells how far it is), or not consistent.
    """

    def __init__(self, root: str | Path, transform: Callable[[Image.Image], Any] | None = None):
        self.root = Path(root).absolute()  # a later change of the working directory does not matter
        self.transform = transform
        self.file_names = self._read_file_names()
        self._soft_labels: np.ndarray | None = None
        if len(self.soft_labels) != len(self.file_names):
            raise InputError(
                f"{self.root}: soft_label.npy has {len(self.soft_labels)} rows, metadata.jsonl {len(self.file_names)}; "
                f"make it whole with: {self._command()}"
            )
        missing = next((name for name in self.file_names if not (self.root / name).is_file()), None)
        if missing is not None:
            raise InputError(f"{self.root}: {missing} is missing; make it whole with: {self._command()}")

    @property
    def soft_labels(self) -> np.ndarray:
        """All soft labels: float32, (items, num_classes), memory-mapped and read-only."""
        if self._soft_labels is None:
            try:
                labels = np.load(self.root / "soft_label.npy", mmap_mode="r", allow_pickle=False)
                if labels.ndim != 2:
                    raise ValueError(f"its shape is {labels.shape}")
            except Exception as error:  # a damaged header fails in many ways, and each means the same
                raise InputError(f"{self.root}: soft_label.npy is damaged; mend with: {self._command()}") from error
            self._soft_labels = labels
        return self._soft_labels

    @property
    def num_classes(self) -> int:
        return int(self.soft_labels.shape[1])

    def __len__(self) -> int:
        return len(self.file_names)

    def __getitem__(self, index: int) -> tuple[Any, torch.Tensor]:
        with Image.open(self.root / self.file_names[index]) as file:
            image = file.convert("RGB")
        label = torch.from_numpy(np.array(self.soft_labels[index]))
        return (image if self.transform is None else self.transform(image)), label

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_soft_labels": None}  # a worker maps the file itself

    def _read_file_names(self) -> list[str]:
        run = self._read_run()
        metadata = self.root / "metadata.jsonl"
        if not metadata.is_file() or not (self.root / "soft_label.npy").is_file():
            done = sum(1 for _ in (self.root / "image").glob("gen_*.png"))
            raise InputError(
                f"{self.root} is not complete, {done} of {run['num_aug']} items are done; go on with: {self._command()}"
            )
        try:
            with open(metadata, encoding="utf-8") as lines:
                return [json.loads(line)["file_name"] for line in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.root}: metadata.jsonl is damaged; mend with: {self._command()}") from error

    def _read_run(self) -> dict[str, Any]:
        try:
            run: dict[str, Any] = json.loads((self.root / "run.json").read_text(encoding="utf-8"))
            if {"num_aug", "runs"} <= run.keys():
                return run
        except (OSError, ValueError, AttributeError):
            pass
        raise InputError(f"{self.root} holds no run.json of augmentation.py; it is no data set of ours")

    def _command(self) -> str:
        return shlex.join(self._read_run()["runs"][-1]["command"])


class MixedDataset(Dataset[tuple[Any, torch.Tensor]]):
    """Real pictures, each replaced by a random augmented one with a given probability, as in Diff-Mix's training.

    Args:
        real: a data set of (image, label), the label a class number or a soft label (num_classes,).
        augmented: a data set of (image, soft label), transformed as `real` is.
        probability: of an augmented item, 0 to 1.
        num_classes: to make class numbers one-hot.
        seed: decides what is replaced and by what. Item i's n-th draw is a function of (seed, i, n); draws are counted
            in shared memory, so epochs differ; neither workers nor shuffling change an epoch that has each item once.

    Item i is (image, soft label float32 (num_classes,)), so `torch.nn.functional.cross_entropy(logits, soft_labels)`
    takes every batch.

    Raises:
        ValueError: the probability lies outside 0 to 1, there is nothing to draw, or a label does not fit num_classes.
    """

    def __init__(
        self,
        real: Dataset[Any],
        augmented: Dataset[tuple[Any, torch.Tensor]],
        probability: float,
        num_classes: int,
        seed: int = 0,
    ):
        if not 0 <= probability <= 1:
            raise ValueError(f"`probability` has to lie within 0 to 1 but is {probability}.")
        if probability > 0 and not _length(augmented):
            raise ValueError("`augmented` is empty.")
        if getattr(augmented, "num_classes", num_classes) != num_classes:
            raise ValueError(f"`num_classes` is {num_classes} but the augmented labels have another number of classes.")
        self.real = real
        self.augmented = augmented
        self.probability = probability
        self.num_classes = num_classes
        self.seed = seed
        self._draws = torch.zeros(_length(real), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def __len__(self) -> int:
        return _length(self.real)

    def __getitem__(self, index: int) -> tuple[Any, torch.Tensor]:
        index = range(len(self))[index]  # counts a negative index from the end, refuses one outside
        rng = np.random.default_rng([self.seed, index, int(self._draws[index])])
        self._draws[index] += 1
        if rng.random() < self.probability:
            image, label = self.augmented[int(rng.integers(_length(self.augmented)))]
        else:
            image, label = self.real[index]
        return image, self._soften(label)

    def _soften(self, label_or_class: Any) -> torch.Tensor:
        label: torch.Tensor = torch.as_tensor(label_or_class)
        if label.ndim == 0 and not label.is_floating_point() and 0 <= label < self.num_classes:
            label = torch.nn.functional.one_hot(label.long(), self.num_classes)
        if label.shape != (self.num_classes,):
            raise ValueError(f"a label has to be a class below {self.num_classes} or that many shares but is {label}.")
        return label.float()


def _length(data_set: Dataset[Any]) -> int:
    assert isinstance(data_set, Sized)
    return len(data_set)

"""soft_label.npy and metadata.jsonl: one row for each item, written from the plan and compared with it."""

import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from .files import atomic_file
from .plan import Item, Plan

PREFIXES = {"image": "gen", "mask": "mask"}  # of an item's files, by folder
LEAST_DIGITS = 4
ROWS_COMPARED = 1000
JSON_ENCODER = json.JSONEncoder(ensure_ascii=False)


def count_digits(num_items: int) -> int:
    """Return how many digits the file names of a data set have, so that they sort in row order."""
    return max(LEAST_DIGITS, len(str(num_items - 1)))


def item_file_name(part: str, index: int, num_items: int) -> str:
    """Return "image/gen_0007.png" or "mask/mask_0007.png"."""
    return f"{part}/{PREFIXES[part]}_{index:0{count_digits(num_items)}d}.png"


class LabelFiles:
    """The two files in the folder of a data set; see OutputFolder for the arguments."""

    def __init__(self, root: Path, plan: Plan, num_items: int, class_names: Sequence[str]):
        self.labels, self.metadata = root / "soft_label.npy", root / "metadata.jsonl"
        self._plan, self._num_items, self._class_names = plan, num_items, class_names
        header = io.BytesIO()
        shape = (num_items, len(class_names))
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
        self._header = header.getvalue()

    def are_as_planned(self, every_row: bool = False) -> bool:
        """Return whether both files are there and agree with the plan.

        Args:
            every_row: compare every row; otherwise at most 1,000 evenly spaced ones.
        """
        count = self._num_items if every_row else min(self._num_items, ROWS_COMPARED)
        compared = set(np.linspace(0, self._num_items - 1, count).astype(int).tolist())
        row_size = 4 * len(self._class_names)
        try:
            with open(self.labels, "rb") as labels, open(self.metadata, "rb") as metadata:
                size = os.fstat(labels.fileno()).st_size
                if (
                    size != len(self._header) + row_size * self._num_items
                    or labels.read(len(self._header)) != self._header
                ):
                    return False
                num_lines = 0
                for num_lines, line in enumerate(metadata, start=1):
                    if (index := num_lines - 1) in compared:
                        item = self._plan.item(index)
                        labels.seek(len(self._header) + row_size * index)
                        if line != self._metadata_line(item) or labels.read(row_size) != self._label_row(item):
                            return False
        except FileNotFoundError:
            return False
        return num_lines == self._num_items

    def write(self, check: Callable[[], None] = lambda: None) -> None:
        """Write both, row by row; soft_label.npy gets its name last. For `check` see `atomic_file`."""
        with atomic_file(self.labels, check) as labels, atomic_file(self.metadata, check) as metadata:
            labels.write(self._header)
            for item in self._plan.items(self._num_items):
                labels.write(self._label_row(item))
                metadata.write(self._metadata_line(item))

    def delete(self) -> None:
        """Delete both, so that the data set is no longer complete."""
        for file in (self.labels, self.metadata):
            file.unlink(missing_ok=True)

    def _label_row(self, item: Item) -> bytes:
        return item.soft_label(len(self._class_names)).astype("<f4").tobytes()

    def _metadata_line(self, item: Item) -> bytes:
        content = {
            "file_name": item_file_name("image", item.index, self._num_items),
            "mask_file_name": item_file_name("mask", item.index, self._num_items),
            "target_label": item.target,
            "target_name": self._class_names[item.target],
            "aug_label": item.aug,
            "aug_name": self._class_names[item.aug],
            "ratio": item.ratio,
            "box": item.box,
            "seed": item.noise_seed,
        }
        return f"{JSON_ENCODER.encode(content)}\n".encode()

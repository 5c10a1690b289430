"""The output folder of a data set: which run may write into it, what is missing, and how it is completed."""

import contextlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import InputError, RunError
from .files import decode_png, hold_folder, write_png
from .items import PARTS, ItemFiles
from .labels import LabelFiles
from .plan import Item, Plan
from .preview import MOST_PICTURES, draw_preview
from .record import Record, describe_differences

WRITTEN = r"(gen|mask)_\d+\.png|preview\.png|run\.json|metadata\.jsonl|soft_label\.npy"
TEMPORARY = re.compile(rf"\.({WRITTEN})\.[0-9a-f]{{32}}\.tmp")
LONGEST_DELAY = 20  # seconds until a change shows on another machine of a shared file system


class OutputFolder:
    """The folder of a data set.

    `run.json` records how it is made. Where an image exists, its mask does, too; `soft_label.npy` and `metadata.jsonl`
    exist only once all items do. A run calls, in this order:

    1. `held`: the main process locks the folder, or refuses it;
    2. `has_planned_labels`, `has_whole_files`: is the data set complete already?
    3. `begin`: the main process records the run and removes what an earlier one left unfinished;
    4. `join`: every process waits until it sees that record;
    5. `mend`: damaged files are deleted, and the missing items are found;
    6. `write`, item by item;
    7. `finish`: the main process writes preview, metadata and labels.

    Args:
        root: the folder.
        plan: determines the items.
        num_items: the number of items.
        class_names: in label order.
    """

    def __init__(self, root: Path, plan: Plan, num_items: int, class_names: Sequence[str]):
        self.root = root
        self.plan = plan
        self.num_items = num_items
        self.class_names = class_names
        self.identity = ""  # of the run that writes here
        self._run_file = root / "run.json"
        self._run_file_content = b""
        self.items = ItemFiles(root, plan, num_items)
        self._labels = LabelFiles(root, plan, num_items, class_names)

    @contextlib.contextmanager
    def held(self, options: dict[str, Any], overwrite: bool) -> Iterator[None]:
        """Lock the folder, and create it if needed; a new folder is removed again if nothing is written into it.

        Args:
            options: all that determines the data, as JSON values; they must equal those of an earlier run here.
            overwrite: the files of an earlier run will be deleted, so its options do not matter.

        Raises:
            InputError: another run has locked the folder, it was made with other options, or not by this program.
        """
        self._check_usable(options, overwrite)
        with hold_folder(self.root):
            self._check_usable(options, overwrite)  # another run may have written before the lock was taken
            yield

    def has_planned_labels(self, every_row: bool = False) -> bool:
        """Return whether the preview is there, and labels and metadata agree with the plan; see `LabelFiles`."""
        return (self.root / "preview.png").is_file() and self._labels.are_as_planned(every_row)

    def has_whole_files(self, indices: np.ndarray, every_pixel: bool = False) -> bool:
        """Return whether each of these items has a whole image and a whole mask; see `ItemFiles`."""
        return all(self.items.find_whole(part, indices, every_pixel).all() for part in PARTS)

    def begin(self, options: dict[str, Any], run: dict[str, Any], overwrite: bool = False) -> None:
        """Record this run in run.json, then remove what an interrupted or overwritten run left.

        After an interruption at any moment the same command can continue: the record is written first, and says whether
        items of an overwritten data set may still be there. No process of an earlier run can finish a file afterwards:
        its temporary file is deleted, or it checks the record before it renames the file.

        Args:
            options: see `held`.
            run: further information on this run, as JSON values; `command` continues it.
            overwrite: delete the items of an earlier run.
        """
        earlier = Record.read(self._run_file)
        runs = [] if earlier is None or overwrite else earlier.runs
        runs += [] if run in runs else [run]
        is_cleared = earlier is None or (earlier.is_cleared and not overwrite)
        record = Record(self.num_items, options, runs, is_cleared)
        self.identity = record.identity
        record.write(self._run_file)
        for folder in (self.root, *(self.root / part for part in PARTS)):
            folder.mkdir(exist_ok=True)
            for entry in os.scandir(folder):
                if TEMPORARY.fullmatch(entry.name):
                    os.unlink(entry)
        self._labels.delete()
        if not record.is_cleared:
            self.items.delete()
            (self.root / "preview.png").unlink(missing_ok=True)
            record.is_cleared = True
            record.write(self._run_file)
        self.items.rename()
        self._run_file_content = self._run_file.read_bytes()

    def join(self, identity: str) -> None:
        """Wait until this process sees the main process's record in the folder.

        Raises:
            InputError: it does not see it within 20 seconds, so it is not the same folder.
        """
        end = time.monotonic() + LONGEST_DELAY
        while (record := Record.read(self._run_file)) is None or record.identity != identity:
            if time.monotonic() > end:
                raise InputError(
                    f"`output_dir`: {self.root} is not the folder of the main process; "
                    "all machines of a launch need one shared folder"
                )
            time.sleep(0.5)
        self.identity = identity
        self._run_file_content = self._run_file.read_bytes()

    def mend(self, indices: np.ndarray, every_pixel: bool = False) -> np.ndarray:
        """Delete damaged images, write missing masks again, and return the indices without an image, int64."""
        has_image = self.items.find_whole("image", indices, every_pixel)
        has_mask = self.items.find_whole("mask", indices, every_pixel)
        for index in indices[~has_image].tolist():
            self.items.path("image", index).unlink(missing_ok=True)
        for index in indices[has_image & ~has_mask].tolist():
            self.items.write_mask(self.plan.item(index), self._check_still_held)
        missing: np.ndarray = indices[~has_image]
        return missing

    def write(self, item: Item, image: Image.Image) -> None:
        """Write the mask, then the image.

        Raises:
            RunError: another run has begun in the folder.
        """
        self.items.write_mask(item, self._check_still_held)
        write_png(self.items.path("image", item.index), image, check=self._check_still_held)

    def finish(self) -> None:
        """Write preview.png, metadata.jsonl and, last, soft_label.npy, which completes the data set.

        Raises:
            RunError: an item is missing, or another run has begun in the folder.
        """
        for part in PARTS:
            if missing := self.items.find_missing(part):
                raise RunError(f"{missing} is not there; the same command continues")
        items = [self.plan.item(index) for index in range(min(self.num_items, MOST_PICTURES))]
        images = [self._read_image(item.index) for item in items]
        preview = draw_preview(images, items, self.class_names)
        write_png(self.root / "preview.png", preview, check=self._check_still_held)
        self._labels.write(self._check_still_held)

    def describe_progress(self, overwrite: bool = False) -> str:
        """Return "7 of 20 items are done", or "" where this run is to overwrite another and has not begun yet."""
        record = Record.read(self._run_file)
        if overwrite and (record is None or record.identity != self.identity):
            return ""
        is_cleared = record is None or record.is_cleared
        count = sum(1 for index, _ in self.items.scan("image") if index < self.num_items) if is_cleared else 0
        return f"{count} of {self.num_items} items are done"

    def _read_image(self, index: int) -> Image.Image:
        image = decode_png(self.items.path("image", index))
        if image is None:
            raise RunError(f"{self.items.path('image', index)} is damaged; the same command with `verify` continues")
        return image

    def _check_still_held(self) -> None:
        if self._run_file.read_bytes() != self._run_file_content:
            raise RunError(f"another run has taken {self.root}; this one stops")

    def _check_usable(self, options: dict[str, Any], overwrite: bool) -> None:
        """Raise an InputError if a run with these options must not write into the folder."""
        record = Record.read(self._run_file)
        for part in PARTS:
            for _ in self.items.scan(part):  # raises an InputError for a folder in the place of a file
                pass
        if record is None:
            foreign = [file for file in (self._labels.metadata, self._labels.labels) if file.exists()]
            foreign += [file for part in PARTS for file in (self.root / part).glob("[!.]*")]
            if foreign:
                raise InputError(f"`output_dir`: {foreign[0]} is not from this program; choose another folder")
        elif not overwrite:
            differences = describe_differences(record.options, options)
            if differences:
                raise InputError(
                    f"`output_dir`: {self.root} was made with another {differences}; "
                    "give the same, another folder, or `overwrite`"
                )
            if record.num_aug > self.num_items:
                raise InputError(
                    f"`num_aug`: {self.root} is planned for {record.num_aug} items, {self.num_items} is fewer; "
                    "ask for at least as many, or another folder"
                )

"""The output folder of a data set. Any number of processes fill it at once, and need not know of each other.

Every file is a pure function of the options and its index, is written under another name and then renamed, and each
picture holds a hash of the options and its index in its first bytes. So a process only adds files that are missing or
are not those that it would write. What it does not see, because of a crash, a cache or another process, costs time and
nothing else.
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from .errors import InputError, RunError
from .files import (
    atomic_file,
    create_file,
    decode_png,
    delete_old_temporary_files,
    first_bytes_of_png,
    has_ends_of_png,
    write_png,
)
from .plan import Item, Plan
from .preview import MOST_PICTURES, draw_preview
from .record import (
    LABELS_FILE,
    METADATA_FILE,
    PREFIXES,
    PREVIEW_FILE,
    RUN_FILE,
    Record,
    count_digits,
    describe_differences,
    item_file_name,
)

MODES = {"image": "RGB", "mask": "L"}  # of the pictures, by folder
LOOKED_AT_ONCE = 1000  # items
ROWS_COMPARED = 1000
JSON_ENCODER = json.JSONEncoder(ensure_ascii=False)


class OutputFolder:
    """The folder of a data set: run.json, images, masks, and, once all are there, preview, metadata and labels.

    Args:
        root: the folder.
        plan: determines the items.
        num_items: the number of items.
        class_names: in label order.
        options: all that the data depend on, as JSON values.
    """

    def __init__(self, root: Path, plan: Plan, num_items: int, class_names: Sequence[str], options: dict[str, Any]):
        self.root, self.plan, self.num_items, self.class_names = root, plan, num_items, class_names
        self._options = json.loads(json.dumps(options))
        self._mark = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]
        self._run_file, self._labels, self._metadata = (root / name for name in (RUN_FILE, LABELS_FILE, METADATA_FILE))
        header = io.BytesIO()
        shape = (num_items, len(class_names))
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
        self._header = header.getvalue()

    def check_usable(self) -> None:
        """Check that a data set with these options may be drawn into the folder.

        Raises:
            InputError: the folder holds foreign files, or a data set of other options or of more items.
        """
        # looked for first, since a process that begins writes run.json first
        foreign = [file for file in (self._metadata, self._labels) if file.exists()]
        foreign += [file for part in PREFIXES for file in (self.root / part).glob("[!.]*")]
        record = Record.read(self._run_file)
        if record is None:
            if foreign:
                raise InputError(f"`output_dir`: {foreign[0]} is not from this program; choose another folder")
            return
        if not record.has_marks:
            raise InputError(
                f"`output_dir`: {self.root} holds a data set of an earlier version, which can be read but not "
                "continued; choose another folder"
            )
        differences = describe_differences(record.options, self._options)
        if differences:
            raise InputError(
                f"`output_dir`: {self.root} was made with another {differences}; "
                "give the same options, choose another folder, or delete this one"
            )
        num_items = max(record.num_aug, self._count_labels())
        if num_items > self.num_items:
            raise InputError(
                f"`num_aug`: {self.root} is planned for {num_items} items; ask for at least as many, or choose another "
                "folder"
            )
        digits = count_digits(record.num_aug)
        if digits < count_digits(self.num_items):
            raise InputError(
                f"`num_aug`: the file names in {self.root} have {digits} digits, which is enough for {10**digits} "
                "items; choose another folder for more"
            )

    def begin(self, run: dict[str, Any]) -> bool:
        """Create the folder and run.json, unless another process has created it; return whether this one has.

        Args:
            run: what run.json records beside the options, as JSON values; `command` continues the data set.

        Raises:
            InputError: another process has just created the folder, with other options.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        content = {"num_aug": self.num_items, "options": self._options, **run}
        is_new = create_file(self._run_file, json.dumps(content, indent=2, ensure_ascii=False).encode())
        self._run_file_content = self._run_file.read_bytes()
        self._run_file_status = self._read_status()
        self.check_usable()
        for part in PREFIXES:
            (self.root / part).mkdir(exist_ok=True)
        return is_new

    def find_missing(self, indices: Sequence[int], every_pixel: bool = False) -> list[int]:
        """Return the items of which a file is missing, incomplete, or not the one that this data set would have.

        Args:
            indices: the items to look at.
            every_pixel: decode each file, and compare each mask. Otherwise only the first and last bytes are read. They
                show an incomplete file, since files are synced before they get their name.

        Raises:
            OSError: a file cannot be read.
        """

        def look(some: Sequence[int]) -> list[int]:
            return [i for i in some if not all(self._is_whole(part, i, every_pixel) for part in PREFIXES)]

        chunks = [indices[start : start + LOOKED_AT_ONCE] for start in range(0, len(indices), LOOKED_AT_ONCE)]
        if len(chunks) == 1:
            return look(indices)
        missing: list[int] = []
        with ThreadPoolExecutor() as pool, tqdm(total=len(chunks), desc="checking files", leave=False, delay=2) as bar:
            for found in pool.map(look, chunks):
                missing += found
                bar.update()
        return missing

    def write(self, item: Item, image: Image.Image) -> None:
        """Write the mask and the image of an item.

        Raises:
            RunError: run.json has disappeared or changed.
        """
        for part, picture in (("mask", item.mask()), ("image", image)):
            self._check_still_ours()
            write_png(self._path(part, item.index), picture, self._comment(item.index))

    def is_complete(self, every_pixel: bool = False) -> bool:
        """Return whether labels, metadata and preview are there and agree with the plan, and no item is missing.

        Args:
            every_pixel: compare every row and every pixel; otherwise at most 1,000 evenly spaced rows.
        """
        return (
            (self.root / PREVIEW_FILE).is_file()
            and self._has_planned_labels(self.num_items if every_pixel else min(self.num_items, ROWS_COMPARED))
            and not self.find_missing(range(self.num_items), every_pixel)
        )

    def finish(self) -> None:
        """Write preview, metadata and, last, labels. Several processes may do so at once: they write the same bytes.

        Raises:
            RunError: run.json has disappeared or changed, or a picture of the preview is damaged.
        """
        self._check_still_ours()
        if self._count_labels() > self.num_items:  # another process has continued the data set
            return
        items = list(self.plan.items(min(self.num_items, MOST_PICTURES)))
        images = []
        for item in items:
            file = self._path("image", item.index)
            image = decode_png(file)
            if image is None:
                raise RunError(f"{file} is damaged; the same command with `verify` draws it again")
            images.append(image)
        write_png(self.root / PREVIEW_FILE, draw_preview(images, items, self.class_names), self._mark)
        with atomic_file(self._labels) as labels, atomic_file(self._metadata) as metadata:
            labels.write(self._header)
            for item in self.plan.items(self.num_items):
                labels.write(self._label_row(item))
                metadata.write(self._metadata_line(item))
            self._check_still_ours()
        for folder in (self.root, *(self.root / part for part in PREFIXES)):
            delete_old_temporary_files(folder)

    def _path(self, part: str, index: int) -> Path:
        return self.root / (item_file_name(part, self.num_items) % index)

    def _comment(self, index: int) -> str:
        return f"NoiseCutMix {self._mark}, item {index}"

    def _is_whole(self, part: str, index: int, every_pixel: bool) -> bool:
        file, side = self._path(part, index), self.plan.resolution
        if not has_ends_of_png(file, first_bytes_of_png(side, MODES[part], self._comment(index))):
            return False
        if not every_pixel:
            return True
        image = decode_png(file)
        return image is not None and (part == "image" or image.tobytes() == self.plan.item(index).mask().tobytes())

    def _read_status(self) -> tuple[int, int]:
        status = self._run_file.stat()
        return status.st_ino, status.st_mtime_ns

    def _check_still_ours(self) -> None:
        """Raise a RunError if run.json is not the one that this process began with."""
        try:
            status = self._read_status()
            if status == self._run_file_status:
                return
            if self._run_file.read_bytes() == self._run_file_content:  # some file systems change the inode number
                self._run_file_status = status
                return
        except FileNotFoundError:
            pass
        raise RunError(
            f"{self._run_file} was deleted or replaced while this run was drawing, so it stops; run the same command "
            "again to draw into the folder"
        )

    def _count_labels(self) -> int:
        """Return the number of rows of soft_label.npy, 0 where it is missing or damaged."""
        with contextlib.suppress(Exception):  # numpy raises many kinds of errors for a damaged header
            return len(np.load(self._labels, mmap_mode="r", allow_pickle=False))
        return 0

    def _has_planned_labels(self, num_compared: int) -> bool:
        """Return whether labels and metadata have all rows, and evenly spaced ones agree with the plan."""
        compared = set(np.linspace(0, self.num_items - 1, num_compared).astype(int).tolist())
        row_size = 4 * len(self.class_names)
        num_lines = 0
        try:
            with open(self._labels, "rb") as labels, open(self._metadata, "rb") as metadata:
                size = os.fstat(labels.fileno()).st_size
                if size != len(self._header) + row_size * self.num_items:
                    return False
                if labels.read(len(self._header)) != self._header:
                    return False
                for num_lines, line in enumerate(metadata, start=1):
                    if (index := num_lines - 1) in compared:
                        item = self.plan.item(index)
                        labels.seek(len(self._header) + row_size * index)
                        if line != self._metadata_line(item) or labels.read(row_size) != self._label_row(item):
                            return False
        except FileNotFoundError:
            return False
        return num_lines == self.num_items

    def _label_row(self, item: Item) -> bytes:
        return item.soft_label(len(self.class_names)).astype("<f4").tobytes()

    def _metadata_line(self, item: Item) -> bytes:
        content = {
            "file_name": item_file_name("image", self.num_items) % item.index,
            "mask_file_name": item_file_name("mask", self.num_items) % item.index,
            "target_label": item.target,
            "target_name": self.class_names[item.target],
            "aug_label": item.aug,
            "aug_name": self.class_names[item.aug],
            "ratio": item.ratio,
            "box": item.box,
            "seed": item.noise_seed,
        }
        return f"{JSON_ENCODER.encode(content)}\n".encode()

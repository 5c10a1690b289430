"""The output folder of a data set: its files, run.json, and what the data depend on.

Any number of processes fill it at once, and need not know of each other.

Every file is a pure function of the options and its index, is written under another name and then renamed, and each
picture holds a hash of the options and its index in its first bytes. So a process only adds files that are missing or
are not those that it would write. What it does not see, because of a crash, a cache or another process, costs time and
nothing else.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from . import files
from .classes import Classes
from .errors import InputError, RunError
from .plan import Item, Plan, seed_record
from .preview import MAX_PICTURES, draw_preview
from .sources import fingerprint_checkpoint, fingerprint_model

RUN_FILE, LABELS_FILE, METADATA_FILE, PREVIEW_FILE = "run.json", "soft_label.npy", "metadata.jsonl", "preview.png"
PREFIXES = {"image": "gen", "mask": "mask"}  # of an item's files, by folder
MIN_DIGITS = 4
MODES = {"image": "RGB", "mask": "L"}  # of the pictures, by folder
LOOKED_AT_ONCE = 1000  # items
ROWS_COMPARED = 1000
JSON_ENCODER = json.JSONEncoder(ensure_ascii=False)


def count_digits(num_items: int) -> int:
    """Return how many digits the file names of a data set have, so that they sort in row order."""
    return max(MIN_DIGITS, len(str(num_items - 1)))


def item_file_name(part: str, num_items: int) -> str:
    """Return "image/gen_%04d.png" or "mask/mask_%04d.png", to be filled in with the item's index."""
    return f"{part}/{PREFIXES[part]}_%0{count_digits(num_items)}d.png"


def read_run(folder: Path, option: str) -> dict[str, Any] | None:
    """Return the content of a data set's run.json, None if there is none. Raises InputError if it is damaged."""
    return files.read_record(folder / RUN_FILE, option, num_aug=int, options=dict)


def describe_data(flags: dict[str, Any], classes: Classes, model: str, ckpt_path: Path, dtype: str) -> dict[str, Any]:
    """Return all that the data depend on, as JSON values. A data set is continued only if all is the same.

    Args:
        flags: the values of all flags that may change the data.
        classes, model, ckpt_path, dtype: see `NoiseCutMixGenerator`.
    """
    return {
        **flags,
        **seed_record(flags["seed"]),
        "dtype": dtype,
        "meta_class": classes.meta_class,
        "class_names": list(classes.names),
        "model": fingerprint_model(model, prefers_half=dtype == "float16"),
        "checkpoint": fingerprint_checkpoint(ckpt_path),
    }


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
        self._run_file, self._labels, self._metadata = root / RUN_FILE, root / LABELS_FILE, root / METADATA_FILE
        self._run_file_content, self._run_file_status = b"", (0, 0)  # what `begin` finds there

    def check_usable(self) -> None:
        """Check that a data set with these options may be drawn into the folder.

        Raises:
            InputError: the folder holds foreign files, or a data set of other options or of more items.
        """
        # looked for first, since a process that begins writes run.json first
        foreign = [file for file in (self._metadata, self._labels) if file.exists()]
        foreign += [file for part in PREFIXES for file in (self.root / part).glob("[!.]*")]
        there = read_run(self.root, "output_dir")
        if there is None:
            if foreign:
                raise InputError(f"{foreign[0]} is not from this program; choose another folder", "output_dir")
            return
        if "runs" in there:
            reason = "is of an earlier version, which can be read but not continued"
            raise InputError(f"the data set in {self.root} {reason}; choose another folder", "output_dir")
        files.check_same(self.root, there["options"], self._options)
        fewest, most = max(there["num_aug"], len(self._read_labels())), 10 ** count_digits(there["num_aug"])
        if not fewest <= self.num_items <= most:
            reason = f"{self.root} is for {fewest} items, and its file names have room for {most}"
            raise InputError(f"{reason}; ask for {fewest} to {most}, or choose another folder", "num_aug")

    def begin(self, run: dict[str, Any]) -> bool:
        """Create the folder and run.json, unless another process has created it; return whether this one has.

        Args:
            run: what run.json records beside the options, as JSON values; see `files.describe_program`.

        Raises:
            InputError: another process has just created the folder, with other options.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        content = {"num_aug": self.num_items, "options": self._options, **run}
        is_new = files.create_file(self._run_file, json.dumps(content, indent=2).encode())
        self._run_file_content = self._run_file.read_bytes()
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
        with ThreadPoolExecutor() as pool:
            found = tqdm(pool.map(look, chunks), "checking files", len(chunks), leave=False, delay=2)
            return [index for some in found for index in some]

    def write(self, item: Item, image: Image.Image) -> None:
        """Write the mask and the image of an item.

        Raises:
            RunError: run.json has disappeared or changed.
        """
        for part, picture in (("mask", item.mask()), ("image", image)):
            self._check_still_ours()
            files.write_png(self._path(part, item.index), picture, self._comment(item.index))

    def is_complete(self, every_pixel: bool = False) -> bool:
        """Return whether labels, metadata and preview are there and agree with the plan, and no item is missing.

        Args:
            every_pixel: compare every row and every pixel; otherwise at most 1,000 evenly spaced rows.
        """
        num_compared = self.num_items if every_pixel else min(self.num_items, ROWS_COMPARED)
        is_finished = (self.root / PREVIEW_FILE).is_file() and self._has_planned_labels(num_compared)
        return is_finished and not self.find_missing(range(self.num_items), every_pixel)

    def finish(self) -> None:
        """Write preview, metadata and, last, labels. Several processes may do so at once: they write the same bytes.

        Raises:
            RunError: run.json has disappeared or changed, or a picture of the preview is damaged.
        """
        self._check_still_ours()
        if len(self._read_labels()) > self.num_items:  # another process has continued the data set
            return
        self._write_preview()
        with files.atomic_file(self._labels) as labels, files.atomic_file(self._metadata) as metadata:
            shape = (self.num_items, len(self.class_names))
            np.lib.format.write_array_header_1_0(labels, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for item in self.plan.items(self.num_items):
                labels.write(self._label_row(item))
                metadata.write(self._metadata_line(item))
            self._check_still_ours()

    def write_early_preview(self) -> None:
        """Write the preview once its pictures are there, so that one can look at a long run; then do nothing."""
        is_there = (self.root / PREVIEW_FILE).exists()
        if not is_there and not self.find_missing(range(min(self.num_items, MAX_PICTURES))):
            self._write_preview()

    def _write_preview(self) -> None:
        items = list(self.plan.items(min(self.num_items, MAX_PICTURES)))
        images = []
        for item in items:
            file = self._path("image", item.index)
            image = files.decode_png(file)
            if image is None:
                self._check_still_ours()
                raise RunError(f"{file} is damaged; the same command with --verify draws it again")
            images.append(image)
        files.write_png(self.root / PREVIEW_FILE, draw_preview(images, items, self.class_names), self._mark)

    def _path(self, part: str, index: int) -> Path:
        return self.root / (item_file_name(part, self.num_items) % index)

    def _comment(self, index: int) -> str:
        return f"NoiseCutMix {self._mark}, item {index}"

    def _is_whole(self, part: str, index: int, every_pixel: bool) -> bool:
        file, side = self._path(part, index), self.plan.resolution
        first_bytes = files.first_bytes_of_png(side, MODES[part], self._comment(index))
        if not files.has_ends(file, first_bytes, files.PNG_END):
            return False
        if not every_pixel:
            return True
        image = files.decode_png(file)
        return image is not None and (part == "image" or image.tobytes() == self.plan.item(index).mask().tobytes())

    def _check_still_ours(self) -> None:
        """Raise a RunError if run.json is not the one that this process began with."""
        with contextlib.suppress(FileNotFoundError):
            status = self._run_file.stat()
            seen = (status.st_ino, status.st_mtime_ns)  # to read the file for each item would take long
            if seen == self._run_file_status or self._run_file.read_bytes() == self._run_file_content:
                self._run_file_status = seen
                return
        raise RunError(f"{self._run_file} was deleted or replaced meanwhile; run the same command again")

    def _read_labels(self) -> np.ndarray:
        """Return soft_label.npy, mapped into memory; no rows where it is missing or damaged."""
        with contextlib.suppress(Exception):  # numpy raises many kinds of errors for a damaged header
            return np.atleast_2d(np.load(self._labels, mmap_mode="r", allow_pickle=False))
        return np.empty((0, 0))

    def _has_planned_labels(self, num_compared: int) -> bool:
        """Return whether labels and metadata have all rows, and evenly spaced ones agree with the plan."""
        labels = self._read_labels()
        if labels.shape != (self.num_items, len(self.class_names)) or not self._metadata.is_file():
            return False
        compared = set(np.linspace(0, self.num_items - 1, num_compared).astype(int).tolist())
        num_lines = 0
        with open(self._metadata, "rb") as metadata:
            for num_lines, line in enumerate(metadata, start=1):
                if (index := num_lines - 1) in compared:
                    item = self.plan.item(index)
                    if line != self._metadata_line(item) or labels[index].tobytes() != self._label_row(item):
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

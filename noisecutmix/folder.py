"""The output folder: what is in it, what is missing, labels and metadata."""

import contextlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

from . import __version__
from .cutmix import draw_mask
from .errors import InputError, RunError
from .files import atomic_file, write_png
from .plan import Item, Plan
from .preview import MOST_PICTURES, draw_preview
from .record import describe_differences

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "numpy", "pillow")
PARTS = {"image": "gen", "mask": "mask"}  # folder: prefix of its files
MODES = {"image": "RGB", "mask": "L"}
WRITTEN = r"(gen|mask)_\d+\.png|preview\.png|run\.json|metadata\.jsonl|soft_label\.npy"
TEMPORARY = re.compile(rf"\.({WRITTEN})\.[0-9a-f]{{32}}\.tmp")
SCANNED_AT_ONCE = 1000
JSON_ENCODER = json.JSONEncoder(ensure_ascii=False)


class OutputFolder:
    """A data set's folder.

    `run.json` tells how it is made. An image's presence means that its item is whole; `soft_label.npy` and
    `metadata.jsonl` are there once all items are.

    Args:
        root: the folder.
        plan: what the items are.
        num_items: how many.
        class_names: in label order.
    """

    def __init__(self, root: Path, plan: Plan, num_items: int, class_names: Sequence[str]):
        self.root = root
        self.plan = plan
        self.num_items = num_items
        self.class_names = class_names
        self._digits = max(4, len(str(num_items - 1)))
        self.has_begun = False
        self._lock = FileLock(root / ".lock", timeout=0)

    def image_file(self, index: int) -> Path:
        return self._file("image", index)

    def mask_file(self, index: int) -> Path:
        return self._file("mask", index)

    def take(self, options: dict[str, Any], overwrite: bool) -> None:
        """Lock the folder for this run, or refuse another run's and one that was made with other options.

        Nothing else is changed before `begin`.

        Args:
            options: all that shapes the data, as JSON values; they must equal those of an earlier run here.
            overwrite: an earlier run's files are to be deleted, so its options do not matter.

        Raises:
            InputError: the folder cannot be taken.
        """
        self._read_earlier_run(options, overwrite)
        self._is_new = not self.root.exists()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise InputError(
                f"--output_dir: another run is writing into {self.root}; wait or choose another"
            ) from error
        except OSError as error:
            raise InputError(f"--output_dir: {self.root} cannot be written: {error.strerror}") from error
        # once more: what another run wrote between the look and the lock
        self._earlier = self._read_earlier_run(options, overwrite)
        self._options, self._overwrite = options, overwrite

    def begin(self, run: dict[str, Any]) -> None:
        """Clear away what is not whole, or all of an earlier run, and write run.json.

        Args:
            run: what else is worth knowing of this run, as JSON values; `command` is what goes on with it.
        """
        self.has_begun = True
        for name in ("soft_label.npy", "metadata.jsonl"):  # take back the word that the data set is complete
            (self.root / name).unlink(missing_ok=True)
        if self._earlier and self._overwrite:
            self._delete_earlier_run()
        for folder in (self.root, *(self.root / part for part in PARTS)):
            folder.mkdir(exist_ok=True)
            for entry in os.scandir(folder):
                if TEMPORARY.fullmatch(entry.name):
                    os.unlink(entry)
        run = {**run, "versions": {"noisecutmix": __version__, **{name: version(name) for name in LIBRARIES}}}
        runs = [] if self._overwrite else self._earlier.get("runs", [])
        if run not in runs:
            runs.append(run)
        content = {"num_aug": self.num_items, "options": self._options, "runs": runs}
        with atomic_file(self.root / "run.json") as run_file:
            run_file.write(json.dumps(content, indent=2, ensure_ascii=False).encode())

    def close(self) -> None:
        """Release the lock; a folder made for this run goes again where nothing was written into it."""
        if not self._lock.is_locked:
            return
        self._lock.release()
        with contextlib.suppress(OSError):
            if self._is_new and [file.name for file in self.root.iterdir()] == [".lock"]:
                (self.root / ".lock").unlink()
                self.root.rmdir()

    def is_complete(self) -> bool:
        """Return whether labels and metadata are as planned for this many items, preview and whole pictures there."""
        shape = (self.num_items, len(self.class_names))
        try:
            labels = np.load(self.root / "soft_label.npy", mmap_mode="r", allow_pickle=False)
            with open(self.root / "metadata.jsonl", "rb") as metadata:
                is_told_as_planned = (
                    (self.root / "preview.png").is_file()
                    and labels.shape == shape
                    and all(
                        np.array_equal(label, item.soft_label(shape[1])) and line == self._metadata_line(item)
                        for item, label, line in zip(self.plan.items(self.num_items), labels, metadata, strict=True)
                    )
                )
        except Exception:  # not there, of another length, or damaged, which numpy tells in many ways
            return False
        return is_told_as_planned and all(self._find_whole(part).all() for part in PARTS)

    def find_missing(self) -> np.ndarray:
        """Return the indices of items without a whole image, int64, and delete damaged ones; write missing masks."""
        has_image = self._find_whole("image")
        for index, file in self._planned("image"):
            if not has_image[index]:
                file.unlink()
        for index in np.flatnonzero(has_image & ~self._find_whole("mask")).tolist():
            self._write_mask(self.plan.item(index))
        return np.flatnonzero(~has_image)

    def count_done(self) -> int:
        """Return how many items are there, by their images."""
        return sum(1 for _ in self._planned("image"))

    def write(self, item: Item, image: Image.Image) -> None:
        """Write the mask, then the image."""
        self._write_mask(item)
        write_png(self.image_file(item.index), image)

    def finish(self) -> None:
        """Write preview.png, metadata.jsonl and, last, soft_label.npy: the data set is complete.

        Raises:
            RunError: an item is not there.
        """
        for part in PARTS:
            is_there = np.zeros(self.num_items, dtype=bool)
            for index, _ in self._planned(part):
                is_there[index] = True
            if not is_there.all():
                raise RunError(f"{self._file(part, int(is_there.argmin()))} is not there; the same command goes on")
        items = [self.plan.item(index) for index in range(min(self.num_items, MOST_PICTURES))]
        images = [Image.open(self.image_file(item.index)) for item in items]
        write_png(self.root / "preview.png", draw_preview(images, items, self.class_names))
        self.write_labels_and_metadata()

    def write_labels_and_metadata(self) -> None:
        """Write both from the plan, row by row."""
        num_classes = len(self.class_names)
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.num_items, num_classes)}
        with atomic_file(self.root / "soft_label.npy") as labels, atomic_file(self.root / "metadata.jsonl") as metadata:
            np.lib.format.write_array_header_1_0(labels, header)
            for item in self.plan.items(self.num_items):
                labels.write(item.soft_label(num_classes).astype("<f4").tobytes())
                metadata.write(self._metadata_line(item))

    def _file(self, part: str, index: int) -> Path:
        return self.root / self._name(part, index)

    def _name(self, part: str, index: int) -> str:
        return f"{part}/{PARTS[part]}_{index:0{self._digits}d}.png"

    def _metadata_line(self, item: Item) -> bytes:
        content = {
            "file_name": self._name("image", item.index),
            "mask_file_name": self._name("mask", item.index),
            "target_label": item.target,
            "target_name": self.class_names[item.target],
            "aug_label": item.aug,
            "aug_name": self.class_names[item.aug],
            "ratio": item.ratio,
            "box": item.box,
            "seed": item.noise_seed,
        }
        return f"{JSON_ENCODER.encode(content)}\n".encode()

    def _write_mask(self, item: Item) -> None:
        side = self.plan.resolution
        write_png(self.mask_file(item.index), draw_mask(item.box, side, side))

    def _read_earlier_run(self, options: dict[str, Any], overwrite: bool) -> dict[str, Any]:
        """Return the earlier run.json, empty where there is none, or refuse the folder."""
        run_file = self.root / "run.json"
        if not run_file.exists():
            ours = [self.root / "metadata.jsonl", self.root / "soft_label.npy"]
            foreign = [file for file in ours if file.exists()]
            foreign += [file for part in PARTS for file in (self.root / part).glob("[!.]*")]
            if foreign:
                raise InputError(f"--output_dir: {foreign[0]} is not from this program; choose another folder")
            return {}
        try:
            earlier: dict[str, Any] = json.loads(run_file.read_text(encoding="utf-8"))
            earlier_options, earlier_num_aug = dict(earlier["options"]), int(earlier["num_aug"])
            list(earlier["runs"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"--output_dir: {run_file} is not from this program; choose another folder") from error
        if overwrite:
            return earlier
        differences = describe_differences(earlier_options, options)
        if differences:
            raise InputError(
                f"--output_dir: {self.root} was made with another {differences}; "
                "give the same, another folder, or --overwrite"
            )
        if earlier_num_aug > self.num_items:
            raise InputError(
                f"--num_aug: {self.root} is planned for {earlier_num_aug} items, {self.num_items} is fewer; "
                "ask for at least as many, or another folder"
            )
        return earlier

    def _delete_earlier_run(self) -> None:
        """Delete what this program writes, and nothing else."""
        for part in PARTS:
            for _, file in self._scan(part):
                file.unlink()
        (self.root / "preview.png").unlink(missing_ok=True)
        (self.root / "run.json").unlink()

    def _scan(self, part: str) -> Iterator[tuple[int, Path]]:
        """Yield (index, file) of this program's pictures, in no order."""
        pattern = re.compile(rf"{PARTS[part]}_(\d+)\.png")
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root / part) as entries:
            for entry in entries:
                match = pattern.fullmatch(entry.name)
                if match:
                    yield int(match[1]), Path(entry.path)

    def _planned(self, part: str) -> Iterator[tuple[int, Path]]:
        return (found for found in self._scan(part) if found[0] < self.num_items)

    def _find_whole(self, part: str) -> np.ndarray:
        """Return whose pictures are undamaged, bool (num_items,); names get this number of items' digits."""
        whole = np.zeros(self.num_items, dtype=bool)
        for index, file in self._planned(part):
            if file != self._file(part, index):
                os.replace(file, self._file(part, index))
        found = self._planned(part)
        bar = tqdm(desc=f"checking what is in {part}", unit="file", leave=False, delay=2)
        with ThreadPoolExecutor() as pool, bar:
            while some := list(itertools.islice(found, SCANNED_AT_ONCE)):
                indices, files = zip(*some)
                whole[list(indices)] = list(pool.map(self._is_whole, files, itertools.repeat(MODES[part])))
                bar.update(len(some))
        return whole

    def _is_whole(self, file: Path, mode: str) -> bool:
        side = self.plan.resolution
        content = file.read_bytes()  # a file that cannot be read is no damaged one: that stops the run
        try:
            Image.open(io.BytesIO(content)).verify()  # every chunk's checksum, to the last
            image = Image.open(io.BytesIO(content))
            image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return False
        return image.size == (side, side) and image.mode == mode

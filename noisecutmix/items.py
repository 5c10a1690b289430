"""The image and mask files of the items: their names, and whether they are whole."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .cutmix import draw_mask
from .errors import InputError
from .files import decode_png, first_bytes_of_png, has_ends_of_png, write_png
from .labels import LEAST_DIGITS, PREFIXES, item_file_name
from .plan import Item, Plan

PARTS = {"image": "RGB", "mask": "L"}  # folder: mode of its pictures
LOOKED_AT_ONCE = 1000


class ItemFiles:
    """The images and masks in the folder of a data set; see OutputFolder for the arguments.

    `part` is "image" or "mask". A mask's file has a comment with all that determines the mask, so that a mask of
    another plan is recognised.
    """

    def __init__(self, root: Path, plan: Plan, num_items: int):
        self.root, self.plan, self.num_items = root, plan, num_items

    def path(self, part: str, index: int) -> Path:
        return self.root / item_file_name(part, index, self.num_items)

    def write_mask(self, item: Item, check: Callable[[], None]) -> None:
        mask = draw_mask(item.box, item.resolution, item.resolution)
        write_png(self.path("mask", item.index), mask, self._comment("mask", item.index), check)

    def find_whole(self, part: str, indices: np.ndarray, every_pixel: bool = False) -> np.ndarray:
        """Return which of these items have a whole file: bool, (items,).

        Args:
            part: see above.
            indices: int64, (items,).
            every_pixel: decode each file. Otherwise only its first and last bytes are compared. They show an incomplete
                file, since files are synced before they get their name.

        Raises:
            OSError: a file is there and cannot be read.
        """

        def look(some: np.ndarray) -> list[bool]:
            return [self._is_whole(part, index, every_pixel) for index in some.tolist()]

        chunks = [indices[start : start + LOOKED_AT_ONCE] for start in range(0, len(indices), LOOKED_AT_ONCE)]
        whole: list[bool] = []
        bar = tqdm(total=len(indices), desc=f"checking what is in {part}", unit="file", leave=False, delay=2)
        with ThreadPoolExecutor() as pool, bar:
            for found in pool.map(look, chunks):
                whole += found
                bar.update(len(found))
        return np.array(whole, dtype=bool)

    def scan(self, part: str) -> Iterator[tuple[int, Path]]:
        """Yield (index, file) of all files with this program's names, of any number of digits, in no order.

        Raises:
            InputError: a folder has such a name, or `part` is not a folder.
        """
        pattern = re.compile(rf"{PREFIXES[part]}_([0-9]{{{LEAST_DIGITS},}})\.png")
        try:
            with os.scandir(self.root / part) as entries:
                for entry in entries:
                    match = pattern.fullmatch(entry.name)
                    if match and entry.is_dir(follow_symlinks=False):
                        raise InputError(f"`output_dir`: {entry.path} is a folder; move it away")
                    if match:
                        yield int(match[1]), Path(entry.path)
        except FileNotFoundError:
            return
        except NotADirectoryError:
            raise InputError(f"`output_dir`: {self.root / part} is not a folder; move it away") from None

    def find_missing(self, part: str) -> Path | None:
        """Return the first planned file that is not there, None if all are there; list the folder only once."""
        is_there = np.zeros(self.num_items, dtype=bool)
        is_there[[index for index, file in self.scan(part) if file == self.path(part, index)]] = True
        return None if is_there.all() else self.path(part, int(is_there.argmin()))

    def rename(self) -> None:
        """Add the missing digits to the file names of a run of fewer items. No file is replaced."""
        for part in PARTS:
            for index, file in list(self.scan(part)):
                name = self.path(part, index)
                if index < self.num_items and len(file.name) < len(name.name) and not name.exists():
                    os.rename(file, name)

    def delete(self) -> None:
        for part in PARTS:
            for _, file in self.scan(part):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file)

    def _comment(self, part: str, index: int) -> str:
        return f"seed {self.plan.seed}, item {index}, alpha {self.plan.alpha}" if part == "mask" else ""

    def _is_whole(self, part: str, index: int, every_pixel: bool) -> bool:
        file, side, mode = self.path(part, index), self.plan.resolution, PARTS[part]
        try:
            if not every_pixel and has_ends_of_png(file, first_bytes_of_png(side, mode, self._comment(part, index))):
                return True
            image = decode_png(file)
        except FileNotFoundError:
            return False
        if image is None or (image.mode, image.size) != (mode, (side, side)):
            return False
        return part == "image" or image.tobytes() == draw_mask(self.plan.item(index).box, side, side).tobytes()

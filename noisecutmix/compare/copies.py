"""Reduced copies of large photos, so that each is decoded once, whatever the rows, seeds, epochs and processes."""

import contextlib
import io
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .. import launch, script
from ..files import has_ends, write_file
from ..photos import Photos, read_size

MIN_RATIO = 1.5  # of a photo's shorter side to its copy's: smaller photos are used as they are
JPEG_OPTIONS = {"quality": 95, "subsampling": "4:2:0"}
JPEG_ENDS = b"\xff\xd8", b"\xff\xd9"


@dataclass(frozen=True)
class ReducedPhotos(Photos):
    """Photos of which the large ones are read from copies: JPEG files whose shorter side has `side` pixels.

    `copies[i]` is the copy of picture i, None where the picture itself is read. A copy that is missing or damaged is
    made again in memory, so the pictures are the same without it.
    """

    copies: tuple[Path | None, ...] = ()
    side: int = 0

    def open(self, index: int, min_side: int | None = None) -> Image.Image:
        copy = self.copies[index]
        if copy is None:
            return super().open(index, min_side)
        try:
            return Image.open(io.BytesIO(copy.read_bytes())).convert("RGB")
        except (OSError, SyntaxError, ValueError):
            return Image.open(io.BytesIO(self.encode(index))).convert("RGB")

    def encode(self, index: int) -> bytes:
        """Return the content of the copy of a picture."""
        photo, content = super().open(index, self.side), io.BytesIO()
        scale = self.side / min(photo.size)
        size = round(photo.width * scale), round(photo.height * scale)
        photo.resize(size, Image.Resampling.LANCZOS).save(content, "JPEG", **JPEG_OPTIONS)
        return content.getvalue()


def reduce_photos(photos: Photos, hashes: Sequence[str], folder: Path, side: int) -> ReducedPhotos:
    """Make the copies that no process has made yet, and return the photos with them.

    Args:
        photos: the pictures.
        hashes: the SHA-256 of each one, after which its copy is named.
        folder: of the copies, for all processes.
        side: the shorter side of a copy in pixels.

    Raises:
        InputError: a photo cannot be read any more.
    """
    from tqdm import tqdm

    def name_copy(file: Path, digest: str) -> Path | None:
        is_large = min(read_size(file)) >= MIN_RATIO * side
        return folder / f"{digest}_{side}_{photos.banner}.jpg" if is_large else None

    def make(index: int) -> None:
        copy = reduced.copies[index]
        if copy and not has_ends(copy, *JPEG_ENDS):  # another process may have made it by now
            with contextlib.suppress(FileNotFoundError):  # the others may have finished, and removed the folder
                write_file(copy, reduced.encode(index))

    pool = ThreadPoolExecutor()
    try:
        reduced = ReducedPhotos(**vars(photos), copies=tuple(pool.map(name_copy, photos.files, hashes)), side=side)
        missing = [index for index, copy in enumerate(reduced.copies) if copy and not has_ends(copy, *JPEG_ENDS)]
        if missing:
            folder.mkdir(exist_ok=True)
        random.Random().shuffle(missing)  # processes that begin at the same time make different ones
        shows = missing and launch.is_first_process()
        for _ in tqdm(pool.map(make, missing), "reducing photos", len(missing), unit="photo", disable=not shows):
            script.check_signals()
    finally:
        pool.shutdown(cancel_futures=True)
    return reduced

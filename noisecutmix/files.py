"""Files that are either whole or absent, written while the device draws; PNG files; the lock of a folder."""

import contextlib
import io
import os
import struct
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from PIL import Image
from PIL.PngImagePlugin import PngInfo, putchunk

from .errors import InputError

LOCK_TIMEOUT = 1  # seconds; without flock in the file system, the lock of a killed run is removed at the second try
PNG_COLOR_TYPES = {"L": 0, "RGB": 2}
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


@contextlib.contextmanager
def atomic_file(path: Path, check: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path` only once it is whole: written under a temporary name, synced, renamed.

    Args:
        path: the file.
        check: called just before the file is renamed; if it raises, `path` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # unique to this process
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check()
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)  # the error of a full disk names no file
        raise


def write_png(path: Path, image: Image.Image, comment: str = "", check: Callable[[], None] = lambda: None) -> None:
    """Write a PNG atomically, at zlib level 1: two to three times faster than Pillow's default.

    Args:
        path: the file.
        image: the picture.
        comment: an ASCII text that the file holds, too.
        check: see `atomic_file`.
    """
    chunks = PngInfo()
    if comment:
        chunks.add_text("Comment", comment)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1, pnginfo=chunks)
    with atomic_file(path, check) as file:
        file.write(buffer.getvalue())


def first_bytes_of_png(side: int, mode: str, comment: str = "") -> bytes:
    """Return the first bytes of a file of `write_png`: signature, header, comment (PNG specification, section 11)."""
    start = io.BytesIO()
    start.write(b"\x89PNG\r\n\x1a\n")
    putchunk(start, b"IHDR", struct.pack(">IIBBBBB", side, side, 8, PNG_COLOR_TYPES[mode], 0, 0, 0))
    if comment:
        putchunk(start, b"tEXt", b"Comment\0" + comment.encode())
    return start.getvalue()


def has_ends_of_png(file: Path, first_bytes: bytes) -> bool:
    """Return whether a file starts with these bytes and ends as a PNG does, that is, was written completely.

    Raises:
        OSError: it cannot be read, or is not there.
    """
    with open(file, "rb", buffering=0) as content:
        if content.read(len(first_bytes)) != first_bytes:
            return False
        content.seek(-len(PNG_END), os.SEEK_END)
        return content.read() == PNG_END


def decode_png(file: Path) -> Image.Image | None:
    """Return the picture of an undamaged PNG file, None where it is damaged or of another format.

    Raises:
        OSError: it cannot be read, or is not there.
    """
    content = file.read_bytes()
    try:
        Image.open(io.BytesIO(content), formats=["PNG"]).verify()  # the checksum of every chunk
        image = Image.open(io.BytesIO(content), formats=["PNG"])
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return image


class BackgroundWriter:
    """Threads that write one batch while the device draws the next.

    `submit` and leaving the context raise the error of a thread. Leaving waits until everything is written.
    """

    def __init__(self, write: Callable[..., None]):
        self._write = write
        self._pool = ThreadPoolExecutor(8)
        self._pending: Iterator[None] = iter(())

    def submit(self, *columns: Sequence[Any]) -> None:
        """Wait until the previous batch is written, then start to write this one; columns as `map` takes them."""
        list(self._pending)
        self._pending = self._pool.map(self._write, *columns)

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            list(self._pending)


def check_writable(folder: Path) -> None:
    """Check that a folder can be written, or created if it does not exist; change nothing.

    Raises:
        InputError: it cannot. The message names `output_dir`.
    """
    for place in (folder, *folder.absolute().parents):
        try:
            if os.path.lexists(place) and not place.is_dir():
                raise InputError(f"`output_dir`: {place} is a file; choose a folder")
            tempfile.TemporaryDirectory(dir=place).cleanup()  # os.access is wrong for root, and on Windows
            return
        except (FileNotFoundError, NotADirectoryError):  # the folder does not exist yet: try its parent
            continue
        except OSError as error:
            raise InputError(
                f"`output_dir`: {place} cannot be written: {error.strerror}; allow writing or choose another folder"
            ) from error


@contextlib.contextmanager
def hold_folder(root: Path) -> Iterator[None]:
    """Lock a folder while the context lasts. A folder created here is removed in the end if nothing was written.

    Raises:
        InputError: another run holds the folder, or it cannot be written. The message names `output_dir`.
    """
    new_folders = [folder for folder in (root, *root.parents) if not folder.exists()]
    lock = FileLock(root / ".lock", timeout=LOCK_TIMEOUT)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # filelock warns if the file system has no flock
            lock.acquire()
    except Timeout as error:
        raise InputError(f"`output_dir`: another run is writing into {root}; wait or choose another folder") from error
    except OSError as error:
        raise InputError(f"`output_dir`: {root} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        is_unused = bool(new_folders) and [file.name for file in root.glob("*")] == [".lock"]
        if is_unused and os.name != "nt":
            (root / ".lock").unlink()  # before the release: after it, the file may be another run's
        lock.release()
        if is_unused:
            with contextlib.suppress(OSError):  # another run uses the folder already
                for folder in new_folders:
                    folder.rmdir()

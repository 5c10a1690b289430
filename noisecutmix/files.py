"""Files that are either whole or not there, written while the device draws."""

import contextlib
import io
import os
import struct
import tempfile
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .errors import InputError

LOCK_TIMEOUT = 1  # seconds; where a file system has no flock, the lock of a killed run is recognised on a second look
PNG_COLOR_TYPES = {"L": 0, "RGB": 2}
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


@contextlib.contextmanager
def atomic_file(path: Path, check: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """Open a file that is either whole or not there: a temporary name in the same folder, flushed, renamed.

    Args:
        path: the file.
        check: called when all but the renaming is done; what it raises leaves the file as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # no two processes share one
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check()
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)  # a full disk is reported without a name
        raise


def write_png(path: Path, image: Image.Image, comment: str = "", check: Callable[[], None] = lambda: None) -> None:
    """Write a PNG atomically, at zlib level 1: lossless, two to three times cheaper than Pillow's default.

    Args:
        path: the file.
        image: the picture.
        comment: an ASCII text in the file, beside the picture.
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
    """Return how a file of `write_png` starts: signature, header, comment (PNG specification, section 11)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, PNG_COLOR_TYPES[mode], 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + (chunk(b"tEXt", b"Comment\0" + comment.encode()) if comment else b"")


def has_ends_of_png(file: Path, first_bytes: bytes) -> bool:
    """Return whether a file starts with these bytes and ends as a PNG does: it was written to its end, that is.

    Raises:
        OSError: it cannot be read, or is not there.
    """
    with open(file, "rb", buffering=0) as content:
        is_begun = content.read(len(first_bytes)) == first_bytes
        if not is_begun or os.fstat(content.fileno()).st_size < len(first_bytes) + len(PNG_END):
            return False
        content.seek(-len(PNG_END), os.SEEK_END)
        return content.read(len(PNG_END)) == PNG_END


def decode_png(file: Path) -> Image.Image | None:
    """Return the picture of an undamaged PNG file, None where it is damaged or of another format.

    Raises:
        OSError: it cannot be read, or is not there.
    """
    content = file.read_bytes()
    try:
        Image.open(io.BytesIO(content), formats=["PNG"]).verify()  # every chunk's checksum, to the last
        image = Image.open(io.BytesIO(content), formats=["PNG"])
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return image


class BackgroundWriter:
    """Threads that write one batch while the device draws the next.

    Leaving the context waits until all is written, and raises what went wrong in a thread.
    """

    def __init__(self, write: Callable[..., None], threads: int = 8):
        self._write = write
        self._pool = ThreadPoolExecutor(threads)
        self._pending: Iterator[None] = iter(())

    def submit(self, *columns: Sequence[Any]) -> None:
        """Start to write a batch, column by column as for `map`, once the batch before is written."""
        list(self._pending)
        self._pending = self._pool.map(self._write, *columns)

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            list(self._pending)


def check_writable(folder: Path) -> None:
    """Check that files can be written into a folder, or that the folder can be made; change nothing.

    Raises:
        InputError: it cannot. The message names `output_dir`.
    """
    for place in (folder, *folder.absolute().parents):
        try:
            if os.path.lexists(place) and not place.is_dir():
                raise InputError(f"`output_dir`: {place} is a file; choose a folder")
            tempfile.TemporaryDirectory(dir=place).cleanup()  # os.access says yes to root, and on Windows
            return
        except (FileNotFoundError, NotADirectoryError):  # the folder is not there yet: its parent decides
            continue
        except OSError as error:
            raise InputError(
                f"`output_dir`: {place} cannot be written: {error.strerror}; mend that or choose another"
            ) from error


@contextlib.contextmanager
def hold_folder(root: Path) -> Iterator[None]:
    """Lock a folder, which is made where it is not there; a new one goes again if nothing is written into it.

    Raises:
        InputError: another run holds the folder, or it cannot be written. The message names `output_dir`.
    """
    new_folders = [folder for folder in (root, *root.parents) if not folder.exists()]
    lock = FileLock(root / ".lock", timeout=LOCK_TIMEOUT)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file system without flock, where the file itself is the lock
            lock.acquire()
    except Timeout as error:
        raise InputError(f"`output_dir`: another run is writing into {root}; wait or choose another") from error
    except OSError as error:
        raise InputError(f"`output_dir`: {root} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        is_unused = bool(new_folders) and [file.name for file in root.glob("*")] == [".lock"]
        if is_unused and os.name != "nt":
            (root / ".lock").unlink()  # while it is held: after the release it may be another run's
        lock.release()
        with contextlib.suppress(OSError):  # another run is there already
            for folder in new_folders if is_unused else ():
                folder.rmdir()

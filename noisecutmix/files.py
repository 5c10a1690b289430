"""Files that are either whole or absent; JSON, PNG, logs, and the record of a folder: read, compared, described."""

import contextlib
import io
import json
import os
import shlex
import struct
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo, putchunk

from . import __version__
from .errors import InputError

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "pillow")
MAX_SHOWN = 120  # characters of a value in a message
PNG_COLOR_TYPES = {"L": 0, "RGB": 2}
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


@contextlib.contextmanager
def _temporary_name(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` that is unique to this process; a file of that name is deleted in the end."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename = str(path)  # the error of a full disk names no file
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path` only once it is whole: written under a temporary name, synced, renamed."""
    with _temporary_name(path) as temporary:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_file(path: Path, content: bytes) -> None:
    """Write a file as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(content)


def create_file(path: Path, content: bytes) -> bool:
    """Create a file unless it exists, and return whether it was created.

    Of several processes that do so at once, one succeeds, and no file is replaced; an empty file counts as missing.
    """
    with _temporary_name(path) as temporary:
        write_file(temporary, content)
        try:
            os.link(temporary, path)
            return True
        except FileExistsError:
            pass
        except OSError:  # the file system has no hard links
            with contextlib.suppress(FileExistsError), open(path, "xb") as file:
                file.write(content)
                return True
        if path.stat().st_size:
            return False
        os.replace(temporary, path)  # the process that created it was killed before it wrote
        return True


def read_json(file: Path, flag: str, **kinds: type) -> dict[str, Any]:
    """Return the object in a JSON file, which has to hold values of these names and types.

    Raises:
        InputError: it cannot be read, or does not. The message names the parameter `flag`.
    """
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}", flag) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON: {error}", flag) from error
    for name, kind in kinds.items():
        if not isinstance(content, dict) or type(content.get(name)) is not kind:
            raise InputError(f'{file} has no "{name}" of type {kind.__name__}', flag)
    return content


def read_record(file: Path, option: str, **kinds: type) -> dict[str, Any] | None:
    """Return the content of a JSON file, None where it is missing or empty (its creator was killed)."""
    return read_json(file, option, **kinds) if os.path.isfile(file) and os.path.getsize(file) else None


def pin_model(model: str, record: dict[str, Any] | None) -> str:
    """Return a hub model at the commit with which a folder was begun: its repository may have moved since.

    Args:
        model: as the user gives it.
        record: the content of run.json or finetune.json, None if there is none.
    """
    commit = record.get("model_commit") if record and record.get("model") == model else None
    return f"{model.partition('@')[0]}@{commit}" if commit else model


def check_same(root: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise an InputError unless a folder was made with the same options."""
    if differences := describe_differences(there, now):
        remedy = "give the same options, choose another folder, or delete this one"
        raise InputError(f"{root} was made with another {differences}; {remedy}", "output_dir")


def describe_differences(there: dict[str, Any], now: dict[str, Any]) -> str:
    """Return the options that differ, such as "alpha (1.0 there, 0.5 now), seed (…)"; long values are left out."""
    differences = []
    for name in {**now, **there}:
        if there.get(name) != now.get(name):
            values = f" ({there.get(name)} there, {now.get(name)} now)"
            differences.append(name + (values if len(values) < MAX_SHOWN else ""))
    return ", ".join(differences)


def describe_program(start: Sequence[str]) -> dict[str, Any]:
    """Return what a record says of the program: the command that continues the run, where it was given, the versions.

    Args:
        start: the words that start the program; the flags of this process follow them.
    """
    return {
        "command": [*start, *sys.argv[1:]],
        "working_directory": os.getcwd(),
        "versions": {"noisecutmix": __version__, **{name: version(name) for name in LIBRARIES}},
    }


def recorded_command(record: dict[str, Any], *more: str) -> str:
    """Return the command of a record as a line for a shell, from any folder, with more flags."""
    if not record.get("command"):
        return "the same command"
    line, folder = shlex.join([*map(str, record["command"]), *more]), record.get("working_directory")
    then = ";" if os.name == "nt" else " &&"  # Windows' PowerShell 5 has no &&
    return f"cd {shlex.quote(str(folder))}{then} {line}" if folder else line  # earlier versions recorded no folder


def write_png(path: Path, image: Image.Image, comment: str = "") -> None:
    """Write a PNG with an ASCII comment atomically, at zlib level 1: two to three times as fast as by default."""
    chunks, buffer = PngInfo(), io.BytesIO()
    if comment:
        chunks.add_text("Comment", comment)
    image.save(buffer, "PNG", compress_level=1, pnginfo=chunks)
    write_file(path, buffer.getvalue())


def first_bytes_of_png(side: int, mode: str, comment: str) -> bytes:
    """Return the first bytes of a file of `write_png`: signature, header, comment (PNG specification, section 11)."""
    start = io.BytesIO()
    start.write(b"\x89PNG\r\n\x1a\n")
    putchunk(start, b"IHDR", struct.pack(">IIBBBBB", side, side, 8, PNG_COLOR_TYPES[mode], 0, 0, 0))
    putchunk(start, b"tEXt", b"Comment\0" + comment.encode())
    return start.getvalue()


def has_ends(file: Path, first_bytes: bytes, last_bytes: bytes) -> bool:
    """Return whether a file is there, starts with these bytes, and ends with those, that is, is complete."""
    try:
        with open(file, "rb", buffering=0) as content:
            if content.read(len(first_bytes)) != first_bytes:
                return False
            content.seek(-len(last_bytes), os.SEEK_END)
            return content.read() == last_bytes
    except (FileNotFoundError, IsADirectoryError):
        return False


def decode_png(file: Path) -> Image.Image | None:
    """Return the picture of an undamaged PNG file, None where it is damaged, missing, or of another format."""
    try:
        content = file.read_bytes()
        Image.open(io.BytesIO(content), formats=["PNG"]).verify()  # the checksum of every chunk
        image = Image.open(io.BytesIO(content), formats=["PNG"])
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return image


def append_to_log(file: Path, **values: Any) -> None:
    """Append a line to the log of a training: a CSV file to be plotted, whose first line has the values' names."""
    cells = (f"{value:.6g}" if isinstance(value, float) else str(value) for value in values.values())
    line = ",".join(cells) + "\n"
    with contextlib.suppress(OSError):  # a program that shows it may lock it; a full disk ends the run at its state
        file.parent.mkdir(exist_ok=True)
        with open(file, "a", encoding="utf-8", newline="") as log:
            log.write(line if log.tell() else ",".join(values) + "\n" + line)


def tidy_log(file: Path) -> None:
    """Keep one whole line a step in a log, the newest, in order: a stop or a second process may repeat steps."""
    with contextlib.suppress(OSError):
        title, *lines = file.read_bytes().splitlines(keepends=True) or [b""]
        whole = [line for line in lines if line.endswith(b"\n")]  # a kill or a full disk may leave a part of one
        by_step = {int(step): line for line in whole if (step := line.partition(b",")[0]).isdigit()}
        write_file(file, title + b"".join(by_step[step] for step in sorted(by_step)))


def check_writable(folder: Path) -> None:
    """Raise an InputError unless a folder can be written, or created if it does not exist; change nothing."""
    place = next((place for place in (folder, *folder.absolute().parents) if os.path.lexists(place)), folder)
    try:
        tempfile.TemporaryDirectory(dir=place).cleanup()  # os.access is wrong for root, and on Windows
    except OSError as error:
        raise InputError(f"{place} cannot be written: {error.strerror}; choose another folder", "output_dir") from error

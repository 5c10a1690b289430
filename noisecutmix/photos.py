"""The training pictures: listing one folder per class, checking every file, opening them as square RGB pictures.

The module imports neither torch nor numpy, so that a bad folder is refused at once.
"""

import collections
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from .classes import comparison_key
from .errors import InputError, first_line

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
PHOTOMETRIC, BITS_PER_SAMPLE = 262, 258  # TIFF tags


@dataclass(frozen=True)
class Photos:
    """A folder of pictures: `labels[i]` is the class of `files[i]`; label k is `class_names[k]`.

    `notes` are sentences about files that are not used, to be printed for the user.
    """

    root: Path
    class_names: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    notes: tuple[str, ...]


def find_photos(root: Path, examples_per_class: int | None = None, seed: int = 0) -> Photos:
    """List the pictures below each class's folder, in the order of torchvision's ImageFolder.

    Args:
        root: holds one folder per class; pictures may lie at any depth below it.
        examples_per_class: the number of pictures of each class, chosen by `seed`; None takes all.

    Raises:
        InputError: there are not at least two classes, a class has no picture, or two folders have the same name.
    """
    if not root.is_dir():
        raise InputError(f"`data_dir`: {root} is {'a file' if root.exists() else 'not there'}; give a folder")
    try:
        folders = sorted((Path(entry) for entry in os.scandir(root) if entry.is_dir()), key=lambda path: path.name)
    except OSError as error:
        raise InputError(f"`data_dir`: {root} cannot be read: {error.strerror}") from error
    _check_names(root, folders)
    files: list[Path] = []
    labels: list[int] = []
    unused: collections.Counter[str] = collections.Counter()
    num_small = 0
    for label, folder in enumerate(folders):
        found = [file for file in _walk(folder) if not file.name.startswith(".")]
        of_class = sorted(file for file in found if file.suffix.lower() in SUFFIXES)
        unused.update(file.suffix.lower() or file.name for file in found if file.suffix.lower() not in SUFFIXES)
        if not of_class:
            raise InputError(f"`data_dir`: {folder} holds no picture ({', '.join(SUFFIXES)}); add some or delete it")
        if examples_per_class is not None:
            num_small += len(of_class) < examples_per_class
            of_class = sorted(sorted(of_class, key=lambda file: _random_key(seed, root, file))[:examples_per_class])
        files += of_class
        labels += [label] * len(of_class)
    notes = []
    if unused:
        kinds = ", ".join(f"{count} {kind}" for kind, count in unused.most_common(4))
        notes.append(f"{unused.total()} files are not pictures of a supported type ({kinds}); they are not used")
    if num_small:
        notes.append(f"{num_small} classes have fewer than {examples_per_class} pictures; all of them are used")
    return Photos(root, tuple(folder.name for folder in folders), tuple(files), tuple(labels), tuple(notes))


def check_photos(photos: Photos, resolution: int | None = None) -> tuple[str, ...]:
    """Open every picture.

    Raises:
        InputError: a picture cannot be read; the message names the first one.
    """
    from tqdm import tqdm

    pool = ThreadPoolExecutor()
    try:
        reasons = pool.map(_reason_against, photos.files)
        bar = tqdm(reasons, "checking pictures", len(photos.files), leave=False, unit="picture", delay=2)
        failed = [reason for reason in bar if reason]
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise InputError(f"{failed[0]}{more}")
    return ()


def open_photo(file: Path) -> Image.Image:
    """Return a picture as RGB: rotated as its EXIF orientation says, 16 bits scaled to 8, on a white background.

    Raises:
        InputError: the file cannot be read, or its format does not define which value is white.
    """
    try:
        # given a file name, Pillow maps an uncompressed TIFF into memory and corrupts it when it rotates it
        with open(file, "rb") as stream, Image.open(stream) as image:
            image.load()
            grey = _scale_to_8_bits(image) if image.mode.startswith(("I", "F")) else image
            return _lay_on_white(ImageOps.exif_transpose(grey))
    except Exception as error:  # Pillow's readers raise many types, also those of struct and zlib
        raise InputError(f"`data_dir`: {file} cannot be read: {first_line(error)}") from error


def crop_square(image: Image.Image, side: int, position: float = 0.5) -> Image.Image:
    """Scale the shorter side to `side` pixels and crop the longer one: `position` 0 keeps its start, 1 its end."""
    short = min(image.size)
    left, top = ((length - short) * position for length in image.size)
    box = (left, top, left + short, top + short)
    return image.resize((side, side), Image.Resampling.LANCZOS, box)


def _check_names(root: Path, folders: list[Path]) -> None:
    by_name: dict[str, Path] = {}
    for folder in folders:
        name = comparison_key(folder.name)
        if folder.name.startswith(".") or not name or not folder.name.isprintable():
            raise InputError(f"`data_dir`: {str(folder)!r} is not a valid class name; rename or move the folder")
        if name in by_name:
            raise InputError(f"`data_dir`: {by_name[name]} and {folder} count as the same class name; rename one")
        by_name[name] = folder
    if len(folders) < 2:
        raise InputError(
            f"`data_dir`: {root} holds {len(folders)} class folders, but at least two are needed; "
            "put the pictures of each class into a folder with the class's name"
        )


def _walk(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise InputError(f"`data_dir`: {error.filename} cannot be read: {error.strerror}") from error

    for parent, _, names in os.walk(folder, onerror=fail, followlinks=True):
        yield from (Path(parent, name) for name in names)


def _random_key(seed: int, root: Path, file: Path) -> bytes:
    """Return the sort key that puts a picture into the seed's order; it does not depend on the other pictures."""
    return hashlib.sha256(f"{seed} {file.relative_to(root).as_posix()}".encode(errors="surrogateescape")).digest()


def _reason_against(file: Path) -> str | None:
    """Return why a picture cannot be used, None if it can."""
    try:
        open_photo(file)
    except InputError as error:
        return str(error)
    return None


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale a picture of 16-bit grey values; Pillow's own conversion clips all values above 255."""
    tags = getattr(image, "tag_v2", {})
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if not is_16_bit or tags.get(BITS_PER_SAMPLE, (16,)) != (16,):
        raise ValueError(f"its format ({image.mode}) does not define which value is white; save it with 8 or 16 bits")
    grey = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    grey.info.pop("transparency", None)  # it is a 16-bit value
    is_white_zero = tags.get(PHOTOMETRIC) == 0  # Pillow applies it to 8-bit pictures only
    return ImageOps.invert(grey) if is_white_zero else grey


def _lay_on_white(image: Image.Image) -> Image.Image:
    if "transparency" not in image.info and not image.mode.endswith("A"):
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")

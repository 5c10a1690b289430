"""A layout of photos: one folder per class, as for torchvision's ImageFolder. Imports no torch."""

import collections
import functools
import os
import re
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..classes import comparison_key
from ..errors import InputError
from ..folder import LABELS_FILE, METADATA_FILE, PREFIXES, RUN_FILE

# those of torchvision's ImageFolder, then others of photos; see `picture_suffixes`
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".jfif", ".jpe", ".gif", ".avif", ".mpo", ".jp2", ".pbm", ".pnm"),
)
HEIC = (".heic", ".heif")
OWN_FILES = (RUN_FILE, METADATA_FILE, LABELS_FILE, "image/gen_0000.png", "image/gen_00000.png")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
SYSTEM_FOLDERS = ("@eadir", "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found")
SPLITS = re.compile(r"(train|training|val|valid|validation|dev|test|testing)([ _-]?(set|split|images))?\d*")


class Listing(NamedTuple):
    """The pictures of each class, by its name in label order; and sentences about what is not used.

    `root` holds all of them. For a published data set, `published` is its name, and `banner` is the height in pixels of
    what is cut from the bottom of each picture.
    """

    pictures: dict[str, list[Path]]
    notes: list[str]
    root: Path
    published: str = ""
    banner: int = 0


@functools.cache
def picture_suffixes() -> tuple[str, ...]:
    """Return the suffixes of the pictures that the installed Pillow decodes; AVIF, say, came with Pillow 11.3."""
    formats = Image.registered_extensions()
    return tuple(suffix for suffix in SUFFIXES if formats.get(suffix) in Image.OPEN)


def list_class_folders(root: Path, allows_empty: bool) -> Listing:
    """List the pictures below each class's folder, in the order of torchvision's ImageFolder.

    Args:
        root: holds the class folders.
        allows_empty: whether a class may have no picture.

    Raises:
        InputError: see `find_photos`.
        OSError: a folder cannot be read.
    """
    walk = _Walk(root)
    entries = walk.entries(root)
    folders = [path for path, is_folder in entries if is_folder]
    _check_names(root, folders)
    _check_splits(root, folders)
    if set(PREFIXES) <= {folder.name for folder in folders} and any((root / name).exists() for name in OWN_FILES):
        raise InputError(f"{root} is a data set of augmentation.py, not a folder of photos; give photos")
    pictures = {}
    for label, folder in enumerate(folders):
        pictures[folder.name] = walk.pictures(folder, label)
        if not pictures[folder.name] and not allows_empty:
            raise InputError(f"{folder} holds no picture ({', '.join(picture_suffixes())}); add some or delete it")
    suffixes = picture_suffixes() + ARCHIVES
    loose = [path for path, is_folder in entries if not is_folder and path.suffix.lower() in suffixes]
    return Listing(pictures, walk.notes(len(folders), len(loose)), root)


class _Walk:
    """Lists the pictures of the class folders, each one once, and counts what is not used."""

    def __init__(self, root: Path):
        self.unused: collections.Counter[str] = collections.Counter()  # files, by type
        self.hidden: collections.Counter[str] = collections.Counter()  # by name
        self.inner_folders: dict[str, list[str]] = {}  # of the class folders that hold nothing else
        self.repeated = 0  # links to pictures that are used already
        self._root = root.resolve()
        self._found: dict[Path, tuple[int, Path]] = {}  # label and path of each picture, by its resolved path

    def notes(self, num_classes: int, num_loose: int) -> list[str]:
        """Return sentences about what is not used; `num_loose` files lie beside the class folders."""
        notes = []
        if self.unused:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.unused.most_common(4))
            count = self.unused.total()
            notes.append(f"{count} files are not pictures of a supported type ({kinds}); they are not used")
        if any(self.unused[suffix] for suffix in HEIC):
            notes.append("HEIC pictures have to be converted to JPEG first; pillow-heif is a package that reads them")
        if self.hidden:
            names = ", ".join(sorted(self.hidden)[:4])
            notes.append(f"{self.hidden.total()} hidden and system folders and files ({names}) are not used")
        if num_loose:
            notes.append(f"{num_loose} pictures and archives lie beside the class folders; they are not used")
        if self.repeated:
            notes.append(f"{self.repeated} links lead to pictures that are used already")
        nested = [(outer, inner) for outer, inner in self.inner_folders.items() if len(inner) > 1]
        if nested and len(self.inner_folders) == num_classes:
            outer, inner = nested[0]
            notes.append(
                f"warning: the class folders hold only folders, such as {inner[0]} and {inner[1]} in {outer}, whose "
                f"pictures are all of class {outer!r}; if the inner folders are the classes, move them into one folder"
            )
        return notes

    def entries(self, folder: Path) -> list[tuple[Path, bool]]:
        """Return (path, whether it is a folder) of what is used in a folder, sorted by name."""
        entries = []
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            path = Path(entry.path)
            if _is_hidden(entry.name):
                self.hidden[entry.name] += 1
                continue
            if entry.is_symlink() and not path.exists():
                raise InputError(f"{path} is a link to nothing; repair or remove it")
            entries.append((path, entry.is_dir()))
        return entries

    def pictures(self, class_folder: Path, label: int) -> list[Path]:
        """Return the pictures below the folder of a class, sorted.

        Raises:
            InputError: a link leads to nothing, to a folder around the classes, or to a picture of another class.
        """
        found, entered, folders = [], set(), [class_folder]
        while folders:
            folder = folders.pop()
            real_folder = folder.resolve()
            if real_folder in (self._root, *self._root.parents):
                raise InputError(f"{folder} leads to {real_folder}, which holds the class folders; remove the link")
            if real_folder in entered:
                continue
            entered.add(real_folder)
            entries = self.entries(folder)
            if folder == class_folder and not any(path.suffix.lower() in picture_suffixes() for path, _ in entries):
                self.inner_folders[folder.name] = [path.name for path, is_folder in entries if is_folder]
            for path, is_folder in entries:
                if is_folder:
                    folders.append(path)
                elif path.suffix.lower() in picture_suffixes() and path.is_file():
                    real_path = path.resolve() if path.is_symlink() else real_folder / path.name
                    other_label, other = self._found.setdefault(real_path, (label, path))
                    if other_label != label:
                        raise InputError(f"{path} and {other}, of another class, are the same file; remove one")
                    if other == path:
                        found.append(path)
                    else:
                        self.repeated += 1
                else:
                    self.unused[path.suffix.lower() or path.name] += 1
        return sorted(found)


def _check_names(root: Path, folders: list[Path]) -> None:
    by_name: dict[str, Path] = {}
    for folder in folders:
        name = comparison_key(folder.name)
        if not name or not folder.name.isprintable():
            raise InputError(f"{str(folder)!r} is not a valid class name; rename or move the folder")
        if name in by_name:
            raise InputError(f"{by_name[name]} and {folder} count as the same class name; rename one")
        by_name[name] = folder
    if len(folders) < 2:
        within = f", or give {folders[0]} if the classes are there" if folders else ""
        raise InputError(
            f"{root} holds {len(folders)} class folders, but at least two are needed; "
            f"put the pictures of each class into a folder with the class's name{within}"
        )


def _check_splits(root: Path, folders: list[Path]) -> None:
    """Raise an InputError if the folders are splits of a data set, which hold the class folders."""
    inner = [{e.name: e.is_dir() for e in os.scandir(folder) if not _is_hidden(e.name)} for folder in folders]
    have_same_classes = len(inner[0]) > 1 and all(all(names.values()) and names == inner[0] for names in inner)
    if have_same_classes or sum(bool(SPLITS.fullmatch(folder.name.lower())) for folder in folders) > 1:
        chosen = next((folder for folder in folders if folder.name.lower().startswith("train")), folders[0])
        names = ", ".join(folder.name for folder in folders[:3])
        raise InputError(f"the folders in {root} ({names}) are splits, not classes; give one of them, such as {chosen}")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS

"""The training pictures: listing one folder per class, and checking every file.

The module imports neither torch nor numpy, so that a bad folder is refused at once.
"""

import collections
import dataclasses
import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .classes import comparison_key
from .errors import InputError
from .pictures import Inspection, inspect_photo
from .record import PREFIXES, RUN_FILE

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
SYSTEM_FOLDERS = ("@eadir", "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found")
DARK = 64  # of 255: the largest value of 14 bits in a picture of 16
SPLITS = re.compile(r"(train|training|val|valid|validation|dev|test|testing)([ _-]?(set|split|images))?\d*")


@dataclass(frozen=True)
class Photos:
    """A folder of pictures: `labels[i]` is the class of `files[i]`; label k is `class_names[k]`.

    `notes` are sentences about what is not used, to be printed for the user.
    """

    root: Path
    class_names: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    notes: tuple[str, ...]


def find_photos(root: Path, examples_per_class: int | None = None, seed: int = 0, flag: str = "data_dir") -> Photos:
    """List the pictures below each class's folder, in the order of torchvision's ImageFolder.

    Hidden files and folders, and folders such as @eaDir, are not used.

    Args:
        root: holds one folder per class; pictures may lie at any depth below it.
        examples_per_class: the number of pictures of each class, chosen by `seed`; None takes all.
        seed: see `examples_per_class`.
        flag: the parameter that the messages name.

    Raises:
        InputError: there are not at least two classes, a class has no picture, two folders have the same name, the
            folders are splits rather than classes, or a link leads nowhere, to a picture of another class, or to a
            folder that holds the class folders.
    """
    if not root.is_dir():
        raise InputError(f"`{flag}`: {root} is {'a file' if root.exists() else 'not there'}; give a folder")
    try:
        walk = _Walk(root)
        entries = walk.entries(root)
        folders = [path for path, is_folder in entries if is_folder]
        _check_names(root, folders)
        _check_splits(root, folders)
        if {folder.name for folder in folders} == set(PREFIXES) and (root / RUN_FILE).exists():
            raise InputError(f"{root} is a data set of augmentation.py, not a folder of photos; give photos")
        files: list[Path] = []
        labels: list[int] = []
        num_small = 0
        for label, folder in enumerate(folders):
            of_class = walk.pictures(folder, label)
            if not of_class:
                raise InputError(f"{folder} holds no picture ({', '.join(SUFFIXES)}); add some or delete it")
            if examples_per_class is not None:
                num_small += len(of_class) < examples_per_class
                of_class = sorted(sorted(of_class, key=lambda file: _random_key(seed, root, file))[:examples_per_class])
            files += of_class
            labels += [label] * len(of_class)
    except InputError as error:
        raise InputError(f"`{flag}`: {error}") from error
    except OSError as error:
        raise InputError(f"`{flag}`: {error.filename} cannot be read: {error.strerror}") from error
    notes = []
    if walk.unused:
        kinds = ", ".join(f"{count} {kind}" for kind, count in walk.unused.most_common(4))
        notes.append(f"{walk.unused.total()} files are not pictures of a supported type ({kinds}); they are not used")
    if walk.hidden:
        names = ", ".join(sorted(walk.hidden)[:4])
        notes.append(f"{walk.hidden.total()} hidden and system folders and files ({names}) are not used")
    loose = [path for path, is_folder in entries if not is_folder and path.suffix.lower() in SUFFIXES + ARCHIVES]
    if loose:
        notes.append(f"{len(loose)} pictures and archives lie beside the class folders; they are not used")
    if walk.repeated:
        notes.append(f"{walk.repeated} links lead to pictures that are used already")
    if any(len(inner) > 1 for inner in walk.inner_folders.values()) and len(walk.inner_folders) == len(folders):
        outer, inner = next((outer, inner) for outer, inner in walk.inner_folders.items() if len(inner) > 1)
        notes.append(
            f"warning: the class folders hold only folders, such as {inner[0]} and {inner[1]} in {outer}, whose "
            f"pictures are all of class {outer!r}; if the inner folders are the classes, move them into one folder"
        )
    if num_small:
        notes.append(f"{num_small} classes have fewer than {examples_per_class} pictures; all of them are used")
    return Photos(root, tuple(folder.name for folder in folders), tuple(files), tuple(labels), tuple(notes))


def split_photos(
    photos: Photos, test_share: float, examples_per_class: int | None = None, seed: int = 0
) -> tuple[Photos, Photos]:
    """Split pictures at random, class by class, into those for training and those for the test.

    The training pictures are those that `find_photos` chooses with the same `examples_per_class` and `seed`, as long as
    they and the test's are no more than the class has.

    Args:
        photos: the pictures.
        test_share: the test's share of each class, 0 to 1; at least one picture is for the test and one for training.
        examples_per_class: the number of training pictures of each class; None takes all that are not for the test.
        seed: determines the split.

    Raises:
        InputError: a class has only one picture.
    """
    by_class: list[list[int]] = [[] for _ in photos.class_names]
    for position, label in enumerate(photos.labels):
        by_class[label].append(position)
    chosen: tuple[list[int], list[int]] = ([], [])  # positions of the training and of the test pictures
    for name, of_class in zip(photos.class_names, by_class):
        of_class.sort(key=lambda position: _random_key(seed, photos.root, photos.files[position]))
        if len(of_class) < 2:
            raise InputError(f"the class {name!r} has only one picture, but training and test need one each")
        num_train = len(of_class) - min(max(round(test_share * len(of_class)), 1), len(of_class) - 1)
        chosen[0].extend(of_class[:num_train][:examples_per_class])
        chosen[1].extend(of_class[num_train:])
    train, test = (
        dataclasses.replace(
            photos, files=tuple(photos.files[p] for p in part), labels=tuple(photos.labels[p] for p in part)
        )
        for part in map(sorted, chosen)
    )
    return train, test


def check_photos(photos: Photos, resolution: int | None = None) -> tuple[str, ...]:
    """Open every picture; return sentences about pictures that are used but may not be what the user expects.

    Args:
        photos: the pictures.
        resolution: the side of the training pictures in pixels, to count those that are smaller.

    Raises:
        InputError: a picture cannot be read; the message names the first one.
    """
    from tqdm import tqdm

    pool = ThreadPoolExecutor()
    try:
        results = pool.map(inspect_photo, photos.files)
        found = list(tqdm(results, "checking pictures", len(photos.files), leave=False, unit="picture", delay=2))
    finally:
        pool.shutdown(cancel_futures=True)
    failed = [picture.refusal for picture in found if picture.refusal]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise InputError(f"{failed[0]}{more}")
    notes = []
    if num_small := sum(picture.side < (resolution or 0) for picture in found):
        notes.append(f"{num_small} pictures are smaller than {resolution} pixels; they are enlarged")
    if num_paged := sum(picture.has_pages for picture in found):
        notes.append(f"{num_paged} TIFF files have several pages; the first one is used, which may be a thumbnail")
    notes += _find_dark(photos, found)
    if flat := [file for file, picture in zip(photos.files, found) if picture.is_flat]:
        notes.append(f"warning: {len(flat)} pictures have a single colour, such as {flat[0]}; they show nothing")
    return (*notes, *_find_contradictions(photos, found))


def _find_dark(photos: Photos, found: list[Inspection]) -> list[str]:
    """Return a warning about pictures that use few of their 16 bits; raise an InputError if all of them do."""
    deep = [(file, picture) for file, picture in zip(photos.files, found) if picture.has_16_bits]
    dark = [file for file, picture in deep if picture.brightest <= DARK]
    if not dark:
        return []
    brightest = max(picture.brightest for _, picture in deep)
    if len(dark) == len(deep):
        raise InputError(
            f"{photos.root}: all {len(deep)} pictures of 16 bits are almost black (at most {brightest} of 255), such "
            f"as {dark[0]}; cameras and microscopes store 10, 12 or 14 bits so: scale the values to 16 bits, or to 8"
        )
    return [
        f"warning: {len(dark)} of {len(deep)} pictures of 16 bits are almost black (at most {DARK} of 255), such as "
        f"{dark[0]}; if they have 10, 12 or 14 bits, scale their values"
    ]


def _find_contradictions(photos: Photos, found: list[Inspection]) -> list[str]:
    """Return a warning about files with the same bytes in different classes."""
    if not photos.labels:  # of an augmented set
        return []
    same: dict[bytes, list[int]] = {}
    for place, picture in enumerate(found):
        same.setdefault(picture.digest, []).append(place)
    pairs = [places for places in same.values() if len({photos.labels[place] for place in places}) > 1]
    if not pairs:
        return []
    first = pairs[0][0]
    second = next(place for place in pairs[0] if photos.labels[place] != photos.labels[first])
    return [
        f"warning: {len(pairs)} pictures lie in more than one class, with the same bytes, such as "
        f"{photos.files[first]} and {photos.files[second]}; remove them where they are wrong"
    ]


class _Walk:
    """Lists the pictures of the class folders, each one once, and counts what is not used."""

    def __init__(self, root: Path):
        self.unused: collections.Counter[str] = collections.Counter()  # files, by type
        self.hidden: collections.Counter[str] = collections.Counter()  # by name
        self.inner_folders: dict[str, list[str]] = {}  # of the class folders that hold nothing else
        self.repeated = 0  # links to pictures that are used already
        self._root = root.resolve()
        self._found: dict[Path, tuple[int, Path]] = {}  # label and path of each picture, by its resolved path

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
            if folder == class_folder and all(is_folder for _, is_folder in entries):
                self.inner_folders[folder.name] = [path.name for path, _ in entries]
            for path, is_folder in entries:
                if is_folder:
                    folders.append(path)
                elif path.suffix.lower() in SUFFIXES and path.is_file():
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


def _random_key(seed: int, root: Path, file: Path) -> bytes:
    """Return the sort key that puts a picture into the seed's order; it does not depend on the other pictures."""
    return hashlib.sha256(f"{seed} {file.relative_to(root).as_posix()}".encode(errors="surrogateescape")).digest()

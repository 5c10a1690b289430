"""CUB-200-2011, Oxford Flowers-102 and FGVC-Aircraft as they are published: their pictures, classes and splits."""

import itertools
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from ..classes import comparison_key, load_classes, without_numbers
from ..errors import InputError, first_line
from .folders import Listing

BANNER = 20  # pixels, in which the photographer is named
PARTS = ("train", "val", "test")
SPLITS = {"train": ("train",), "trainval": ("train", "val"), "test": ("test",)}


class Archive(NamedTuple):
    """How a published data set looks.

    It is recognised by any of its `marks`, and needs all of its `lists`; `pictures` is the folder of its pictures, and
    `counts` are the published numbers of pictures for training, validation and test; `banner` is the height in pixels
    of what is cut from the bottom of each picture.
    """

    title: str
    data_name: str
    marks: tuple[str, ...]
    lists: tuple[str, ...]
    pictures: str
    counts: tuple[int, int, int]
    banner: int = 0


_CUB_MARKS = ("image_class_labels.txt", "train_test_split.txt")
_FLOWER_MARKS = ("imagelabels.mat", "setid.mat")
_AIRCRAFT_MARKS = tuple(f"images_variant_{part}.txt" for part in PARTS)
_AIRCRAFT_LISTS = (*_AIRCRAFT_MARKS, "variants.txt")
ARCHIVES = (
    Archive("CUB-200-2011", "cub", _CUB_MARKS, ("images.txt", *_CUB_MARKS, "classes.txt"), "images", (5994, 0, 5794)),
    Archive("Oxford Flowers-102", "flower", _FLOWER_MARKS, _FLOWER_MARKS, "jpg", (1020, 1020, 6149)),
    Archive("FGVC-Aircraft", "aircraft", _AIRCRAFT_MARKS, _AIRCRAFT_LISTS, "images", (3334, 3333, 3333), BANNER),
)


# class names in label order, and (path, label) of each picture of each part
_Content = tuple[list[str], dict[str, list[tuple[str, int]]]]


def find_archive(folder: Path) -> tuple[Archive, Path] | None:
    """Return the published data set in a folder, and the folder of its lists; None if there is none.

    The folder may also be that of the pictures, or the one in which the archive was unpacked.

    Raises:
        InputError: there are several.
    """
    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    found: list[tuple[Archive, Path]] = []
    for base in (folder, folder.resolve().parent, *inner, *(path / "data" for path in inner)):
        for archive in ARCHIVES:
            is_outside = base == folder.resolve().parent and archive.pictures != folder.resolve().name
            is_new = (archive.title, base.resolve()) not in {(known.title, path.resolve()) for known, path in found}
            if is_new and not is_outside and any((base / mark).is_file() for mark in archive.marks):
                found.append((archive, base))
    if len(found) > 1:
        (first, base), (second, other) = found[:2]
        raise InputError(f"{folder} holds two data sets, {first.title} in {base} and {second.title} in {other}")
    return found[0] if found else None


def list_archive(archive: Archive, base: Path, split: str) -> Listing:
    """List the pictures of a split: "train", "trainval" or "test", class by class in the published order.

    Raises:
        InputError: a list is missing, does not fit the others, or names pictures that are not there.
        OSError: a file cannot be read.
    """
    source, folder = f"the lists of {archive.title} in {base}", base / archive.pictures
    for name in archive.lists:
        if not (base / name).is_file():
            raise InputError(f"{base} looks like {archive.title}, but lacks {name}; unpack the archive again")
    try:
        names, parts = _READERS[archive.data_name](base)
    except (ValueError, LookupError, UnicodeError) as error:
        raise InputError(f"{source} are damaged: {first_line(error)}") from error
    class_names = _as_the_project_spells(archive, names)
    if len(set(class_names)) < len(class_names):
        raise InputError(f"{source} name a class twice; unpack the archive again")

    # Every picture is in one part of the split, and in its folder
    listed = [path for part in PARTS for path, _ in parts[part]]
    if len(set(listed)) < len(listed):
        twice = next(path for path in listed if listed.count(path) > 1)
        raise InputError(f"{source} name {twice} twice; unpack the archive again")
    there = _find_pictures(folder)
    if missing := [path for path in listed if path not in there]:
        what = f"{len(missing)} of the {len(listed)} pictures of {archive.title}, such as {missing[0]}"
        raise InputError(f"{folder} lacks {what}; unpack the archive again")
    counts = tuple(len(parts[part]) for part in PARTS)
    num_train = sum(len(parts[part]) for part in SPLITS["trainval" if split == "test" else split])
    notes = [f"{archive.title} as published: {num_train:,} pictures for training, {counts[2]:,} for the test"]
    if split != "train" and counts[1]:
        notes[0] += f" ({counts[1]:,} of the validation are among those for training; --split=train omits them)"
    if counts != archive.counts:
        published = f"{archive.counts[0] + archive.counts[1]:,} and {archive.counts[2]:,}"
        notes.append(f"warning: {archive.title} has {published} pictures in all, unlike the lists in {base}")
    if num_unused := len(there) - len(listed):
        notes.append(f"{num_unused} pictures in {folder} are in no list; they are not used")
    pictures: dict[str, list[Path]] = {name: [] for name in class_names}
    for part in SPLITS[split]:
        for path, label in parts[part]:
            pictures[class_names[label]].append(folder / path)
    if split != "test" and (empty := [name for name, files in pictures.items() if not files]):
        raise InputError(f"{source} name no picture for training of {empty[0]!r}")
    pictures = {name: sorted(files) for name, files in pictures.items()}
    return Listing(pictures, notes, base, archive.title, archive.banner)


def _read_cub(base: Path) -> _Content:
    names = read_numbered(base / "classes.txt")
    files = read_numbered(base / "images.txt")
    labels = read_numbered(base / "image_class_labels.txt")
    is_training = read_numbered(base / "train_test_split.txt")
    if not files.keys() == labels.keys() == is_training.keys():
        raise ValueError("images.txt, image_class_labels.txt and train_test_split.txt are of different pictures")
    places = {number: label for label, number in enumerate(names)}
    parts: dict[str, list[tuple[str, int]]] = {part: [] for part in PARTS}
    for number, path in files.items():
        part = {"1": "train", "0": "test"}[is_training[number]]
        if path.partition("/")[0] != names[int(labels[number])]:
            raise ValueError(f"image_class_labels.txt has another class for {path} than its folder")
        parts[part].append((path, places[int(labels[number])]))
    return without_numbers(list(names.values())), parts


def _read_flowers(base: Path) -> _Content:
    try:
        from scipy.io import loadmat
    except ImportError:
        message = "Oxford Flowers-102 needs scipy, which is not installed; start with: uv run --extra classify"
        raise InputError(message) from None

    def read(name: str, key: str) -> list[int]:
        try:
            values: Any = loadmat(base / name)[key]
        except Exception as error:  # scipy's reader raises many types
            raise ValueError(f"{name} cannot be read ({first_line(error)})") from error
        return [int(value) for value in values.ravel()]

    names, labels = list(load_classes("flower").names), read("imagelabels.mat", "labels")
    numbers = [read("setid.mat", key) for key in ("trnid", "valid", "tstid")]
    if sorted(itertools.chain(*numbers)) != list(range(1, len(labels) + 1)):
        raise ValueError("imagelabels.mat and setid.mat are of different pictures")
    if min(labels) < 1 or max(labels) > len(names):
        raise ValueError(f"imagelabels.mat has labels outside 1 to {len(names)}")
    parts = ([(f"image_{number:05d}.jpg", labels[number - 1] - 1) for number in of_part] for of_part in numbers)
    return names, dict(zip(PARTS, parts))


def _read_aircraft(base: Path) -> _Content:
    names = [line for line in _lines(base / "variants.txt") if line]
    places = {name: label for label, name in enumerate(names)}
    parts: dict[str, list[tuple[str, int]]] = {}
    for part in PARTS:
        pairs = [line.split(" ", 1) for line in _lines(base / f"images_variant_{part}.txt")]
        parts[part] = [(f"{number}.jpg", places[name.strip()]) for number, name in pairs]
    return names, parts


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def read_numbered(file: Path) -> dict[int, str]:
    """Return the rest of each line by the number at its start, in the order of the numbers."""
    entries = [re.fullmatch(r"(\d+)\s+(.+)", line) for line in _lines(file)]
    numbered = {int(entry[1]): entry[2] for entry in entries if entry}
    if len(numbered) < len(entries):
        raise ValueError(f"{file.name} has a line without a number of its own")
    return dict(sorted(numbered.items()))


_READERS = {"cub": _read_cub, "flower": _read_flowers, "aircraft": _read_aircraft}


def _find_pictures(folder: Path) -> set[str]:
    """Return the paths of the pictures below a folder, relative to it, with slashes."""
    found: set[str] = set()
    for root, _, names in os.walk(folder, followlinks=True):
        inner = Path(root).relative_to(folder)
        found.update((inner / name).as_posix() for name in names if name.endswith(".jpg"))
    return found


def _as_the_project_spells(archive: Archive, class_names: list[str]) -> list[str]:
    spelled = {comparison_key(name): name for name in load_classes(archive.data_name).names}
    if unknown := [name for name in class_names if comparison_key(name) not in spelled]:
        raise InputError(f"the lists look like those of {archive.title}, but it has no class {unknown[0]!r}")
    return [spelled[comparison_key(name)] for name in class_names]

"""Lists of pictures with their classes, and files that give class folders their names."""

import csv
import json
import os
import re
from pathlib import Path

from ..classes import comparison_key
from ..errors import InputError
from .folders import Listing, picture_suffixes

HEADER = ("file", "filename", "file_name", "path", "filepath", "image", "image_path", "img", "name", "id")
# beside train/ and valid/ in re-packagings of Oxford Flowers-102, and in CUB-200-2011
NAME_FILES = ("cat_to_name.json", "classes.txt")


def read_list(file: Path, root: Path) -> Listing:
    """List the pictures that a text or CSV file names: a path below `root` and a class in each line, a header if any.

    Comma and tab separate the two, else the first space, so that class names may hold spaces. A line of a path alone is
    of the class of its folder. A path may lack the picture's suffix. Labels are in the order of the sorted names.

    Raises:
        InputError: the list cannot be read, or a picture is not there, not below `root`, or listed twice.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise InputError(f"{file} cannot be read: {error}; give a text or CSV file of paths and classes") from error
    sample = next((line for line in lines if line.strip()), "")
    separator = next((sign for sign in "\t," if sign in sample), "")
    labels: dict[Path, str] = {}
    columns: set[int] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        cells = _split(line, separator, root)
        if not any(cells) or (not labels and cells[0].lower() in HEADER):  # an empty row of a spreadsheet, or titles
            continue
        if not all(cells):
            raise InputError(f"{file}, line {number}: the path or the class is empty; fill it in or remove the line")
        if len(cells) > 2:
            raise InputError(f"{file}, line {number}: {len(cells)} columns; keep the path and the class")
        found = _find_pictures(root, cells[0])
        if len(found) != 1:
            what = "is no picture" if not found else f"are several pictures, such as {found[1].name},"
            raise InputError(f"{file}, line {number}: there {what} {root / cells[0]}")
        if root.resolve() not in found[0].resolve().parents:
            raise InputError(f"{file}, line {number}: {found[0]} is not in {root}; give paths below it")
        path = found[0]
        if os.path.isabs(cells[0]):  # such a path may name the folder in another way
            path = root / path.resolve().relative_to(root.resolve())
        if path in labels:
            raise InputError(f"{file}, line {number}: {path} is listed already; remove one line")
        labels[path] = cells[1] if len(cells) > 1 else path.parent.name
        columns.add(len(cells))
    if len(columns) > 1:
        raise InputError(f"{file}: some lines have a class and others have none; give each line one")
    pictures: dict[str, list[Path]] = {name: [] for name in sorted(set(labels.values()))}
    if len(pictures) < 2:
        raise InputError(f"{file} names {len(pictures)} classes, but at least two are needed")
    keys: dict[str, str] = {}
    for name in pictures:
        if (other := keys.setdefault(comparison_key(name), name)) != name:
            raise InputError(f"{file}: {other!r} and {name!r} count as the same class name; rename one")
    for path, name in labels.items():
        pictures[name].append(path)
    return Listing({name: sorted(files) for name, files in pictures.items()}, [], root)


def _split(line: str, separator: str, root: Path) -> list[str]:
    """Return the cells of a line. Without a separator, a line that is a path has one cell, though it holds spaces."""
    if separator:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=separator))]
    words = line.split(" ")
    for count in range(len(words), 1, -1):  # the longest path that is there, then the class
        if (root / " ".join(words[:count]).strip()).is_file():
            return [cell for cell in (" ".join(words[:count]).strip(), " ".join(words[count:]).strip()) if cell]
    return line.split(maxsplit=1)


def _find_pictures(root: Path, name: str) -> list[Path]:
    """Return the picture of this path, or those that have it but for the suffix."""
    if (root / name).is_file():
        return [root / name]
    if Path(name).suffix.lower() in picture_suffixes():
        return []
    return [path for suffix in picture_suffixes() if (path := root / f"{name}{suffix}").is_file()]


def find_names(root: Path, folders: list[str], file: Path | None) -> tuple[list[str], Path | None]:
    """Return the class names of folders, and the file that gives them, None where the folders are named so themselves.

    Args:
        root: holds the folders; without `file`, one of `NAME_FILES` in it or beside it is used if it names all folders.
        folders: their names, sorted.
        file: JSON, an object of names by folder or a list in the order of the folders.

    Raises:
        InputError: the file cannot be read, or does not name each folder.
    """
    if file is None:
        for place in (root, root.resolve().parent):
            for found in (place / name for name in NAME_FILES):
                names = _read_names(found)
                if isinstance(names, dict) and all(_key(folder) in names for folder in folders):
                    return [names[_key(folder)] for folder in folders], found
        return folders, None
    names = _read_names(file)
    if isinstance(names, dict):
        if missing := [folder for folder in folders if _key(folder) not in names]:
            raise InputError(f"{file} has no name for the folder {missing[0]!r}", "class_names")
        return [names[_key(folder)] for folder in folders], file
    if names is None or len(names) != len(folders):
        what = "is no JSON file of names" if names is None else f"has {len(names)} names for {len(folders)} folders"
        raise InputError(f"{file} {what}; give an object of names by folder, or a list", "class_names")
    if folders != sorted(folders, key=_natural_key):
        reason = "is a list, but the order of numbered folders is 1, 10, 2 for some programs and 1, 2, 10 for others"
        raise InputError(f"{file} {reason}; give an object of names by folder", "class_names")
    return names, file


def _read_names(file: Path) -> dict[str, str] | list[str] | None:
    """Return the names by folder or in order, None if a file does not hold names."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix != ".json":
            entries = [re.fullmatch(r"(\d+)\s+(.+)", line.strip()) for line in text.splitlines() if line.strip()]
            return {_key(entry[1]): entry[2] for entry in entries if entry} if all(entries) else None
        content = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return None
    values = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(values, list) or not all(isinstance(name, str) and name.strip() for name in values):
        return None
    return {_key(name): value for name, value in content.items()} if isinstance(content, dict) else values


def _natural_key(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts the numbers in names by their value."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _key(folder: str) -> str:
    """Return a folder's name without the zeros before a number: 001 is 1."""
    return folder.lstrip("0") or "0" if folder.isdecimal() else folder

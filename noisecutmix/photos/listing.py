"""The pictures of a folder: listed, chosen, split and checked. Imports no torch, so that a check needs no time."""

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..classes import find_repeated
from ..errors import InputError
from .folders import Listing, list_class_folders
from .lists import find_names, read_list
from .opening import Inspection, inspect_photo, open_photo
from .published import find_archive, list_archive


@dataclass(frozen=True)
class Photos:
    """A folder of pictures: `labels[i]` is the class of `files[i]`; label k is `class_names[k]`.

    `notes` are sentences about what is not used, to be printed for the user. `published` is the name of a data set that
    is read as published; `banner` is the height in pixels of what is cut from the bottom of each picture.
    """

    root: Path
    class_names: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    notes: tuple[str, ...]
    published: str = ""
    banner: int = 0

    def open(self, index: int, min_side: int | None = None) -> Image.Image:
        """Return a picture as `open_photo` does, without its banner; `min_side` counts where there is none."""
        picture = open_photo(self.files[index], None if self.banner else min_side)
        return picture.crop((0, 0, picture.width, picture.height - self.banner)) if self.banner else picture


@dataclass(frozen=True)
class Source:
    """Which pictures of a folder are used, and how their classes are named.

    Args:
        split: of a published data set, "train" or "trainval" (with the validation's pictures).
        list_file: names the pictures and their classes, instead of folders.
        class_names: gives class folders their names; see `find_names`.
    """

    split: str | None = None
    list_file: Path | None = None
    class_names: Path | None = None


def find_photos(
    root: Path,
    examples_per_class: int | None = None,
    seed: int = 0,
    option: str = "data_dir",
    is_test: bool = False,
    source: Source = Source(),
) -> Photos:
    """List the pictures below each class's folder, in the order of torchvision's ImageFolder.

    Hidden files and folders, and folders such as @eaDir, are not used. CUB-200-2011, Oxford Flowers-102 and
    FGVC-Aircraft are read as published, with their own order of classes.

    Args:
        root: holds one folder per class; pictures may lie at any depth below it. Or a published data set.
        examples_per_class: the number of pictures of each class, chosen by `seed`; None takes all.
        seed: see `examples_per_class`.
        option: the parameter that the messages name.
        is_test: whether a class may have no picture, and those for the test are meant.
        source: see there.

    Raises:
        InputError: there are not at least two classes, a class has no picture, two folders have the same name, the
            folders are splits rather than classes, they are a data set of augmentation.py, or a link leads nowhere, to
            a picture of another class, or to a folder that holds the class folders; see also `list_archive`,
            `read_list` and `find_names`.
    """
    if not root.is_dir():
        raise InputError(f"{root} is {'a file' if root.exists() else 'not there'}; give a folder", option)
    try:
        listing = _list(root, is_test, source)
    except InputError as error:
        raise InputError(error.message, error.option or option) from error
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}", option) from error
    root, pictures, notes = listing.root, listing.pictures, listing.notes
    num_small = sum(len(of_class) < (examples_per_class or 0) for of_class in pictures.values())
    if num_small:
        notes.append(f"{num_small} classes have fewer than {examples_per_class} pictures; all of them are used")
    if examples_per_class is not None:
        for name, of_class in pictures.items():
            in_order = sorted(of_class, key=lambda file: _random_key(seed, root, file))
            pictures[name] = sorted(in_order[:examples_per_class])
    labels = (label for label, of_class in enumerate(pictures.values()) for _ in of_class)
    files = tuple(itertools.chain(*pictures.values()))
    return Photos(root, tuple(pictures), files, tuple(labels), tuple(notes), listing.published, listing.banner)


def _list(root: Path, is_test: bool, source: Source) -> Listing:
    """List a published data set, or the pictures of a list, or those of class folders."""
    archive = None if source.list_file else find_archive(root)
    if archive:
        if source.class_names and not is_test:
            raise InputError(f"{root} is read as published, with its own class names; omit this flag", "class_names")
        return list_archive(*archive, "test" if is_test else source.split or "trainval")
    if source.split:
        raise InputError(f"{root} is not a published data set with a split; omit this flag", "split")
    listing = read_list(source.list_file, root) if source.list_file else list_class_folders(root, is_test)
    around = find_archive(root) if source.list_file else None
    if around:  # the pictures of a published data set, by other lists
        listing = listing._replace(banner=around[0].banner)
    names, file = find_names(root, list(listing.pictures), source.class_names)
    if repeated := find_repeated(names):
        raise InputError(f"{file or root} gives two classes the name {repeated!r}; rename one")
    notes = [*listing.notes, *([f"class names are those of {file}"] if file else [])]
    return listing._replace(pictures=dict(zip(names, listing.pictures.values())), notes=notes)


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
    pairs = [[(photos.files[position], photos.labels[position]) for position in sorted(part)] for part in chosen]
    (train, train_labels), (test, test_labels) = (tuple(zip(*part)) for part in pairs)
    of_training = dataclasses.replace(photos, files=train, labels=train_labels)
    return of_training, dataclasses.replace(photos, files=test, labels=test_labels)


def check_photos(
    files: Sequence[Path], labels: Sequence[int] | None = None, resolution: int | None = None
) -> tuple[str, ...]:
    """Open every picture; return sentences about pictures that are used but may not be what the user expects.

    Args:
        files: the pictures.
        labels: the class of each picture, to find the same bytes in two classes.
        resolution: the side of the training pictures in pixels, to count those that are smaller.

    Raises:
        InputError: a picture cannot be read; the message names the first one. Or most pictures have 16 bits, but are
            almost black or white, since they use few of them.
    """
    from tqdm import tqdm

    pool = ThreadPoolExecutor()
    try:
        results = pool.map(inspect_photo, files)
        found = list(tqdm(results, "checking pictures", len(files), leave=False, unit="picture", delay=2))
    finally:
        pool.shutdown(cancel_futures=True)
    if failed := [picture.refusal for picture in found if picture.refusal]:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise InputError(f"{failed[0]}{more}")
    notes = []
    if num_small := sum(picture.side < (resolution or 0) for picture in found):
        notes.append(f"{num_small} pictures are smaller than {resolution} pixels; they are enlarged")
    if num_paged := sum(picture.has_pages for picture in found):
        notes.append(f"{num_paged} TIFF files have several pages; the first one is used, which may be a thumbnail")
    notes += _find_faint(files, found)
    if flat := [file for file, picture in zip(files, found) if picture.is_flat]:
        notes.append(f"warning: {len(flat)} pictures have a single colour, such as {flat[0]}; they show nothing")
    return (*notes, *_find_contradictions(files, labels, found))


def _find_faint(files: Sequence[Path], found: list[Inspection]) -> list[str]:
    """Return a warning about pictures that use few of their 16 bits; raise an InputError if most pictures do."""
    deep = [file for file, picture in zip(files, found) if picture.has_16_bits]
    faint = [file for file, picture in zip(files, found) if picture.has_16_bits and picture.is_faint]
    if not faint:
        return []
    what = f"{len(faint)} of {len(deep)} pictures of 16 bits are almost black or white, such as {faint[0]}"
    advice = "cameras and microscopes store 10, 12 or 14 bits so: scale the values to 16 bits, or to 8"
    if len(faint) > len(files) / 2:
        raise InputError(f"{what}; {advice}")
    return [f"warning: {what}; {advice}"]


def _find_contradictions(files: Sequence[Path], labels: Sequence[int] | None, found: list[Inspection]) -> list[str]:
    """Return a warning about files with the same bytes in different classes."""
    same: dict[bytes, list[int]] = {}
    for place, picture in enumerate(found):
        same.setdefault(picture.digest, []).append(place)
    pairs = [places for places in same.values() if labels and len({labels[place] for place in places}) > 1]
    if not pairs or not labels:
        return []
    first = pairs[0][0]
    second = next(place for place in pairs[0] if labels[place] != labels[first])
    return [
        f"warning: {len(pairs)} pictures lie in more than one class, with the same bytes, such as {files[first]} and "
        f"{files[second]}; remove them where they are wrong"
    ]


def _random_key(seed: int, root: Path, file: Path) -> bytes:
    """Return the sort key that puts a picture into the seed's order; it does not depend on the other pictures."""
    return hashlib.sha256(f"{seed} {file.relative_to(root).as_posix()}".encode(errors="surrogateescape")).digest()

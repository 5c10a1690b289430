"""The pictures of a comparison: photos for training and for the test, and augmented sets, in one order of classes."""

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..classes import FINETUNE_FILE, load_classes, match_classes
from ..errors import InputError
from ..files import read_record, write_file
from ..folder import LABELS_FILE, read_run
from ..photos import Photos, Source, find_archive, find_photos, split_photos
from ..sources import fingerprint_checkpoint

if TYPE_CHECKING:
    from .. import AugmentedDataset


# what Diff-Mix's published checkpoints were trained on
TRAINING = "published training pictures"
PUBLISHED = {"cub": TRAINING, "aircraft": TRAINING, "flower": "a random half of all pictures"}


class AugmentedSet(NamedTuple):
    """A data set of augmentation.py, its labels in the order of the real pictures' classes.

    `files` are its pictures; `seen` is the number of real pictures that its generator was fine-tuned on, how many there
    are of a class (None for all), and the seed that chose them; None if it is not known. `checkpoint` is the published
    one with which it was drawn: "cub", "flower", "aircraft", or "" for any other.
    """

    pictures: "AugmentedDataset"
    files: list[Path]
    fingerprint: str
    seen: tuple[int, int | None, int] | None = None
    checkpoint: str = ""


def load_photos(
    train_dir: Path,
    test_dir: Path | None,
    test_list: Path | None,
    test_share: float,
    examples_per_class: int | None,
    seed: int,
    source: Source,
) -> tuple[Photos, Photos, bool]:
    """Return the pictures for training and for the test, with the same classes in the same order.

    The test's are those of `test_dir` or `test_list`; without these, the published ones, or a share of `train_dir`,
    which the third value tells.

    Raises:
        InputError: see `find_photos` and `split_photos`; or a class of the test is not in the training.
    """
    whole = find_photos(train_dir, option="train_dir", source=source)
    if source.list_file and not (test_dir or test_list) and find_archive(train_dir):
        raise InputError("a published data set by lists needs the test's, too: give --test_list", "train_list")
    if not (test_dir or test_list or whole.published):
        try:
            return *split_photos(whole, test_share, examples_per_class, seed), True
        except InputError as error:
            raise InputError(f"{error}; add pictures, or give --test_dir", "train_dir") from error
    train = find_photos(train_dir, examples_per_class, seed, "train_dir", source=source)
    option = "test_dir" if test_dir else "test_list" if test_list else "train_dir"
    test_source = Source(list_file=test_list, class_names=source.class_names)
    test = find_photos(test_dir or train_dir, option=option, is_test=True, source=test_source)
    where = str(test_dir or test_list or train_dir)
    places = match_classes(test.class_names, train.class_names, where, "--train_dir", may_have_more=True, option=option)
    if both := set(map(Path.resolve, train.files)) & set(map(Path.resolve, test.files)):
        raise InputError(f"{min(both)} is among those for training, too; the test needs pictures of its own", option)
    labels = tuple(places[label] for label in test.labels)
    present = set(labels)
    lacking = [name for label, name in enumerate(train.class_names) if label not in present]
    if len(lacking) == len(train.class_names):
        raise InputError(f"{where} holds no picture; add some", option)
    notes = test.notes if test.root != train.root else ()  # a published data set has said it already
    if lacking:
        names = ", ".join(map(repr, lacking[:4])) + (", …" if len(lacking) > 4 else "")
        notes += (f"the test has no picture of {len(lacking)} classes ({names}); they are not scored",)
    return train, dataclasses.replace(test, class_names=train.class_names, labels=labels, notes=notes), False


def write_table(file: Path, photos: Photos) -> None:
    """Write a CSV file: path below the folder, label and class of each picture."""
    lines = io.StringIO()
    table = csv.writer(lines, lineterminator="\n")
    table.writerow(("file", "label", "class"))
    for picture, label in zip(photos.files, photos.labels):
        table.writerow((picture.relative_to(photos.root).as_posix(), label, photos.class_names[label]))
    write_file(file, lines.getvalue().encode(errors="surrogateescape"))


def hash_pictures(files: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file."""
    from tqdm import tqdm

    def hash_file(file: Path) -> str:
        try:
            return hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}") from error

    with ThreadPoolExecutor() as pool:
        hashes = pool.map(hash_file, files)
        return list(tqdm(hashes, "reading pictures", len(files), leave=False, unit="picture", delay=2))


def digest(*values: Any) -> str:
    """Return a SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_set(folder: Path, photos: Photos) -> dict[str, Any]:
    """Return the content of run.json of an augmented set, which has to be of the same classes. Raises InputError."""
    record = read_run(folder, "augmented")
    if record is None or not isinstance(record["options"].get("class_names"), list):
        raise InputError(f"{folder} is not a data set of augmentation.py; give the --output_dir of one", "augmented")
    names = record["options"]["class_names"]
    match_classes(photos.class_names, names, "--train_dir", str(folder), option="augmented")
    return record


def open_set(folder: Path, photos: Photos, record: dict[str, Any]) -> AugmentedSet:
    """Return an augmented set, which has to be complete. Raises InputError."""
    from .. import AugmentedDataset

    try:
        pictures = AugmentedDataset(folder, class_names=photos.class_names)
        labels = hashlib.sha256((folder / LABELS_FILE).read_bytes()).hexdigest()
        files = [pictures.root / name for name in pictures.file_names]
        fingerprint = digest(record["options"], labels, hash_pictures(files))
    except InputError as error:
        raise InputError(str(error), "augmented") from error
    return AugmentedSet(pictures, files, fingerprint, *find_generator(record))


def find_generator(record: dict[str, Any]) -> tuple[tuple[int, int | None, int] | None, str]:
    """Return what fine-tuning used for the generator of an augmented set, and the published checkpoint that it has.

    See `AugmentedSet.seen` and `AugmentedSet.checkpoint`. A checkpoint that is gone or has changed tells nothing.
    """
    try:
        ckpt_path, options = Path(record["ckpt_path"]), record["options"]
        if fingerprint_checkpoint(ckpt_path) != options["checkpoint"]:
            return None, ""
        if trained := read_record(ckpt_path / FINETUNE_FILE, "augmented", options=dict):
            own = trained["options"]
            return (int(own["num_pictures"]), own["examples_per_class"], int(own["seed"])), ""
        names = (name for name in PUBLISHED if list(load_classes(name).names) == options["class_names"])
        return None, next(names, "")
    except (OSError, InputError, ValueError, LookupError, TypeError):  # it may be in another user's home folder
        return None, ""

"""The pictures of a comparison: photos for training and for the test, and augmented sets, in one order of classes."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..classes import FINETUNE_FILE, match_classes
from ..errors import InputError
from ..files import read_json
from ..folder import LABELS_FILE, read_run
from ..photos import Photos, find_photos, split_photos
from ..sources import fingerprint_checkpoint

if TYPE_CHECKING:
    from .. import AugmentedDataset


class AugmentedSet(NamedTuple):
    """A data set of augmentation.py, its labels in the order of the real pictures' classes.

    `files` are its pictures; `seen` is the number of real pictures that its generator was fine-tuned on, and the seed
    that chose them, None if it is not known.
    """

    pictures: "AugmentedDataset"
    files: list[Path]
    seen: tuple[int, int] | None
    fingerprint: str


def load_photos(
    train_dir: Path, test_dir: Path | None, test_share: float, examples_per_class: int | None, seed: int
) -> tuple[Photos, Photos]:
    """Return the pictures for training and for the test, with the same classes in the same order. Raises InputError."""
    if test_dir is None:
        whole = find_photos(train_dir, option="train_dir")
        try:
            return split_photos(whole, test_share, examples_per_class, seed)
        except InputError as error:
            raise InputError(f"{error}; add pictures, or give --test_dir", "train_dir") from error
    train = find_photos(train_dir, examples_per_class, seed, "train_dir")
    test = find_photos(test_dir, option="test_dir", allows_empty=True)
    try:
        places = match_classes(test.class_names, train.class_names, str(test_dir), "--train_dir", may_have_more=True)
    except InputError as error:
        raise InputError(str(error), "test_dir") from error
    labels = tuple(places[label] for label in test.labels)
    present = set(labels)
    lacking = [name for label, name in enumerate(train.class_names) if label not in present]
    if len(lacking) == len(train.class_names):
        raise InputError(f"{test_dir} holds no picture; add some", "test_dir")
    notes = test.notes
    if lacking:
        names = ", ".join(map(repr, lacking[:4])) + (", …" if len(lacking) > 4 else "")
        notes += (f"the test has no picture of {len(lacking)} classes ({names}); they are not scored",)
    return train, dataclasses.replace(test, class_names=train.class_names, labels=labels, notes=notes)


def match_folder(option: str, folder: Path, names: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Return the place of each class of --train_dir among those of another folder. Raises InputError."""
    try:
        return match_classes(wanted, names, "--train_dir", str(folder))
    except InputError as error:
        raise InputError(str(error), option) from error


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
    match_folder("augmented", folder, record["options"]["class_names"], photos.class_names)
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
    return AugmentedSet(pictures, files, find_seen(record), fingerprint)


def find_seen(record: dict[str, Any]) -> tuple[int, int] | None:
    """Return how many pictures fine-tuning used for the generator of an augmented set, and its seed, if it is known."""
    try:
        ckpt_path = Path(record["ckpt_path"])
        options = read_json(ckpt_path / FINETUNE_FILE, "augmented", options=dict)["options"]
        is_same = fingerprint_checkpoint(ckpt_path) == record["options"]["checkpoint"]
        return (int(options["num_pictures"]), int(options["seed"])) if is_same else None
    except (InputError, ValueError, LookupError, TypeError):
        return None

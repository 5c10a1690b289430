"""Does it help? Compare classifiers of photos: alone, with MixUp and CutMix, and with augmented pictures.

python ckpts/classify.py --train_dir=photos/train --test_dir=photos/test --augmented noisecutmix=outputs/mine \
    --augmented stable_diffusion=outputs/single --output_dir=outputs/answer

After a stop, the same command continues. Any number of processes may work on one folder, started at any time: each
takes a classifier that nobody has finished or begun, and the last one writes results.md, results.json and accuracy.png.
"""

import argparse
import csv
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import random
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this repository's package, whichever is installed

from noisecutmix import script
from noisecutmix.classes import FINETUNE_FILE, match_classes
from noisecutmix.cli import Parser, as_device, as_number, as_path, as_text
from noisecutmix.errors import InputError, RunError, is_out_of_memory
from noisecutmix.files import atomic_file, check_writable, create_file, write_png
from noisecutmix.photos import Photos, check_photos, find_photos, split_photos
from noisecutmix.ranges import RANGES, Range
from noisecutmix.record import (
    LABELS_FILE,
    check_same,
    describe_program,
    fingerprint_checkpoint,
    read_record,
    read_run,
)

if TYPE_CHECKING:
    import numpy as np

    from noisecutmix import AugmentedDataset
    from noisecutmix.classifier import Classifier

MIXES = ("mixup", "cutmix")
OPTIONS_FILE, TEST_PICTURES_FILE = "classify.json", "test_pictures.csv"
COUNT, RATE, SHARE = Range(int, 1, 10**8), Range(float, 0, 1e6), Range(float, 0, 1)
LEAST_TO_JUDGE = 50  # percent of the test pictures that a classifier has to name right to judge augmented ones
LOOKED_AFTER = 20  # steps, after which a process looks whether another one has finished its job
RECIPE = (  # the flags that classifiers depend on
    *("seed", "test_share", "examples_per_class", "probability", "keep", "model", "pretrained", "epochs", "batch_size"),
    *("learning_rate", "weight_decay", "mix_probability", "image_size", "crop_scale", "color_jitter", "random_flip"),
    "dtype",
)

Job = tuple[str, int]  # a row and the number of a seed
JUDGE: Job = ("none", 0)  # its classifier scores the augmented pictures


class AugmentedSet(NamedTuple):
    """A data set of augmentation.py, its labels in the order of the real pictures' classes.

    `seen` is the number of real pictures that its generator was fine-tuned on, and the seed that chose them, None if it
    is not known.
    """

    pictures: "AugmentedDataset"
    files: Photos
    seen: tuple[int, int] | None
    fingerprint: str


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Compare classifiers that are trained with and without augmented data sets.")
    default = " (default: %(default)s)"
    add = parser.add_argument_group("pictures").add_argument
    layout = "one folder of pictures per class"
    add("--train_dir", type=as_path, required=True, metavar="DIR", help=f"real pictures for training, {layout}")
    add("--test_dir", type=as_path, metavar="DIR", help=f"real pictures for the test, {layout}")
    share = "without --test_dir: share of --train_dir, chosen by the seed, that is only for the test"
    add("--test_share", type=as_number(Range(float, 0.01, 0.99)), default=0.2, metavar="P", help=share + default)
    few = "training pictures per class, chosen by the seed (default: all)"
    add("--examples_per_class", type=as_number(COUNT), metavar="N", help=few)
    sets = "a folder of augmentation.py, and a name for it; may be given several times"
    add("--augmented", type=as_named_folder, action="append", default=[], metavar="NAME=DIR", help=sets)

    add = parser.add_argument_group("comparison").add_argument
    add("--output_dir", type=as_path, required=True, metavar="DIR", help="folder to write into")
    rows = "none, mixup, cutmix, NAME, mixup+NAME, cutmix+NAME (default: none, cutmix, each NAME and cutmix+NAME)"
    add("--rows", nargs="+", metavar="ROW", help=f"ways to train: {rows}")
    add("--baseline", default="cutmix", metavar="ROW", help="row to compare the others with" + default)
    add("--seeds", type=as_number(Range(int, 1, 1000)), default=5, metavar="N", help="classifiers per row" + default)
    add("--seed", type=as_number(RANGES["seed"]), default=0, metavar="S", help="seed of all random choices" + default)
    probability = "share of real pictures that augmented ones replace"
    add("--probability", type=as_number(SHARE), default=0.1, metavar="P", help=probability + default)
    keep = "share of each augmented set that is used; the first classifier of row none doubts the others most"
    add("--keep", type=as_number(Range(float, 0.01, 1)), default=1.0, metavar="P", help=keep + default)
    weights = "keep the first classifier of each row in weights/, and print how to use it"
    add("--save_weights", action="store_true", help=weights)

    add = parser.add_argument_group("training").add_argument
    add("--model", type=as_text, default="resnet50", metavar="NAME", help="any model of timm" + default)
    pretrained = "begin with random weights"
    add("--no_pretrained", dest="pretrained", action="store_false", help=pretrained)
    add("--epochs", type=as_number(COUNT), default=100, metavar="N", help="passes over the real pictures" + default)
    add("--batch_size", type=as_number(RANGES["batch_size"]), default=32, metavar="N", help="pictures a step" + default)
    add("--learning_rate", type=as_number(RATE), default=0.02, metavar="LR", help="peak learning rate of SGD" + default)
    add("--weight_decay", type=as_number(RATE), default=5e-4, metavar="W", help="weight decay of SGD" + default)
    mixed = "share of the batches that rows with mixup and cutmix mix"
    add("--mix_probability", type=as_number(SHARE), default=0.5, metavar="P", help=mixed + default)
    side = "side of the classifier's pictures in pixels (default: the model's)"
    add("--image_size", type=as_number(RANGES["resolution"]), metavar="PIXELS", help=side)
    crop = "smallest share of a picture that a random crop of the training shows"
    add("--crop_scale", type=as_number(Range(float, 0.01, 1)), default=0.08, metavar="P", help=crop + default)
    jitter = "largest random change of brightness, contrast and saturation, as a share"
    add("--color_jitter", type=as_number(SHARE), default=0.4, metavar="P", help=jitter + default)
    flip = "do not mirror half of the training pictures at random"
    add("--no_random_flip", dest="random_flip", action="store_false", help=flip)

    add = parser.add_argument_group("machine").add_argument
    add("--device", type=as_device, metavar="DEVICE", help="cuda, cuda:N, mps or cpu (default: the first available)")
    dtypes = "type of the computation (default: float16 on cuda, else float32); weights are float32"
    add("--dtype", choices=("float16", "bfloat16", "float32"), help=dtypes)
    workers = "processes that read pictures"
    add("--num_workers", type=as_number(Range(int, 0, 256)), default=4, metavar="N", help=workers + default)
    return parser


def as_named_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII) or name.lower() in ("none", *MIXES) or not folder:
        raise argparse.ArgumentTypeError(f"has to be NAME=DIR, with a name of letters and digits, not {text!r}")
    return name, as_path(folder)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return checked options; `augmented` is a dict of folders. Raises InputError."""
    options = create_parser().parse_args(arguments)
    names = [name for name, _ in options.augmented]
    if len({name.lower() for name in names}) < len(names):
        raise InputError("--augmented: two data sets have the same name; give each another one")
    options.augmented = dict(options.augmented)
    known = ["none", *MIXES, *(f"{start}{name}" for name in names for start in ("", *(f"{mix}+" for mix in MIXES)))]
    options.rows = options.rows or ["none", "cutmix", *(row for name in names for row in (name, f"cutmix+{name}"))]
    options.rows = list(dict.fromkeys(options.rows))
    for flag, row in (*(("rows", row) for row in options.rows), ("baseline", options.baseline)):
        if row not in known:
            raise InputError(f"--{flag}: {row!r} is no row; choose from {', '.join(known)}")
    if options.baseline not in options.rows:
        raise InputError(f"--baseline: {options.baseline} is not among --rows; add it there, or choose another")
    output_dir = options.output_dir.resolve()
    folders = {"train_dir": options.train_dir.resolve()}
    if options.test_dir:
        options.test_share = None
        folders["test_dir"] = options.test_dir.resolve()
        for inner, outer in (("test_dir", "train_dir"), ("train_dir", "test_dir")):
            if folders[outer] in (folders[inner], *folders[inner].parents):
                raise InputError(f"--{inner}: {folders[inner]} lies in --{outer}; the test needs pictures of its own")
    for flag, folder in folders.items():
        if folder in (output_dir, *output_dir.parents):
            raise InputError(f"--output_dir: {output_dir} lies in --{flag}, where each folder is a class")
    check_writable(options.output_dir)
    for library in ("timm", "matplotlib", "scipy"):
        if importlib.util.find_spec(library) is None:
            raise InputError(f"{library} is not installed; start with: uv run --extra classify ckpts/classify.py …")
    return options


def main() -> None:
    options = parse()
    train, test = load_photos(options)
    records = {name: read_set(folder, train) for name, folder in options.augmented.items()}
    train_hashes, test_hashes = hash_pictures(train), hash_pictures(test)
    num_leaked = len(set(train_hashes) & set(test_hashes))
    script.choose_device_and_dtype(options)
    sets = {name: open_set(options.augmented[name], train, record) for name, record in records.items()}
    recipe = {
        **{name: getattr(options, name) for name in RECIPE},
        "class_names": list(train.class_names),
        "train_pictures": digest(*zip(train.labels, train_hashes)),
        "test_pictures": digest(*zip(test.labels, test_hashes)),
        "augmented": {name: augmented.fingerprint for name, augmented in sets.items()},
        "timm": version("timm"),  # its weights and transforms
    }
    comparison = Comparison(options, recipe, train, test, sets)
    is_new = comparison.check_usable()
    if is_new:  # the pictures of a comparison that has begun are the same as then
        pictures = (train, test, *(augmented.files for augmented in sets.values()))
        for note in dict.fromkeys(note for photos in pictures for note in (*photos.notes, *check_photos(photos))):
            script.say(note)
    if num_leaked:
        script.say(f"warning: {num_leaked} pictures are among those for training and for the test, too")
    try:
        comparison.train_missing()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise RunError("out of memory; use a smaller --batch_size in another folder") from error
        raise
    write_report(comparison, num_leaked)


def load_photos(options: argparse.Namespace) -> tuple[Photos, Photos]:
    """Return the pictures for training and for the test, with the same classes in the same order. Raises InputError."""
    if options.test_dir is None:
        whole = find_photos(options.train_dir, flag="train_dir")
        try:
            return split_photos(whole, options.test_share, options.examples_per_class, options.seed)
        except InputError as error:
            raise InputError(f"--train_dir: {error}; add pictures, or give --test_dir") from error
    train = find_photos(options.train_dir, options.examples_per_class, options.seed, "train_dir")
    test = find_photos(options.test_dir, flag="test_dir")
    places = match_folder("test_dir", options.test_dir, test.class_names, train.class_names)
    labels = [places.index(label) for label in test.labels]
    return train, dataclasses.replace(test, class_names=train.class_names, labels=tuple(labels))


def match_folder(flag: str, folder: Path, names: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Return the place of each class of --train_dir among those of another folder. Raises InputError."""
    try:
        return match_classes(wanted, names, "--train_dir", str(folder))
    except InputError as error:
        raise InputError(f"--{flag}: {error}") from error


def hash_pictures(photos: Photos) -> list[str]:
    """Return the SHA-256 of each file."""
    from tqdm import tqdm

    def hash_file(file: Path) -> str:
        try:
            return hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}") from error

    with ThreadPoolExecutor() as pool:
        hashes = pool.map(hash_file, photos.files)
        return list(tqdm(hashes, "reading pictures", len(photos.files), leave=False, unit="picture", delay=2))


def digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_set(folder: Path, photos: Photos) -> dict[str, Any]:
    """Return the content of run.json of an augmented set, which has to be of the same classes. Raises InputError."""
    record = read_run(folder, "augmented")
    if record is None or not isinstance(record["options"].get("class_names"), list):
        raise InputError(f"--augmented: {folder} is not a data set of augmentation.py; give the --output_dir of one")
    match_folder("augmented", folder, record["options"]["class_names"], photos.class_names)
    return record


def open_set(folder: Path, photos: Photos, record: dict[str, Any]) -> AugmentedSet:
    """Return an augmented set, which has to be complete. Raises InputError."""
    from noisecutmix import AugmentedDataset

    try:
        pictures = AugmentedDataset(folder, class_names=photos.class_names)
        labels = hashlib.sha256((folder / LABELS_FILE).read_bytes()).hexdigest()
        files = Photos(folder, (), tuple(pictures.root / name for name in pictures.file_names), (), ())
        fingerprint = digest(record["options"], labels, hash_pictures(files))
    except InputError as error:
        raise InputError(f"--augmented: {str(error).removeprefix('--augmented: ')}") from error
    return AugmentedSet(pictures, files, find_seen(record), fingerprint)


def find_seen(record: dict[str, Any]) -> tuple[int, int] | None:
    """Return how many pictures ckpts/finetune.py used for the generator of an augmented set, and its seed."""
    try:
        ckpt_path = Path(record["ckpt_path"])
        finetuning = json.loads((ckpt_path / FINETUNE_FILE).read_text(encoding="utf-8"))
        is_same = fingerprint_checkpoint(ckpt_path) == record["options"]["checkpoint"]
        return (int(finetuning["options"]["num_pictures"]), int(finetuning["options"]["seed"])) if is_same else None
    except (OSError, InputError, ValueError, LookupError, TypeError):
        return None


class AlreadyTrained(Exception):
    """Another process has finished the same classifier."""


class Comparison:
    """The folder of a comparison: classify.json, a file for each row and seed, and what the first classifiers leave.

    Args:
        options: the flags.
        recipe: what the classifiers depend on beside their row and seed, as JSON values.
        train: the pictures for training.
        test: those for the test.
        sets: the augmented data sets by their name.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        recipe: dict[str, Any],
        train: Photos,
        test: Photos,
        sets: dict[str, AugmentedSet],
    ):
        self.options, self.train, self.test, self.sets = options, train, test, sets
        self.root, self._recipe = options.output_dir, json.loads(json.dumps(recipe))
        self.jobs: list[Job] = [(row, seed) for seed in range(options.seeds) for row in options.rows]
        if options.keep < 1 and sets and JUDGE not in self.jobs:
            self.jobs.insert(0, JUDGE)
        self._is_new = False

    def check_usable(self) -> bool:
        """Return whether the comparison is new. Raises InputError if the folder holds one with other options."""
        there = read_record(self.root / OPTIONS_FILE, "output_dir", options=dict)
        if there is None:
            if (self.root / "results").exists():
                raise InputError(f"--output_dir: {self.root} has results without {OPTIONS_FILE}; choose another folder")
            return True
        check_same(self.root, there["options"], self._recipe)
        return False

    def result_file(self, job: Job) -> Path:
        return self.root / "results" / f"predictions_{job[0]}_seed{job[1]}.npy"

    def weights_file(self, row: str) -> Path:
        return self.root / "weights" / f"{row}.safetensors"

    def scores_file(self, name: str) -> Path:
        return self.root / f"scores_{name}.npy"

    def is_done(self, job: Job) -> bool:
        """Return whether a job's result is there, and what else its classifier has to leave."""
        if not self.result_file(job).exists():
            return False
        files = [self.weights_file(job[0])] if self.options.save_weights and job[1] == 0 else []
        if job == JUDGE and self.read_top1(job) >= LEAST_TO_JUDGE:
            files += map(self.scores_file, self.sets)
        return all(file.exists() for file in files)

    def train_missing(self) -> None:
        """Train all classifiers that have no result yet, but those that other processes finish first."""
        if all(map(self.is_done, self.jobs)):
            return
        from tqdm import tqdm

        from noisecutmix.classifier import Classifier

        options = self.options
        classifier = Classifier(options, len(self.train.class_names))  # refuses a wrong model
        classifier.try_batch()
        steps = classifier.steps(len(self.train.files))
        self.root.mkdir(parents=True, exist_ok=True)
        content = {"options": self._recipe, **describe_program()}
        self._is_new = create_file(self.root / OPTIONS_FILE, json.dumps(content, indent=2).encode())
        self.check_usable()
        (self.root / "results").mkdir(exist_ok=True)
        if not (self.root / TEST_PICTURES_FILE).exists():
            self._write_test_pictures()
        with tqdm(unit="step", smoothing=0.05, disable=not script.is_first_process()) as bar:
            while job := self._choose_job():
                bar.total = bar.n + steps * sum(not self.is_done(other) for other in self.jobs)
                bar.set_description(f"{job[0]}, seed {job[1]}")
                try:
                    self._train(job, bar)
                except AlreadyTrained:
                    continue
                script.say(f"{job[0]}, seed {job[1]}: {self.read_top1(job):.1f} % test accuracy")

    def _write_test_pictures(self) -> None:
        """Write the path, the label and the class of each row of the predictions."""
        with atomic_file(self.root / TEST_PICTURES_FILE) as file:
            lines = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
            table = csv.writer(lines, lineterminator="\n")
            table.writerow(("file", "label", "class"))
            for picture, label in zip(self.test.files, self.test.labels):
                name = picture.relative_to(self.test.root).as_posix()
                table.writerow((name, label, self.test.class_names[label]))
            lines.flush()
            lines.detach()

    def _choose_job(self) -> Job | None:
        """Return a job that is not done, one that as few other processes as possible have begun; None at the end."""
        ready = [job for job in self.jobs if not self.is_done(job) and not self._waits_for_scores(job)]
        if not ready:
            return None
        names = [file.name for file in (self.root / "results").iterdir()]  # of temporary files, while a job is trained
        begun = {job: sum(name.startswith(f".{self.result_file(job).name}.") for name in names) for job in ready}
        free = [job for job in ready if begun[job] == min(begun.values())]
        rank, count = script.rank_and_count()
        place = rank / count if count > 1 else 0 if self._is_new else random.Random().random()
        return free[int(place * len(free))]

    def _waits_for_scores(self, job: Job) -> bool:
        _, name = read_row(job[0])
        return bool(name) and self.options.keep < 1 and not self.scores_file(name).exists()

    def _train(self, job: Job, bar: Any) -> None:
        """Train the classifier of a row and seed, and write its result. Raises AlreadyTrained."""
        import numpy as np

        from noisecutmix.classifier import AugmentedPictures, Classifier, RealPictures, derive_seed

        row, number = job
        mix, name = read_row(row)
        classifier = Classifier(self.options, len(self.train.class_names), derive_seed(self.options.seed, number))

        def after_step(loss: float) -> None:
            script.check_signals()
            bar.update()
            pictures = self.options.batch_size * (bar.format_dict["rate"] or 0)
            bar.set_postfix_str(f"loss {loss:.3f}, {pictures:.0f} pictures/s", refresh=False)
            if bar.n % LOOKED_AFTER == 0 and self.is_done(job):
                raise AlreadyTrained

        def augmented(transform: Any) -> AugmentedPictures:
            chosen = self.sets[name]
            return AugmentedPictures(chosen.pictures, self.find_kept(name), transform)

        with atomic_file(self.result_file(job)) as file:  # its temporary name tells the others that the job has begun
            classifier.train(self.train, augmented if name else None, mix, after_step)
            probabilities = classifier.predict(lambda transform: RealPictures(self.test, transform))
            predictions = probabilities.astype(np.float16)
            if job == JUDGE:
                self._judge(classifier, 100 * float((predictions.argmax(1) == self.test.labels).mean()))
            if self.options.save_weights and number == 0:
                self.weights_file(row).parent.mkdir(exist_ok=True)
                with atomic_file(self.weights_file(row)) as weights:
                    weights.write(classifier.to_safetensors(self.train.class_names))
            np.save(file, predictions)

    def _judge(self, classifier: "Classifier", top1: float) -> None:
        """Score the augmented pictures by the cross-entropy of the prediction to the label, and draw the worst."""
        import numpy as np

        from noisecutmix.classifier import AugmentedPictures
        from noisecutmix.preview import AUG_COLOR, MOST_PICTURES, TARGET_COLOR, draw_grid

        if top1 < LEAST_TO_JUDGE:
            if self.options.keep < 1:
                raise RunError(f"{describe_weak_judge(top1)}; use another folder, without --keep")
            return
        for name, chosen in self.sets.items():
            items = functools.partial(AugmentedPictures, chosen.pictures, range(len(chosen.pictures)))
            probabilities, labels = classifier.predict(items), chosen.pictures.soft_labels
            scores = -(labels * np.log(np.maximum(probabilities, 1e-12))).sum(1)
            content = io.BytesIO()
            np.save(content, scores.astype(np.float32))
            create_file(self.scores_file(name), content.getvalue())  # never replaced: the kept pictures depend on it
            worst = np.argsort(-scores, kind="stable")[:MOST_PICTURES]
            captions = []
            for index in worst:
                lines = [(f"{share:.2f}", label, TARGET_COLOR) for label, share in enumerate(labels[index]) if share]
                predicted = int(probabilities[index].argmax())
                captions.append([*lines, (f"predicted: {probabilities[index].max():.2f}", predicted, AUG_COLOR)])
            images = [chosen.pictures[int(index)][0] for index in worst]
            write_png(self.root / f"doubtful_{name}.png", draw_grid(images, captions, self.train.class_names))

    def find_kept(self, name: str) -> "Sequence[int]":
        """Return the items of an augmented set that are used: with --keep, those with the lowest scores."""
        import numpy as np

        count = len(self.sets[name].pictures)
        if self.options.keep == 1:
            return range(count)
        best = np.argsort(np.load(self.scores_file(name), allow_pickle=False), kind="stable")
        return sorted(best[: max(round(self.options.keep * count), 1)].tolist())

    def read_right(self, job: Job) -> "np.ndarray":
        """Return (pictures,), whether a job's classifier names the class of each test picture right."""
        import numpy as np

        is_right: np.ndarray = np.load(self.result_file(job), allow_pickle=False).argmax(1) == self.test.labels
        return is_right

    def read_top1(self, job: Job) -> float:
        """Return the test accuracy of a job's classifier, in percent."""
        return 100 * float(self.read_right(job).mean())


def read_row(row: str) -> tuple[str, str]:
    """Return what mixes the batches of a row ("mixup", "cutmix" or ""), and its augmented set ("" for none)."""
    first, _, second = row.partition("+")
    return (first, second) if first in MIXES else ("", "" if first == "none" else first)


def describe_weak_judge(top1: float) -> str:
    return f"row none has a test accuracy of {top1:.0f} %, which is too little to judge the augmented pictures"


def write_report(comparison: Comparison, num_leaked: int) -> None:
    """Write results.json, results.md and accuracy.png, the same whoever does it; print the table."""
    import numpy as np

    from noisecutmix.comparison import explain_verdict, format_table, plot_accuracies, summarize

    options, sets, num_train = comparison.options, comparison.sets, len(comparison.train.files)
    is_right = {
        row: np.stack([comparison.read_right((row, seed)) for seed in range(options.seeds)]) for row in options.rows
    }
    summary = summarize(is_right, np.array(comparison.test.labels), options.baseline)
    seen: dict[str, Sequence[str]] = {"": ("real pictures seen by the classifier", "by the generator", "augmented")}
    for row, entry in summary.items():
        _, name = read_row(row)
        entry["real_pictures"] = num_train
        num_seen, _ = (sets[name].seen or (None, 0)) if name else (0, 0)
        entry["real_pictures_of_generator"] = num_seen
        entry["augmented_pictures"] = len(comparison.find_kept(name)) if name else 0
        seen[row] = (
            f"{num_train}",
            "" if not name else "unknown" if num_seen is None else f"{num_seen}",
            f"{entry['augmented_pictures']}" if name else "",
        )
    notes = [
        f"Test accuracy of {options.model} on {len(comparison.test.files)} pictures after the last of {options.epochs} "
        f"epochs, mean ± standard deviation over {options.seeds} seeds. Beside it is the paired difference to "
        f"{options.baseline} ± its standard error. Nothing was chosen on the test pictures.",
        explain_verdict(len(options.rows) - 1, options.seeds),
    ]
    if num_leaked:
        notes.append(f"Warning: {num_leaked} pictures are among those for training and for the test, too.")
    # with the same seed, the generator's pictures are among the first in the same order
    if options.test_dir is None and any(
        chosen.seen is None or chosen.seen[0] > num_train or chosen.seen[1] != options.seed for chosen in sets.values()
    ):
        notes.append(
            "The test pictures are a part of --train_dir. A generator that was fine-tuned on all of it has seen them: "
            "then the rows with augmented pictures come out too good, and only --test_dir is fair."
        )
    if sets and comparison.result_file(JUDGE).exists():
        top1 = comparison.read_top1(JUDGE)
        pictures = ", ".join(f"doubtful_{name}.png" for name in sets)
        weak = describe_weak_judge(top1)
        looks = f"Look at the augmented pictures that the first classifier of row none doubts most: {pictures}."
        notes.append(f"{weak[0].upper()}{weak[1:]}." if top1 < LEAST_TO_JUDGE else looks)
    table = format_table(summary, options.baseline, seen)
    results = {"baseline": options.baseline, "seeds": options.seeds, "leaked_pictures": num_leaked, "rows": summary}
    text = "\n\n".join([table, *notes]) + "\n"
    for name, content in (
        ("results.json", json.dumps(results, indent=2).encode()),
        ("results.md", text.encode()),
        ("accuracy.png", plot_accuracies(summary, f"{options.model}, {options.seeds} seeds")),
    ):
        with atomic_file(comparison.root / name) as file:
            file.write(content)
    if script.is_first_process():
        print(text)
        if options.save_weights:
            from noisecutmix.comparison import explain_loading

            print("To name the class of a picture with the classifier of a row:\n")
            print(explain_loading(comparison.weights_file(options.rows[0]), comparison.test.files[0]))


if __name__ == "__main__":
    script.run(main)

"""Does it help? The comparison of ckpts/classify.py on handwritten digits, on a laptop.

    uv run --group dev --extra classify tests/accuracy.py --work_dir=outputs/accuracy
    uv run --group dev --extra classify tests/accuracy.py --work_dir=outputs/try --seeds=1 --num_aug=16 \
        --classifier_steps=20 --generator_steps=30

ckpts/digits/train.py and ckpts/finetune.py train the generators, augmentation.py draws their pictures, and
ckpts/classify.py trains the classifiers of every column: all are run as a user runs them. Then it measures how natural
the seams are and how well the labels fit. The same command continues after a stop, and two processes of it share the
work (set OMP_NUM_THREADS=1 for each of them).
"""

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, safe_open
from transformers.utils import logging as transformers_logging

from noisecutmix import AugmentedDataset, NoiseCutMixGenerator, cli, script
from noisecutmix.comparison import Score, summarize
from noisecutmix.errors import InputError, RunError
from noisecutmix.files import atomic_file, create_file
from noisecutmix.plan import Box, Item, create_plan, draw_mask
from noisecutmix.preview import AUG_COLOR, TARGET_COLOR

ROOT = Path(__file__).resolve().parent.parent
SETS = {"noisecutmix": [], "stable_diffusion": ["--single_class"]}
ROWS = ("none", "mixup", "cutmix", "stable_diffusion", "noisecutmix", "cutmix+noisecutmix", "mixup+noisecutmix")
BASELINE = "cutmix"
BATCH_SIZE = 32
# every number was fixed before any test digit was used; README says how the model was chosen
RECIPE = [
    *("--model=test_resnet", "--no_pretrained", "--image_size=32", "--crop_scale=0.6", "--color_jitter=0"),
    *(
        "--no_random_flip",
        "--probability=0.5",
        "--learning_rate=0.1",
        f"--batch_size={BATCH_SIZE}",
        "--num_workers=0",
        "--device=cpu",
    ),
]
BUNDLED, TRAINED = "bundled", ["half_0", "half_1", "subset_0", "subset_1"]
HALVES = ("01234", "56789")  # a base model knows one half and is fine-tuned on the other
FEW, SUBSET, ALL = "10 a class", "20 a class, generator too", "all"
OTHERS = {count: f"{count} a class, generator knows other digits" for count in (10, 20)}
MOST_SEAMS = 64
BINS = 10


def load_script(path: Path) -> Any:
    """Import a file that lies in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


digits = load_script(ROOT / "ckpts" / "digits" / "train.py")


# Generators, pictures and classifiers


def run_script(script_file: str, *arguments: str, **environment: str) -> None:
    """Run a script of the repository. Raises RunError if it fails."""
    print(f"{script_file} {' '.join(arguments)}", flush=True)
    command = [sys.executable, str(ROOT / script_file), *arguments]
    if subprocess.run(command, check=False, env={**os.environ, **environment}).returncode:
        raise RunError(f"{script_file} failed, see above; the same command continues")


def make_whole(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return a folder that exists only once `make` has filled it."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            make(Path(temporary) / folder.name)
            with contextlib.suppress(OSError):  # another process was faster
                (Path(temporary) / folder.name).rename(folder)
    return folder


@dataclass
class Experiment:
    """The folder of an experiment; `options` are the flags, but for the folder."""

    work_dir: Path
    options: argparse.Namespace

    def __post_init__(self) -> None:
        train_images, train_labels, test_images, test_labels = digits.load_split()
        self.images, self.labels = digits.enlarge(train_images), train_labels
        self.test_images, self.test_labels = digits.enlarge(test_images), test_labels
        self.folders = dict.fromkeys(self.work_dir / part for part in (*self.options.parts, BUNDLED)).keys()

    @property
    def comparisons(self) -> dict[str, list[Path]]:
        """The output folders of classify.py whose seeds make up each column of the table."""
        halves = range(len(HALVES))
        columns = {
            FEW: [self.work_dir / f"bundled/10_a_class_seed{seed}" for seed in range(self.options.seeds)],
            **{
                title: [self.work_dir / f"half_{half}/{count}_a_class/answer" for half in halves]
                for count, title in OTHERS.items()
            },
            SUBSET: [self.work_dir / f"subset_{number}/answer" for number in range(2)],
            ALL: [self.work_dir / "bundled/all"],
        }
        chosen = {
            title: [folder for folder in folders if not self.folders.isdisjoint(folder.parents)]
            for title, folders in columns.items()
        }
        return {title: folders for title, folders in chosen.items() if folders}

    def fill(self) -> None:
        """Work on the parts until all are done, on those first that as few other processes as possible have begun."""
        while missing := [folder for folder in self.folders if not (folder / "done").exists()]:
            folder = min(missing, key=lambda folder: len(list(folder.glob(".done.*"))))
            folder.mkdir(exist_ok=True)
            with atomic_file(folder / "done"):  # its temporary name tells others that the part is begun
                kind, _, number = folder.name.partition("_")
                {"half": self.teach_half, "subset": self.learn_subset, BUNDLED: self.use_bundled}[kind](
                    int(number or 0)
                )

    def teach_half(self, half: int) -> None:
        """Train a base on five digits, fine-tune it on few of the others, and compare classifiers of those."""
        folder, known, steps = self.work_dir / f"half_{half}", HALVES[half], self.options.generator_steps
        make_whole(
            folder / "base_model",
            lambda made: run_script(
                "ckpts/digits/train.py", f"--only_base_of={known}", f"--steps={steps}", f"--output_dir={made}"
            ),
        )
        new = [label for label in range(len(digits.CLASS_NAMES)) if str(label) not in known]
        for count in OTHERS:
            place = folder / f"{count}_a_class"
            chosen = digits.choose_digits(self.labels, count)
            chosen = chosen[np.isin(self.labels[chosen], new)]
            pictures, labels = self.images[chosen], self.labels[chosen]
            self.write_digits(place / "pictures", pictures, labels)
            self.write_digits(place / "shifted", *digits.shift_all(pictures, labels))
            checkpoint = place / "checkpoint"
            if not (checkpoint / "preview.png").exists():  # written last
                run_script(
                    "ckpts/finetune.py",
                    *(f"--data_dir={place / 'shifted'}", "--meta_class=digit", f"--output_dir={checkpoint}"),
                    *(f"--model={folder / 'base_model' / 'base'}", "--resolution=32", "--train_batch_size=32"),
                    *(f"--max_train_steps={min(steps, 1000)}", "--learning_rate=5e-3", "--token_learning_rate=5e-3"),
                    *("--lr_scheduler=cosine", "--no_random_flip", "--device=cpu"),
                )
            self.draw_sets(place, f"--data_name={checkpoint}")
            self.classify(place, place / "pictures", self.test_of(new), place / "answer", 2 * self.options.seeds)

    def learn_subset(self, number: int) -> None:
        """Train a whole generator on few digits, and compare classifiers of the same ones."""
        folder, steps = self.work_dir / f"subset_{number}", self.options.generator_steps
        chosen = digits.choose_digits(self.labels, 20, number)
        self.write_digits(folder / "pictures", self.images[chosen], self.labels[chosen])
        subset = ("--digits_a_class=20", f"--subset={number}", f"--steps={steps}")
        model = make_whole(
            folder / "demo", lambda made: run_script("ckpts/digits/train.py", *subset, f"--output_dir={made}")
        )
        checkpoint = model / "shot-1-lora-rank10"
        self.draw_sets(folder, "--data_name=digits", f"--model={model / 'base'}", f"--ckpt_path={checkpoint}")
        self.classify(folder, folder / "pictures", self.test_of(range(10)), folder / "answer", self.options.seeds)

    def use_bundled(self, _: int) -> None:
        """Compare classifiers of few and of all digits, with pictures of the bundled generator."""
        folder, seeds = self.work_dir / "bundled", self.options.seeds
        self.write_digits(self.work_dir / "pictures", self.images, self.labels)
        self.draw_sets(folder, "--data_name=digits")
        test, (*few, everything) = self.test_of(range(10)), (*self.comparisons[FEW], *self.comparisons[ALL])
        for seed, output_dir in enumerate(few):
            more = ("--examples_per_class=10", f"--seed={seed}")
            self.classify(folder, self.work_dir / "pictures", test, output_dir, 1, *more)
        self.classify(folder, self.work_dir / "pictures", test, everything, seeds, "--save_weights")

    def write_digits(self, folder: Path, pictures: np.ndarray, labels: np.ndarray) -> None:
        make_whole(folder, lambda made: digits.write_pictures(made, pictures, labels))

    def test_of(self, classes: Sequence[int]) -> Path:
        """Return a folder with the test digits of these classes."""
        folder, chosen = self.work_dir / f"test_{''.join(map(str, classes))}", np.isin(self.test_labels, classes)
        self.write_digits(folder, self.test_images[chosen], self.test_labels[chosen])
        return folder

    def draw_sets(self, folder: Path, *model: str) -> None:
        for name, more in SETS.items():
            if not (folder / name / "soft_label.npy").exists():  # written last
                flags = [*model, *more, f"--num_aug={self.options.num_aug}", "--device=cpu"]
                run_script("augmentation.py", *flags, f"--output_dir={folder / name}")

    def classify(
        self, sets_dir: Path, train_dir: Path, test_dir: Path, output_dir: Path, seeds: int, *more: str
    ) -> None:
        if (output_dir / "results.json").exists():
            return
        num_pictures = len(list(train_dir.rglob("*.png")))
        if "--examples_per_class=10" in more:
            num_pictures = 10 * len(digits.CLASS_NAMES)
        epochs = -(-self.options.classifier_steps * BATCH_SIZE // num_pictures)
        run_script(
            "ckpts/classify.py",
            *(f"--train_dir={train_dir}", f"--test_dir={test_dir}", f"--output_dir={output_dir}", *RECIPE, *more),
            *(f"--augmented={name}={sets_dir / name}" for name in SETS),
            *("--rows", *ROWS, f"--baseline={BASELINE}", f"--seeds={seeds}", f"--epochs={epochs}"),
            OMP_NUM_THREADS="1",  # so small a model is fastest so, and the figures do not depend on the number of cores
        )


def read_scores(folders: Sequence[Path]) -> dict[str, list[Score]]:
    """Return the scores of each row over the seeds of all comparisons."""
    tables = [json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"] for folder in folders]
    return {
        row: [Score(*pair) for rows in tables for pair in zip(rows[row]["top1"], rows[row]["per_class"])]
        for row in ROWS
    }


# The pictures themselves


class Judge:
    """The first classifier of row none that saw all training digits, and no generated picture."""

    def __init__(self, weights: Path):
        about = {key: json.loads(text) for key, text in safe_open(weights, "pt").metadata().items()}
        self._model = timm.create_model(**about["model"]).eval()
        self._model.load_state_dict(load_file(weights))
        self.transform = timm.data.create_transform(**about["transform"])
        self._order = [about["class_names"].index(name) for name in digits.CLASS_NAMES]

    @torch.no_grad()
    def __call__(self, folder: Path) -> np.ndarray:
        """Return the probabilities (items, 10), in the order of the digits, of an augmented set."""
        pictures = torch.stack([picture for picture, _ in AugmentedDataset(folder, self.transform)])
        return self._model(pictures).softmax(1)[:, self._order].numpy()


def measure_named(judge: Judge, folder: Path) -> float:
    """Return the percentage of single-class pictures whose class the judge names."""
    names = json.loads((folder / "run.json").read_text(encoding="utf-8"))["options"]["class_names"]
    wanted = [digits.CLASS_NAMES.index(names[label]) for label in AugmentedDataset(folder).soft_labels.argmax(1)]
    return 100 * float((judge(folder).argmax(1) == wanted).mean())


def to_pixels(image: Image.Image) -> np.ndarray:
    """Return a picture's brightness (height, width)."""
    return np.asarray(image.convert("L"), dtype=np.float32)


def measure_seams(pictures: Sequence[np.ndarray], boxes: Sequence[Box]) -> float:
    """Return the mean jump across the boxes' borders over the mean step between all other neighbours."""
    across, ordinary = [], []
    for picture, box in zip(pictures, boxes):
        mask = np.array(draw_mask(box, *picture.shape)) > 0
        for axis in (0, 1):
            steps = np.abs(np.diff(picture, axis=axis))
            is_border = np.diff(mask, axis=axis)
            across.append(steps[is_border])
            ordinary.append(steps[~is_border])
    return float(np.concatenate(across).mean() / np.concatenate(ordinary).mean())


def compare_seams(experiment: Experiment) -> dict[str, Any]:
    """Measure the seams of NoiseCutMix, of the same items' single pictures pasted, and of real digits there."""
    read = {name: AugmentedDataset(experiment.work_dir / "bundled" / name, to_pixels) for name in SETS}
    plan = create_plan(cli.parse_augmentation(["--data_name=digits"]))
    items = [item for item in plan.items(min(MOST_SEAMS, experiment.options.num_aug)) if 0 < item.ratio < 1]
    generator = NoiseCutMixGenerator("cpu", "digits", plan=replace(plan, single_class=True))
    augs = generator.draw([replace(item, target=item.aug, aug=item.target) for item in items])
    boxes, rng = [item.box for item in items], np.random.default_rng(0)
    mixed, pasted, real = [], [], []
    for item, aug_picture in zip(items, augs):
        mixed.append(read["noisecutmix"][item.index][0])
        target, aug = read["stable_diffusion"][item.index][0], to_pixels(aug_picture)
        pasted.append(np.where(np.array(draw_mask(item.box, *target.shape)) > 0, target, aug))
        real.append(np.float32(experiment.images[rng.choice(np.flatnonzero(experiment.labels == item.target))]))
    return {
        "items": len(items),
        "NoiseCutMix": measure_seams(mixed, boxes),
        "pasted": measure_seams(pasted, boxes),
        "real digits": measure_seams(real, boxes),
    }


def measure_label_fit(judge: Judge, folder: Path, items: Sequence[Item]) -> list[dict[str, Any]]:
    """Return the judge's mean probability of target and aug class in ten bins of the target's share."""
    probabilities = judge(folder)
    bins = [[item for item in items if min(int(item.ratio * BINS), BINS - 1) == number] for number in range(BINS)]
    return [
        {
            "items": len(content),
            "mean_ratio": float(np.mean([item.ratio for item in content])),
            "target": float(np.mean([probabilities[item.index, item.target] for item in content])),
            "aug": float(np.mean([probabilities[item.index, item.aug] for item in content])),
        }
        for content in bins
        if content
    ]


def draw_label_fit(bins: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot the probabilities against the label's share; where they fit, they lie on the thin lines."""
    figure = Figure(figsize=(7, 7), layout="constrained")  # inches
    axes = figure.add_subplot(xlim=(0, 1), ylim=(0, 1), xlabel="ratio r: the target class's share of the soft label")
    axes.set_ylabel("mean probability (thin: the soft label)")
    axes.grid(alpha=0.3)
    ratios = [entry["mean_ratio"] for entry in bins]
    for name, color, fit in (("target", TARGET_COLOR, (0, 1)), ("aug", AUG_COLOR, (1, 0))):
        color = [channel / 255 for channel in color]
        axes.plot((0, 1), fit, color=color, linewidth=1)
        axes.plot(ratios, [entry[name] for entry in bins], "o-", color=color, linewidth=3, label=f"{name} class")
    axes.legend()
    figure.savefig(file, metadata={"Software": None})


# The report


def format_table(summaries: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the table in Markdown: mean, and difference to the baseline; *: it exceeds two standard errors."""
    lines = [["", *ROWS], ["---"] * (1 + len(ROWS))]
    for title, summary in summaries.items():
        best = max(entry["top1_mean"] for entry in summary.values())
        cells = [f"{title} ({len(summary[BASELINE]['top1'])} classifiers a row)"]
        for row in ROWS:
            entry = summary[row]
            mean = f"{entry['top1_mean']:.1f}"
            star = " *" if entry["verdict"] in ("better", "worse") else ""
            difference = f" ({entry['difference']:+.2f} ± {entry['standard_error'] or 0:.2f}{star})".replace("-", "−")
            cells.append((f"**{mean}**" if entry["top1_mean"] == best else mean) + difference * (row != BASELINE))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def measure(experiment: Experiment) -> dict[str, Any]:
    """Return all results, as JSON values."""
    work_dir, comparisons = experiment.work_dir, experiment.comparisons
    judge = Judge(comparisons[ALL][0] / "weights" / "none.safetensors")
    plan = create_plan(cli.parse_augmentation(["--data_name=digits"]))
    items = list(plan.items(experiment.options.num_aug))
    return {
        "accuracy": {column: summarize(read_scores(folders), BASELINE) for column, folders in comparisons.items()},
        "single_class_named": {
            str(folder.relative_to(work_dir)): measure_named(judge, folder / "stable_diffusion")
            for folder in dict.fromkeys(answer.parent for answers in comparisons.values() for answer in answers)
        },
        "noisecutmix_by_generator": {
            str(folder.parent.relative_to(work_dir)): summarize(read_scores([folder]), BASELINE)["noisecutmix"]
            for column, folders in comparisons.items()
            for folder in folders
            if column not in (FEW, ALL)
        },
        "seams": compare_seams(experiment),
        "label_fit": measure_label_fit(judge, work_dir / "bundled" / "noisecutmix", items),
    }


def report(results: dict[str, Any]) -> None:
    print(f"\nTest accuracy in percent, and paired difference to {BASELINE} ± its standard error:\n")
    print(format_table(results["accuracy"]))
    print("\nPictures of a single class whose class is named by a classifier of all training digits")
    for name, percentage in results["single_class_named"].items():
        print(f"  {name:<20} {percentage:.1f} %")
    print(f"\nnoisecutmix to {BASELINE}, by generator")
    for name, entry in results["noisecutmix_by_generator"].items():
        print(f"  {name:<20} {entry['difference']:+.2f} ± {entry['standard_error'] or 0:.2f}")
    print("\nSeams: mean step across the mask's border over the mean step elsewhere")
    for name, value in results["seams"].items():
        print(f"  {name:<12} {value:.2f}" if name != "items" else f"  {value} pictures")
    print("\nLabel fit: mean probability by the same classifier\n  ratio r  pictures  target  aug")
    for entry in results["label_fit"]:
        print(f"  {entry['mean_ratio']:.2f}  {entry['items']:>12}  {entry['target']:>6.2f}  {entry['aug']:.2f}")


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, count = parser.add_argument, cli.positive_int
    add("--work_dir", type=Path, default=Path("outputs/accuracy"), metavar="DIR", help="folder to write into")
    parts = "trained generators whose columns are measured, beside the bundled one"
    add("--parts", nargs="*", choices=TRAINED, default=TRAINED, metavar="PART", help=parts)
    add("--seeds", type=count, default=10, metavar="N", help="classifiers a row and generator; twice in the halves")
    add("--classifier_steps", type=count, default=500, metavar="N", help="least number of training steps of each")
    add("--num_aug", type=count, default=500, metavar="N", help="pictures a generated set")
    add("--generator_steps", type=count, default=2000, metavar="N", help="UNet steps of a base model")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    transformers_logging.set_verbosity_error()
    work_dir = Path(vars(options).pop("work_dir"))
    work_dir.mkdir(parents=True, exist_ok=True)
    recorded = json.dumps({name: value for name, value in vars(options).items() if name != "parts"}).encode()
    if not create_file(work_dir / "options.json", recorded) and (work_dir / "options.json").read_bytes() != recorded:
        raise InputError(f"--work_dir: {work_dir} holds an experiment with other flags; choose another folder")
    experiment = Experiment(work_dir, options)
    experiment.fill()
    results = measure(experiment)
    draw_label_fit(results["label_fit"], work_dir / "label_fit.png")
    report(results)
    with atomic_file(work_dir / "accuracy.json") as file:
        file.write((json.dumps(results, indent=2) + "\n").encode())
    print(f"\nwrote {work_dir / 'accuracy.json'} and {work_dir / 'label_fit.png'}")


if __name__ == "__main__":
    script.run(main)

"""Does it help? The comparison of noisecutmix.compare on handwritten digits, on a laptop.

    uv run --group dev --extra classify tests/measure/accuracy.py --work_dir=outputs/accuracy
    uv run --group dev --extra classify tests/measure/accuracy.py --work_dir=outputs/try --seeds=1 --num_aug=16 \
        --classifier_steps=20 --generator_steps=30

ckpts/digits/train.py and noisecutmix.finetune train the generators, augmentation.py draws their pictures, and
noisecutmix.compare trains the classifiers: all are run as a user runs them. Then it measures how natural the seams are
and how well the labels fit. The same command continues after a stop, and two processes of it share the work (set
OMP_NUM_THREADS=1 for each of them).
"""

import argparse
import contextlib
import csv
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
from noisecutmix.compare.statistics import explain_verdict, summarize
from noisecutmix.errors import InputError, RunError
from noisecutmix.files import atomic_file, create_file
from noisecutmix.plan import Box, Item, Plan, draw_mask
from noisecutmix.preview import AUG_COLOR, TARGET_COLOR
from noisecutmix.ranges import RANGES

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "ckpts" / "digits"))
import train as digits  # noqa: E402 (the script of the demo lies in no package)

SETS = {"noisecutmix": [], "stable_diffusion": ["--single_class"]}
ROWS = ("none", "cutmix", "stable_diffusion", "noisecutmix", "cutmix+noisecutmix")
BASELINE = "cutmix"
BATCH_SIZE = 32
# every number was fixed before any test digit was used; README says how the model was chosen
CLASSIFIER = [
    *("--model=test_resnet", "--no_pretrained", "--image_size=32", "--crop_scale=0.6", "--color_jitter=0"),
    *("--no_random_flip", "--probability=0.5", "--learning_rate=0.1", f"--batch_size={BATCH_SIZE}"),
    *("--num_workers=0", "--device=cpu"),
]
FINETUNING = [  # as in README's example, but for batches of 32
    *("--meta_class=digit", "--resolution=32", "--train_batch_size=32", "--learning_rate=5e-3"),
    *("--token_learning_rate=5e-3", "--lr_scheduler=cosine", "--no_random_flip", "--device=cpu"),
]
FINETUNING_STEPS = 1000
BUNDLED = "bundled"
# the digits that a base model knows, and those for which it is fine-tuned
HALVES = {"half_0": ("01234", "five to nine"), "half_1": ("56789", "zero to four")}
MAX_SEAMS = 64
BINS = 10


# Generators, pictures and classifiers


def run_script(script_file: str, *arguments: str, **environment: str) -> None:
    """Run a script of the repository, or a module of the package. Raises RunError if it fails."""
    print(f"{script_file} {' '.join(arguments)}", flush=True)
    start = [str(ROOT / script_file)] if script_file.endswith(".py") else ["-m", script_file]
    command = [sys.executable, *start, *arguments]
    if subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}).returncode:
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


def write_digits(folder: Path, pictures: np.ndarray, labels: np.ndarray) -> Path:
    return make_whole(folder, lambda made: digits.write_pictures(made, pictures, labels))


def train_digits(folder: Path, *flags: str) -> Path:
    return make_whole(folder, lambda made: run_script("ckpts/digits/train.py", *flags, f"--output_dir={made}"))


@dataclass
class Experiment:
    """The folder of an experiment; `options` are the flags."""

    work_dir: Path
    options: argparse.Namespace

    def __post_init__(self) -> None:
        train_images, self.labels, test_images, self.test_labels = digits.load_split()
        self.images, self.test_images = digits.enlarge(train_images), digits.enlarge(test_images)

    def comparisons(self) -> dict[str, list[Path]]:
        """Return, for each row of the table, the output folders of the comparisons whose seeds make it up."""
        columns, work_dir = {}, self.work_dir  # type: dict[str, list[Path]], Path
        halves = [half for half in HALVES if half in self.options.parts]
        for count in (10, 20):
            folders = [work_dir / half / f"{count}_a_class" / "answer" for half in halves]
            columns |= {f"{count} a class, {HALVES[half][1]}": [at] for half, at in zip(halves, folders)}
            columns |= {f"{count} a class, both": folders} if len(folders) > 1 else {}
        return columns

    def fill(self) -> None:
        """Work on the parts until all are done, on those first that as few other processes as possible have begun."""
        parts = {**dict.fromkeys(self.options.parts, self.use_half), BUNDLED: self.use_bundled}
        while missing := [part for part in parts if not (self.work_dir / part / "done").exists()]:
            part = min(missing, key=lambda part: len(list((self.work_dir / part).glob(".done.*"))))
            folder = self.work_dir / part
            folder.mkdir(exist_ok=True)
            with atomic_file(folder / "done"):  # its temporary name tells others that the part is begun
                parts[part](folder)

    def use_half(self, folder: Path) -> None:
        """Train a base on five digits, fine-tune it on few of the others, and compare classifiers of those."""
        (known, _), steps = HALVES[folder.name], self.options.generator_steps
        base = train_digits(folder / "base_model", f"--only_base_of={known}", f"--steps={steps}") / "base"
        finetuning = [*FINETUNING, f"--model={base}", f"--max_train_steps={min(steps, FINETUNING_STEPS)}"]
        new = [label for label in range(len(digits.CLASS_NAMES)) if str(label) not in known]
        for place in (folder / "10_a_class", folder / "20_a_class"):
            chosen = digits.choose_digits(self.labels, int(place.name[:2]))
            chosen = chosen[np.isin(self.labels[chosen], new)]
            pictures, labels, checkpoint = self.images[chosen], self.labels[chosen], place / "checkpoint"
            shifted = write_digits(place / "shifted", *digits.shift_all(pictures, labels))
            if not (checkpoint / "preview.png").exists():  # written last
                run_script("noisecutmix.finetune", f"--data_dir={shifted}", f"--output_dir={checkpoint}", *finetuning)
            self.draw_sets(place, f"--data_name={checkpoint}")
            self.classify(place, pictures, labels, place / "answer", ROWS, self.options.seeds)

    def use_bundled(self, folder: Path) -> None:
        """Draw pictures with the bundled generator, and train a classifier of all real digits that looks at them."""
        self.draw_sets(folder, "--data_name=digits")
        self.classify(folder, self.images, self.labels, folder / "all", ["none"], 1, "--save_weights")

    def draw_sets(self, folder: Path, *model: str) -> None:
        for name, more in SETS.items():
            if not (folder / name / "soft_label.npy").exists():  # written last
                flags = [*model, *more, f"--num_aug={self.options.num_aug}", "--device=cpu"]
                run_script("augmentation.py", *flags, f"--output_dir={folder / name}")

    def classify(
        self,
        folder: Path,
        pictures: np.ndarray,
        labels: np.ndarray,
        output_dir: Path,
        rows: Sequence[str],
        seeds: int,
        *more: str,
    ) -> None:
        """Compare classifiers of these digits with the sets in `folder`, and test them on all test digits of theirs."""
        if (output_dir / "results.json").exists():
            return
        is_tested = np.isin(self.test_labels, labels)
        train_dir = write_digits(folder / "pictures", pictures, labels)
        test_dir = write_digits(folder / "test", self.test_images[is_tested], self.test_labels[is_tested])
        baseline = BASELINE if BASELINE in rows else rows[0]
        epochs = -(-self.options.classifier_steps * BATCH_SIZE // len(pictures))
        run_script(
            "noisecutmix.compare",
            *(f"--train_dir={train_dir}", f"--test_dir={test_dir}", f"--output_dir={output_dir}", *CLASSIFIER, *more),
            *(f"--augmented={name}={folder / name}" for name in SETS),
            *("--rows", *rows, f"--baseline={baseline}", f"--seeds={seeds}", f"--epochs={epochs}"),
            OMP_NUM_THREADS="1",  # so small a model is fastest so, and the figures do not depend on the number of cores
        )


def compare(folders: Sequence[Path], seeds: int) -> dict[str, dict[str, Any]]:
    """Return the summary of comparisons of different classes, as if each seed had classified the pictures of all."""
    labels, is_right = [], {row: [] for row in ROWS}  # type: list[str], dict[str, list[np.ndarray]]
    for folder in folders:
        with open(folder / "test_pictures.csv", encoding="utf-8", newline="") as lines:
            table = list(csv.DictReader(lines))
        labels += [line["class"] for line in table]
        known = np.array([int(line["label"]) for line in table])
        for row in ROWS:
            predictions = (np.load(folder / "results" / f"predictions_{row}_seed{seed}.npy") for seed in range(seeds))
            is_right[row].append(np.stack([one.argmax(1) == known for one in predictions]))
    return summarize({row: np.concatenate(parts, 1) for row, parts in is_right.items()}, np.array(labels), BASELINE)


# The pictures themselves


class Reference:
    """The first classifier of row none that saw all training digits, and no generated picture."""

    def __init__(self, weights: Path):
        about = {key: json.loads(text) for key, text in safe_open(weights, "pt").metadata().items()}
        self._model = timm.create_model(**about["model"]).eval()
        self._model.load_state_dict(load_file(weights))
        self._transform = timm.data.create_transform(**about["transform"])
        self._order = [about["class_names"].index(name) for name in digits.CLASS_NAMES]

    @torch.no_grad()
    def __call__(self, folder: Path) -> np.ndarray:
        """Return the probabilities (items, 10), in the order of the digits, of an augmented set."""
        pictures = torch.stack([picture for picture, _ in AugmentedDataset(folder, self._transform)])
        return self._model(pictures).softmax(1)[:, self._order].numpy()

    def measure_named(self, folder: Path) -> float:
        """Return the percentage of single-class pictures whose class it names."""
        names = json.loads((folder / "run.json").read_text(encoding="utf-8"))["options"]["class_names"]
        wanted = [digits.CLASS_NAMES.index(names[label]) for label in AugmentedDataset(folder).soft_labels.argmax(1)]
        return 100 * float((self(folder).argmax(1) == wanted).mean())


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


def compare_seams(experiment: Experiment, items: Sequence[Item]) -> dict[str, float]:
    """Measure the seams of NoiseCutMix, of the same items' single pictures pasted, and of real digits there."""
    read = {name: AugmentedDataset(experiment.work_dir / BUNDLED / name, to_pixels) for name in SETS}
    items = [item for item in items[:MAX_SEAMS] if 0 < item.ratio < 1]
    plan = replace(default_plan(), single_class=True)
    generator = NoiseCutMixGenerator("cpu", "digits", plan=plan)
    augs = generator.draw([replace(item, target=item.aug, aug=item.target) for item in items])
    boxes, rng = [item.box for item in items], np.random.default_rng(0)
    pasted, real = [], []
    for item, aug in zip(items, augs):
        target = read["stable_diffusion"][item.index][0]
        pasted.append(np.where(np.array(item.mask()) > 0, target, to_pixels(aug)))
        real.append(np.float32(experiment.images[rng.choice(np.flatnonzero(experiment.labels == item.target))]))
    mixed = [read["noisecutmix"][item.index][0] for item in items]
    return {
        name: measure_seams(pictures, boxes)
        for name, pictures in (("NoiseCutMix", mixed), ("pasted", pasted), ("real digits", real))
    }


def default_plan() -> Plan:
    """Return the plan of augmentation.py --data_name=digits."""
    options = cli.parse_augmentation(["--data_name=digits"])
    return Plan(num_classes=len(options.classes.names), **cli.plan_arguments(options))


def measure_label_fit(probabilities: np.ndarray, items: Sequence[Item]) -> list[dict[str, float]]:
    """Return the reference classifier's mean probability of target and aug class in ten bins of the target's share."""
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


def draw_label_fit(bins: Sequence[dict[str, float]], file: Path) -> None:
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
    """Return the table in Markdown: mean, and difference to the baseline; *: it is significant."""
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
    comparisons, bundled = experiment.comparisons(), experiment.work_dir / BUNDLED
    reference = Reference(bundled / "all" / "weights" / "none.safetensors")
    plan = default_plan()
    items = list(plan.items(experiment.options.num_aug))
    generators = [*dict.fromkeys(answer.parent for answers in comparisons.values() for answer in answers), bundled]
    return {
        "accuracy": {column: compare(folders, experiment.options.seeds) for column, folders in comparisons.items()},
        "single_class_named": {
            folder.relative_to(experiment.work_dir).as_posix(): reference.measure_named(folder / "stable_diffusion")
            for folder in generators
        },
        "seams": compare_seams(experiment, items),
        "label_fit": measure_label_fit(reference(bundled / "noisecutmix"), items),
    }


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, count = parser.add_argument, cli.as_number(RANGES["num_aug"])
    add("--work_dir", type=Path, default=Path("outputs/accuracy"), metavar="DIR", help="folder to write into")
    parts = "halves of the digits to measure"
    add("--parts", nargs="*", choices=HALVES, default=list(HALVES), metavar="PART", help=parts)
    add("--seeds", type=count, default=20, metavar="N", help="classifiers a row and half")
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
    with atomic_file(work_dir / "accuracy.json") as file:
        file.write((json.dumps(results, indent=2) + "\n").encode())
    print(f"\nTest accuracy in percent, and paired difference to {BASELINE} ± its standard error:\n")
    print(format_table(results.pop("accuracy")))
    print(f"\n* {explain_verdict(len(ROWS) - 1, options.seeds)}")
    print("\nsingle_class_named: single-class pictures whose class a classifier of all digits names, in percent;")
    print("seams: mean step across the mask's border over that elsewhere; label_fit: mean probabilities by the ratio\n")
    print(json.dumps(results, indent=1))
    print(f"\nwrote {work_dir / 'accuracy.json'} and {work_dir / 'label_fit.png'}")


if __name__ == "__main__":
    script.run(main)

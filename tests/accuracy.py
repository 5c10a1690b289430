"""Does it help? Classifiers of handwritten digits, trained with and without NoiseCutMix, on a laptop.

uv run --group dev tests/accuracy.py --json=outputs/accuracy/accuracy.json
uv run --group dev tests/accuracy.py --work_dir=outputs/try --seeds=1 --num_aug=16 --steps=20 --generator_steps=30

Draws augmented sets with the bundled demo, and with two generators that are trained here on 20 digits a class. Then it
trains a small classifier for every row, column and seed, and measures how natural the seams are and how well the labels
fit. A second run in the same --work_dir trains no generator and draws nothing.
"""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from noisecutmix import AugmentedDataset, MixedDataset, NoiseCutMixGenerator, cli, script
from noisecutmix.errors import RunError
from noisecutmix.plan import Box, Item, Plan, create_plan, draw_mask, sample_box
from noisecutmix.preview import AUG_COLOR, TARGET_COLOR

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cpu"
NUM_CLASSES = 10
SIDE = 16  # of the classifier's input
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
LARGEST_SHIFT = 2  # pixels of the classifier's input: one of the 8x8 digit
AUGMENTED_SHARE = 0.5  # of the draws; fixed beforehand, as all the numbers here
ALPHA = 1.0  # of MixUp's and CutMix's Beta distribution
FEW, ALONE, ALL = "10 a class", "20 a class, generator too", "all"  # what a column's classifiers see of the real digits
FEW_DIGITS, ALONE_DIGITS = 10, 20  # a class
SUBSETS = 2  # of ALONE_DIGITS digits a class; each has a generator of its own
BASELINE = "CutMix"
MOST_SEAMS = 64
BINS = 10


def load_script(path: Path) -> Any:
    """Import a file that lies in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The pictures


def run_script(script_file: str, *arguments: str) -> None:
    """Run a script of the repository. Raises RunError where it fails."""
    status = subprocess.run([sys.executable, str(ROOT / script_file), *arguments], check=False).returncode
    if status:
        raise RunError(f"{script_file} failed, see above; another --work_dir starts again")


def draw_sets(work_dir: Path, num_aug: int, *model: str) -> tuple[dict[str, TensorDataset], Plan]:
    """Draw a generator's two sets; return them decoded, with the plan of both.

    `model`: --model and --ckpt_path, where it is not the bundled one.
    """
    flags = ["--data_name=digits", f"--num_aug={num_aug}", f"--device={DEVICE}", *model]
    sets = {"noisecutmix": [], "stable_diffusion": ["--single_class"]}
    for name, more in sets.items():
        run_script("augmentation.py", *flags, *more, f"--output_dir={work_dir / name}")  # it continues an earlier run
    plan = create_plan(cli.parse_augmentation(flags))
    return {name: decode(AugmentedDataset(work_dir / name, to_input)) for name in sets}, plan


def train_generator(work_dir: Path, subset: int, steps: int) -> tuple[str, str]:
    """Train the whole demo on a subset of the digits alone; return the flags that draw with it."""
    folder = work_dir / f"checkpoint_of_{steps}_steps"  # so that another number of steps trains another one
    checkpoint = folder / "shot-1-lora-rank10"
    if not (checkpoint / "preview.png").is_file():  # written last
        run_script(
            "ckpts/digits/train.py",
            f"--digits_a_class={ALONE_DIGITS}",
            f"--subset={subset}",
            f"--steps={steps}",
            f"--output_dir={folder}",
        )
    return f"--model={folder / 'base'}", f"--ckpt_path={checkpoint}"


def to_input(image: Image.Image) -> torch.Tensor:
    """Return a picture as the classifier takes it: (1, 16, 16), 0 to 1."""
    small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).float()[None] / 255


def to_pixels(image: Image.Image) -> np.ndarray:
    """Return a picture's brightness (height, width)."""
    return np.asarray(image.convert("L"), dtype=np.float32)


def decode(data_set: AugmentedDataset) -> TensorDataset:
    """Return the same items, decoded once."""
    pictures, soft_labels = zip(*data_set)
    return TensorDataset(torch.stack(pictures), torch.stack(soft_labels))


# The classifier


def mix_up(pictures: torch.Tensor, soft_labels: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    """Blend every picture of a batch with another one (Zhang et al., mixup, ICLR 2018)."""
    share = rng.beta(ALPHA, ALPHA)
    order = torch.from_numpy(rng.permutation(len(pictures)))
    return tuple(share * values + (1 - share) * values[order] for values in (pictures, soft_labels))


def cut_mix(pictures: torch.Tensor, soft_labels: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    """Paste a box of another picture into every one of a batch (Yun et al., CutMix, ICCV 2019)."""
    height, width = pictures.shape[-2:]
    mask = np.array(draw_mask(sample_box(height, width, ALPHA, rng), height, width)) > 0
    order = torch.from_numpy(rng.permutation(len(pictures)))
    share = mask.mean()
    pasted = torch.where(torch.from_numpy(mask), pictures[order], pictures)
    return pasted, share * soft_labels[order] + (1 - share) * soft_labels


class Row(NamedTuple):
    """A way to train: which set's pictures come in, and what mixes the batch."""

    name: str
    pictures: str | None = None
    mix: Callable[[torch.Tensor, torch.Tensor, np.random.Generator], tuple[torch.Tensor, ...]] | None = None


ROWS = (
    Row("none"),
    Row("MixUp", mix=mix_up),
    Row("CutMix", mix=cut_mix),
    Row("Stable Diffusion (one class, hard label)", "stable_diffusion"),
    Row("NoiseCutMix", "noisecutmix"),
    Row("CutMix + NoiseCutMix", "noisecutmix", cut_mix),
    Row("MixUp + NoiseCutMix", "noisecutmix", mix_up),
)


def build_classifier() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (SIDE // 4) ** 2, NUM_CLASSES),
    )


def shift(pictures: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Move each picture (B, 1, h, w) by up to two pixels a direction; black comes in."""
    count, _, height, width = pictures.shape
    padded = F.pad(pictures, (LARGEST_SHIFT,) * 4)
    top, left = torch.from_numpy(rng.integers(2 * LARGEST_SHIFT + 1, size=(2, count, 1)))
    rows, columns = top + torch.arange(height), left + torch.arange(width)  # (B, h), (B, w)
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def train(real: TensorDataset, extra: Dataset | None, mix: Callable | None, seed: int, steps: int) -> nn.Module:
    """Train a classifier; the seed decides weights, batches, shifts and mixing, whatever the row."""
    share = 0.0 if extra is None else AUGMENTED_SHARE
    mixed = MixedDataset(real, real if extra is None else extra, share, NUM_CLASSES, seed)
    batch_rng, shift_rng, mix_rng = np.random.default_rng(seed).spawn(3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = batch_rng.integers(len(real), size=(steps, BATCH_SIZE)).tolist()
    for pictures, soft_labels in DataLoader(mixed, batch_sampler=batches, generator=torch.Generator()):
        pictures = shift(pictures, shift_rng)
        if mix is not None:
            pictures, soft_labels = mix(pictures, soft_labels, mix_rng)
        loss = F.cross_entropy(model(pictures), soft_labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def measure_accuracy(model: nn.Module, test: TensorDataset) -> float:
    """Return the share of pictures named right, in percent; a soft label's class is its largest."""
    pictures, labels = test.tensors
    classes = labels.argmax(1) if labels.ndim == 2 else labels
    return 100 * float((model(pictures).argmax(1) == classes).float().mean())


class Trial(NamedTuple):
    """What the classifiers of one column and seed are trained on."""

    seed: int
    real: TensorDataset
    sets: dict[str, TensorDataset]


def choose_random(labels: np.ndarray, digits_a_class: int, seed: int) -> np.ndarray:
    """Return the indices of so many random digits of each class."""
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [rng.permutation(np.flatnonzero(labels == label))[:digits_a_class] for label in range(NUM_CLASSES)]
    )


def plan_trials(
    real: TensorDataset, sets: dict[str, TensorDataset], alone: Sequence[Trial], seeds: int
) -> dict[str, list[Trial]]:
    """Return the trials of each column; `alone` has one for each subset."""
    labels = real.tensors[1].numpy()
    few = [TensorDataset(*real[choose_random(labels, FEW_DIGITS, seed)]) for seed in range(seeds)]
    return {
        FEW: [Trial(seed, subset, sets) for seed, subset in enumerate(few)],
        ALONE: [trial._replace(seed=seed) for trial in alone for seed in range(seeds)],
        ALL: [Trial(seed, real, sets) for seed in range(seeds)],
    }


def measure_accuracies(
    trials: dict[str, list[Trial]], test: TensorDataset, steps: int
) -> dict[str, dict[str, list[float]]]:
    """Return the test accuracy of every trial, by row, by column."""
    accuracies = {column: {row.name: [] for row in ROWS} for column in trials}
    with tqdm(total=sum(map(len, trials.values())) * len(ROWS), unit="classifier") as bar:
        for column, column_trials in trials.items():
            for trial in column_trials:
                for row in ROWS:
                    model = train(trial.real, trial.sets.get(row.pictures), row.mix, trial.seed, steps)
                    accuracies[column][row.name].append(measure_accuracy(model, test))
                    bar.update()
    return accuracies


def summarize(accuracies: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Return mean, standard deviation and paired difference to CutMix of every row."""
    summary = {}
    for name, values in accuracies.items():
        differences = np.subtract(values, accuracies[BASELINE])
        difference, error = float(differences.mean()), deviation(differences) / math.sqrt(len(differences))
        summary[name] = {
            "accuracies": values,
            "mean": float(np.mean(values)),
            "standard_deviation": deviation(values),
            "difference_to_cutmix": difference,
            "standard_error": error,
            "exceeds_standard_error": len(values) > 1 and abs(difference) > error,
        }
    return summary


def deviation(values: Sequence[float] | np.ndarray) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


# The pictures themselves


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


def compare_seams(work_dir: Path, plan: Plan, num_items: int, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Measure the seams of NoiseCutMix, of the same items' single pictures pasted, and of real digits there."""
    read = {name: AugmentedDataset(work_dir / name, to_pixels) for name in ("noisecutmix", "stable_diffusion")}
    items = [item for item in plan.items(num_items) if 0 < item.ratio < 1]
    generator = NoiseCutMixGenerator(DEVICE, "digits", plan=replace(plan, single_class=True))
    augs = generator.draw([replace(item, target=item.aug, aug=item.target) for item in items])
    boxes = [item.box for item in items]
    rng = np.random.default_rng(0)
    mixed, pasted, real = [], [], []
    for item, aug_picture in zip(items, augs):
        mixed.append(read["noisecutmix"][item.index][0])
        target, aug = read["stable_diffusion"][item.index][0], to_pixels(aug_picture)
        pasted.append(np.where(np.array(draw_mask(item.box, *target.shape)) > 0, target, aug))
        real.append(images[rng.choice(np.flatnonzero(labels == item.target))].astype(np.float32))
    return {
        "items": len(items),
        "NoiseCutMix": measure_seams(mixed, boxes),
        "pasted": measure_seams(pasted, boxes),
        "real digits": measure_seams(real, boxes),
    }


@torch.no_grad()
def measure_label_fit(model: nn.Module, pictures: torch.Tensor, items: Sequence[Item]) -> list[dict[str, Any]]:
    """Return the classifier's mean probability of target and aug class in ten bins of the target's share."""
    probabilities = model(pictures).softmax(1).numpy()
    bins = [[item for item in items if min(int(item.ratio * BINS), BINS - 1) == number] for number in range(BINS)]
    return [
        {
            "ratio_from": number / BINS,
            "ratio_to": (number + 1) / BINS,
            "items": len(content),
            "mean_ratio": float(np.mean([item.ratio for item in content])) if content else None,
            "target": float(np.mean([probabilities[item.index, item.target] for item in content])) if content else None,
            "aug": float(np.mean([probabilities[item.index, item.aug] for item in content])) if content else None,
        }
        for number, content in enumerate(bins)
    ]


def draw_label_fit(bins: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot the probabilities against the label's share; where they fit, they lie on the thin lines."""
    figure = Figure(figsize=(7, 7), layout="constrained")  # inches
    axes = figure.add_subplot(xlim=(0, 1), ylim=(0, 1), xlabel="ratio r: the target class's share of the soft label")
    axes.set_ylabel("mean probability (thin: the soft label)")
    axes.grid(alpha=0.3)
    filled = [entry for entry in bins if entry["items"]]
    ratios = [entry["mean_ratio"] for entry in filled]
    for name, color, fit in (("target", TARGET_COLOR, (0, 1)), ("aug", AUG_COLOR, (1, 0))):
        color = [channel / 255 for channel in color]
        axes.plot((0, 1), fit, color=color, linewidth=1)
        axes.plot(ratios, [entry[name] for entry in filled], "o-", color=color, linewidth=3, label=f"{name} class")
    axes.legend()
    figure.savefig(file, metadata={"Software": None})


# The report


def format_table(summaries: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the table in Markdown."""
    cells = [["training"] + [title for column in summaries for title in (column, f"{column}, to {BASELINE}")]]
    for row in ROWS:
        cells.append([row.name])
        for summary in summaries.values():
            entry = summary[row.name]
            star = " *" if entry["exceeds_standard_error"] else ""
            difference = f"{entry['difference_to_cutmix']:+.2f} ± {entry['standard_error']:.2f}{star}"
            cells[-1] += [
                f"{entry['mean']:.1f} ± {entry['standard_deviation']:.1f}",
                "" if row.name == BASELINE else difference,
            ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def describe_exposure(num_real: int, num_test: int) -> str:
    """Say who saw what."""
    few, alone = NUM_CLASSES * FEW_DIGITS, NUM_CLASSES * ALONE_DIGITS
    return (
        f"Who saw what: the bundled generator was trained on all {num_real:,} training digits. At {FEW} the classifier "
        f"sees {few} of them, so in the rows with generated pictures the other {num_real - few:,} reach it by way of "
        f"the generator; the other rows have nothing of them. At {ALONE}, generator and classifier see the same "
        f"{alone} digits and nothing else ({SUBSETS} subsets, a generator each). With all digits both saw the same. "
        f"The {num_test} test digits were seen by no one, and nothing was tuned on them."
    )


def report(results: dict[str, Any]) -> None:
    seeds, steps = results["seeds"], results["steps"]
    print(
        f"\nTest accuracy in percent: mean ± standard deviation over {seeds} seeds ({SUBSETS} times as many "
        f"at {ALONE}), {steps} steps of {BATCH_SIZE} each."
    )
    print(f"To {BASELINE}: mean paired difference ± its standard error; *: the difference is larger than that.\n")
    print(format_table(results["accuracy"]))
    print(f"\n{results['who_saw_what']}")
    for number, subset in enumerate(results["subsets"]):
        print(
            f"Subset {number}: a classifier of its {NUM_CLASSES * ALONE_DIGITS} digits names the class of "
            f"{subset['single_class_named']:.1f} % of its generator's pictures under an all-white mask, and of "
            f"{subset['test_named']:.1f} % of the test digits."
        )
    seams = dict(results["seams"])
    print(f"\nSeams: jump across the mask's border over an ordinary pixel step, {seams.pop('items')} pictures each")
    for name, value in seams.items():
        print(f"  {name:<12} {value:.2f}")
    print(
        "\nLabel fit: mean probability by a classifier that saw all real training digits and no generated picture "
        f"({results['label_fit_classifier_accuracy']:.1f} % right on the test digits)"
    )
    print("  ratio r    pictures  target  aug")
    for entry in results["label_fit"]:
        ratios = f"{entry['ratio_from']:.1f} to {entry['ratio_to']:.1f}"
        shares = f"{entry['target']:>6.2f}  {entry['aug']:.2f}" if entry["items"] else f"{'-':>6}  -"
        print(f"  {ratios}  {entry['items']:>8}  {shares}")


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=cli.positive_int, default=10, metavar="N", help="classifiers a row and column")
    parser.add_argument("--steps", type=cli.positive_int, default=500, metavar="N", help="training steps of each")
    parser.add_argument("--num_aug", type=cli.positive_int, default=1000, metavar="N", help="pictures a generated set")
    parser.add_argument(
        "--generator_steps", type=cli.positive_int, default=3000, metavar="N", help="UNet steps of a generator"
    )
    parser.add_argument(
        "--work_dir", type=Path, default=Path("outputs/accuracy"), metavar="DIR", help="generated sets, label_fit.png"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all results (default: WORK_DIR/accuracy.json)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    work_dir, num_aug = arguments.work_dir, arguments.num_aug
    transformers_logging.set_verbosity_error()
    digits = load_script(ROOT / "ckpts" / "digits" / "train.py")
    train_images, train_labels, test_images, test_labels = digits.load_split()
    train_images, test_images = digits.enlarge(train_images), digits.enlarge(test_images)
    real, test = (
        TensorDataset(torch.stack([to_input(Image.fromarray(image)) for image in images]), torch.from_numpy(labels))
        for images, labels in ((train_images, train_labels), (test_images, test_labels))
    )

    # Draw with the bundled generator
    print("Pictures of the bundled generator", flush=True)
    sets, plan = draw_sets(work_dir, num_aug)
    num_seams = min(MOST_SEAMS, num_aug)

    # Train generators on few digits, and draw with them
    alone = []
    for subset in range(SUBSETS):
        print(f"Generator of {ALONE_DIGITS} digits a class, subset {subset}", flush=True)
        folder = work_dir / f"subset_{subset}"
        model = train_generator(folder, subset, arguments.generator_steps)
        chosen = digits.choose_digits(train_labels, ALONE_DIGITS, subset)
        alone.append(Trial(arguments.seeds, TensorDataset(*real[chosen]), draw_sets(folder, num_aug, *model)[0]))

    # Train classifiers and measure
    print("Classifiers")
    torch.set_num_threads(1)  # so small a model is fastest so, and the figures do not depend on the number of cores
    accuracies = measure_accuracies(plan_trials(real, sets, alone, arguments.seeds), test, arguments.steps)
    judge, *subset_judges = (
        train(trial.real, None, None, trial.seed, arguments.steps)
        for trial in [Trial(arguments.seeds, real, sets), *alone]
    )
    items = list(plan.items(num_aug))
    results = {
        "seeds": arguments.seeds,
        "steps": arguments.steps,
        "num_aug": num_aug,
        "augmented_share": AUGMENTED_SHARE,
        "who_saw_what": describe_exposure(len(real), len(test)),
        "accuracy": {column: summarize(values) for column, values in accuracies.items()},
        "subsets": [
            {
                "single_class_named": measure_accuracy(subset_judge, trial.sets["stable_diffusion"]),
                "test_named": measure_accuracy(subset_judge, test),
            }
            for subset_judge, trial in zip(subset_judges, alone)
        ],
        "seams": compare_seams(work_dir, plan, num_seams, train_images, train_labels),
        "label_fit_classifier_accuracy": measure_accuracy(judge, test),
        "label_fit": measure_label_fit(judge, sets["noisecutmix"].tensors[0], items),
    }

    # Report
    draw_label_fit(results["label_fit"], work_dir / "label_fit.png")
    report(results)
    print(f"\nwrote {work_dir / 'label_fit.png'}")
    results_file = arguments.json or work_dir / "accuracy.json"
    results_file.parent.mkdir(parents=True, exist_ok=True)
    results_file.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {results_file}")


if __name__ == "__main__":
    script.run(main)

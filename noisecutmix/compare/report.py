"""The report of a comparison: differences between rows and their errors, as a table, a plot and a file of values."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import launch
from ..files import atomic_file
from .comparison import MIN_ACCURACY, REFERENCE, Comparison, describe_weak_reference
from .recipe import read_row
from .sets import PUBLISHED

MIN_SEEDS = 3  # from which an error can be told
SIGNIFICANCE = 0.05  # of the whole table: largest probability that it calls any of two equal rows better
EQUAL = "no difference can be told"
NO_ERROR = f"no error can be told: it needs {MIN_SEEDS} seeds and two test pictures"


@dataclass(frozen=True)
class Score:
    """The top-1 accuracy of a classifier on the test pictures, in percent: of all, and the mean over the classes."""

    top1: float
    per_class: float


def score(is_right: np.ndarray, labels: np.ndarray) -> Score:
    """Return the score of a classifier.

    Args:
        is_right: (pictures,), whether the classifier names the class of each picture right.
        labels: (pictures,), the class of each picture; every class has at least one.
    """
    per_class = [is_right[labels == label].mean() for label in np.unique(labels)]
    return Score(100 * float(is_right.mean()), 100 * float(np.mean(per_class)))


def summarize(is_right: dict[str, np.ndarray], labels: np.ndarray, baseline: str) -> dict[str, dict[str, Any]]:
    """Return for each row, as JSON values, means, standard deviations, and the paired difference to the baseline.

    A row is better or worse if Student's t, with the standard error of `standard_error` and one degree of freedom less
    than there are seeds, is significant at 5 % after Holm's correction for the number of rows (Holm, A simple
    sequentially rejective multiple test procedure, Scandinavian Journal of Statistics, 1979).

    Args:
        is_right: for each row (seeds, pictures), whether the seed's classifier names the picture right.
        labels: (pictures,), the class of each picture.
        baseline: the row with which the others are compared, seed by seed and picture by picture.
    """
    from scipy.stats import t as student

    summary: dict[str, dict[str, Any]] = {}
    p_values: dict[str, float] = {}
    for row, of_row in is_right.items():
        scores = [score(one, labels) for one in of_row]
        differences = 100 * (of_row.astype(float) - is_right[baseline])
        difference, error = float(differences.mean()), standard_error(differences)
        top1, per_class = [entry.top1 for entry in scores], [entry.per_class for entry in scores]
        summary[row] = {
            "top1": top1,
            "top1_mean": float(np.mean(top1)),
            "top1_standard_deviation": _deviation(top1),
            "per_class": per_class,
            "per_class_mean": float(np.mean(per_class)),
            "per_class_standard_deviation": _deviation(per_class),
            "difference": difference,
            "standard_error": error,
            "p_value": None,
            "verdict": "baseline" if row == baseline else NO_ERROR,
        }
        if row != baseline and error is not None:
            freedom = min(differences.shape) - 1  # of the seeds; as few test pictures count, too
            p_values[row] = float(2 * student.sf(abs(difference) / error, freedom))
    adjusted = 0.0
    for rank, row in enumerate(sorted(p_values, key=lambda row: p_values[row])):
        adjusted = min(max(adjusted, (len(p_values) - rank) * p_values[row]), 1.0)
        verdict = "better" if summary[row]["difference"] > 0 else "worse"
        summary[row] |= {"p_value": adjusted, "verdict": verdict if adjusted < SIGNIFICANCE else EQUAL}
    return summary


def standard_error(differences: np.ndarray) -> float | None:
    """Return the standard error of a mean paired difference, None with fewer than three seeds or two pictures.

    It is the root of two variances of the mean: over the seeds, and over the test pictures, which are a sample, too.
    What varies with both is in both, so the sum is rather too large (the two-way layout of Owen, The pigeonhole
    bootstrap, Annals of Applied Statistics, 2007). To the pictures, one gained and one lost by all seeds are added, so
    that a few pictures without any variance are no proof (in the spirit of Agresti and Min, Statistics in Medicine,
    2005).

    Args:
        differences: (seeds, pictures), in percent: -100, 0 or 100.
    """
    seeds, pictures = differences.shape
    if seeds < MIN_SEEDS or pictures < 2:
        return None
    by_picture = np.append(differences.mean(0), (100.0, -100.0))
    variances = differences.mean(1).var(ddof=1) / seeds, by_picture.var(ddof=1) / len(by_picture)
    return math.sqrt(sum(variances))


def explain_verdict(num_compared: int, seeds: int) -> str:
    """Return the sentence that says when a row of the table is better or worse."""
    return (
        f"A row is better or worse where Student's t with {seeds} seeds, whose error is that of the seeds and of the "
        f"test pictures together, is significant at 5 % after Holm's correction for {num_compared} comparisons."
    )


def write_report(comparison: Comparison, baseline: str, num_leaked: int, tests_on_share: bool) -> None:
    """Write results.json, results.md and accuracy.png, the same whoever does it; print the table.

    Args:
        comparison: with the predictions of all jobs.
        baseline: the row with which the others are compared.
        num_leaked: the number of pictures that are for training and for the test, too.
        tests_on_share: whether the test pictures are a share of those in --train_dir.
    """
    recipe, sets, num_train = comparison.recipe, comparison.sets, len(comparison.train.files)

    # Differences and their errors
    is_right = {
        row: np.stack([comparison.read_right((row, seed)) for seed in range(comparison.seeds)])
        for row in comparison.rows
    }
    summary = summarize(is_right, np.array(comparison.test.labels), baseline)

    # How many pictures classifier and generator have seen
    seen: dict[str, Sequence[str]] = {"": ("real pictures seen by the classifier", "by the generator", "augmented")}
    for row, entry in summary.items():
        _, name = read_row(row)
        entry["real_pictures"] = num_train
        num_seen, _ = (sets[name].seen or (None, 0)) if name else (0, 0)
        entry["real_pictures_of_generator"] = num_seen
        entry["augmented_pictures"] = len(comparison.find_kept(name)) if name else 0
        seen[row] = (
            f"{num_train}",
            "" if not name else PUBLISHED.get(sets[name].checkpoint, "unknown") if num_seen is None else f"{num_seen}",
            f"{entry['augmented_pictures']}" if name else "",
        )

    # What the reader has to know
    notes = [
        f"Test accuracy of {recipe.model} on {len(comparison.test.files)} pictures after the last of {recipe.epochs} "
        f"epochs, mean ± standard deviation over {comparison.seeds} seeds. Beside it is the paired difference to "
        f"{baseline} ± its standard error. Nothing was chosen on the test pictures."
    ]
    if comparison.seeds >= MIN_SEEDS and len(comparison.rows) > 1:
        notes.append(explain_verdict(len(comparison.rows) - 1, comparison.seeds))
    if num_without := len(comparison.test.class_names) - len(set(comparison.test.labels)):
        notes.append(f"The test has no picture of {num_without} classes; they are not scored.")
    if num_leaked:
        notes.append(f"Warning: {num_leaked} pictures are among those for training and for the test, too.")
    # with the same seed, the generator's pictures are among the first in the same order
    if tests_on_share and any(
        chosen.seen is None or chosen.seen[0] > num_train or chosen.seen[1] != comparison.seed
        for chosen in sets.values()
    ):
        notes.append(
            "The test pictures are a part of --train_dir. A generator that was fine-tuned on all of it has seen them: "
            "then the rows with augmented pictures come out too good, and only --test_dir is fair."
        )
    for name, chosen in sets.items():
        if chosen.checkpoint == "flower":
            notes.append(
                f"Warning: {name} was drawn with Diff-Mix's flower checkpoint, which was trained on a random half of "
                "all pictures, so it may have seen half of the published test pictures: its rows may come out too good."
            )
        elif chosen.checkpoint and not comparison.test.published:
            notes.append(
                f"Warning: {name} was drawn with Diff-Mix's {chosen.checkpoint} checkpoint, which has seen the "
                "published training pictures; only the published test pictures are new to it."
            )
    if sets and comparison.result_file(REFERENCE).exists():
        top1 = comparison.read_top1(REFERENCE)
        pictures = ", ".join(f"highest_loss_{name}.png" for name in sets)
        weak = describe_weak_reference(top1)
        looks = f"Look at the augmented pictures on which the first classifier of row none is worst: {pictures}."
        notes.append(f"{weak}." if top1 < MIN_ACCURACY else looks)

    # The files
    table = format_table(summary, baseline, seen)
    results = {"baseline": baseline, "seeds": comparison.seeds, "leaked_pictures": num_leaked, "rows": summary}
    text = "\n\n".join([table, *notes]) + "\n"
    for name, content in (
        ("results.json", json.dumps(results, indent=2).encode()),
        ("results.md", text.encode()),
        ("accuracy.png", plot_accuracies(summary, f"{recipe.model}, {comparison.seeds} seeds")),
    ):
        with atomic_file(comparison.root / name) as file:
            file.write(content)
    if launch.is_first_process():
        print(text)


def format_table(summary: dict[str, dict[str, Any]], baseline: str, seen: dict[str, Sequence[str]]) -> str:
    """Return the table in Markdown.

    Args:
        summary: see `summarize`.
        baseline: the row with which the others are compared.
        seen: for each row how many real pictures the classifier and the generator saw, and how many augmented pictures
            the classifier chose from; the titles of these columns under the key "".
    """
    lines = [["training", "top-1 (%)", "mean per class (%)", f"difference to {baseline}", "verdict", *seen[""]]]
    for row, entry in summary.items():
        difference = f"{entry['difference']:+.2f}"
        if entry["standard_error"] is not None:
            difference += f" ± {entry['standard_error']:.2f}"
        means = [
            _with_deviation(entry[f"{name}_mean"], entry[f"{name}_standard_deviation"])
            for name in ("top1", "per_class")
        ]
        lines.append([row, *means, "" if row == baseline else difference, entry["verdict"], *seen[row]])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot_accuracies(summary: dict[str, dict[str, Any]], title: str) -> bytes:
    """Return a PNG file: a dot for the top-1 accuracy of every seed, and a line at every row's mean."""
    from matplotlib.figure import Figure

    rows = list(summary)
    figure = Figure(figsize=(7, 1.2 + 0.4 * len(rows)), layout="constrained")  # inches
    axes = figure.add_subplot(xlabel="top-1 test accuracy (%)", title=title)
    for place, row in enumerate(rows):
        values = summary[row]["top1"]
        heights = np.linspace(place - 0.2, place + 0.2, len(values))  # equal values do not hide each other
        axes.plot(values, heights, "o", color="tab:blue", alpha=0.5)
        mean = summary[row]["top1_mean"]
        axes.plot([mean, mean], [place - 0.35, place + 0.35], color="tab:red", linewidth=2)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row at the top
    axes.grid(axis="x", alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    return content.getvalue()


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _with_deviation(mean: float, deviation: float | None) -> str:
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"

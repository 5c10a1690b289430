"""The results of ckpts/classify.py: differences between rows and their errors, as a table and as a plot."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FEWEST_SEEDS = 3  # from which an error can be told
STANDARD_ERRORS = 2  # below so many, no difference can be told


@dataclass(frozen=True)
class Score:
    """The top-1 accuracy of a classifier on the test pictures, in percent: of all, and the mean over the classes."""

    top1: float
    per_class: float


def score(probabilities: np.ndarray, labels: np.ndarray) -> Score:
    """Return the score of predictions.

    Args:
        probabilities: (pictures, classes).
        labels: (pictures,), the class of each picture; every class has at least one.
    """
    is_right = probabilities.argmax(1) == labels
    per_class = [is_right[labels == label].mean() for label in np.unique(labels)]
    return Score(100 * float(is_right.mean()), 100 * float(np.mean(per_class)))


def summarize(scores: dict[str, list[Score]], baseline: str) -> dict[str, dict[str, Any]]:
    """Return for each row, as JSON values, means, standard deviations, and the paired difference to the baseline.

    Args:
        scores: for each row one score a seed, in the order of the seeds.
        baseline: the row with which the others are compared, seed by seed.
    """
    summary = {}
    for row, of_row in scores.items():
        top1, per_class = [entry.top1 for entry in of_row], [entry.per_class for entry in of_row]
        differences = [mine - other.top1 for mine, other in zip(top1, scores[baseline])]
        difference, deviation = float(np.mean(differences)), _deviation(differences)
        has_error = len(differences) >= FEWEST_SEEDS and deviation is not None
        error = deviation / math.sqrt(len(differences)) if has_error and deviation is not None else None
        summary[row] = {
            "top1": top1,
            "top1_mean": float(np.mean(top1)),
            "top1_standard_deviation": _deviation(top1),
            "per_class": per_class,
            "per_class_mean": float(np.mean(per_class)),
            "per_class_standard_deviation": _deviation(per_class),
            "difference": difference,
            "standard_error": error,
            "verdict": "baseline" if row == baseline else _verdict(difference, error),
        }
    return summary


def format_table(summary: dict[str, dict[str, Any]], baseline: str, seen: dict[str, Sequence[str]]) -> str:
    """Return the table in Markdown.

    Args:
        summary: see `summarize`.
        baseline: the row with which the others are compared.
        seen: for each row how many real pictures the classifier and the generator saw, and how many augmented pictures
            the classifier chose from; the titles of these columns under the key "".
    """
    lines = [["training", "top-1 (%)", "mean per class (%)", f"to {baseline}", "", *seen[""]]]
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


def explain_loading(weights: Path, picture: Path) -> str:
    """Return the lines of Python that name the class of a picture by the weights of a classifier."""
    return f"""\
import json; import timm; from PIL import Image; from safetensors.torch import safe_open, load_file
about = {{key: json.loads(text) for key, text in safe_open({str(weights)!r}, "pt").metadata().items()}}
model = timm.create_model(**about["model"]).eval(); model.load_state_dict(load_file({str(weights)!r}))
picture = timm.data.create_transform(**about["transform"])(Image.open({str(picture)!r}).convert("RGB"))
print(about["class_names"][int(model(picture[None]).argmax())])"""


def _verdict(difference: float, error: float | None) -> str:
    if error is None:
        return f"no error can be told with fewer than {FEWEST_SEEDS} seeds"
    if abs(difference) <= STANDARD_ERRORS * error:
        return "no difference can be told"
    return "better" if difference > 0 else "worse"


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _with_deviation(mean: float, deviation: float | None) -> str:
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"

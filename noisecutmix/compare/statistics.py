"""Differences between the rows of a comparison, and their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

MIN_SEEDS = 3  # from which an error can be told
SIGNIFICANCE = 0.05  # of the whole table: largest probability that it calls any of two equal rows better
EQUAL = "no difference can be told"
NO_ERROR = f"no error can be told: it needs {MIN_SEEDS} seeds and two test pictures"


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
    _, place, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    weights = len(labels) / (len(sizes) * sizes[place])  # with which the mean over pictures is that over classes
    for row, of_row in is_right.items():
        differences = 100 * (of_row.astype(float) - is_right[baseline])
        difference, error = float(differences.mean()), standard_error(differences)
        top1, per_class = ((100 * (of_row * weight).mean(1)).tolist() for weight in (1, weights))
        summary[row] = {
            "top1": top1,
            "top1_mean": float(np.mean(top1)),
            "top1_standard_deviation": _deviation(top1),
            "per_class": per_class,
            "per_class_mean": float(np.mean(per_class)),
            "per_class_standard_deviation": _deviation(per_class),
            "difference": difference,
            "standard_error": error,
            "per_class_difference": float((differences * weights).mean()),
            "per_class_standard_error": standard_error(differences * weights),
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


def compare_classes(
    is_right: dict[str, np.ndarray], labels: np.ndarray, baseline: str
) -> dict[str, tuple[np.ndarray, np.ndarray, list[float | None]]]:
    """Return for each row, by the test's classes: accuracy in percent, difference to the baseline, standard error."""
    of_classes = {}
    for row, of_row in is_right.items():
        differences = 100 * (of_row.astype(float) - is_right[baseline])
        parts = [labels == label for label in np.unique(labels)]
        of_classes[row] = (
            np.array([100 * of_row[:, part].mean() for part in parts]),
            np.array([differences[:, part].mean() for part in parts]),
            [standard_error(differences[:, part]) for part in parts],
        )
    return of_classes


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None

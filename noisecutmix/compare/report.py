"""The report of a comparison: differences between rows and classes as tables, a plot and files of values."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import launch
from ..files import write_file, write_png
from .comparison import MIN_ACCURACY, REFERENCE, Comparison, describe_weak_reference
from .figures import count_confusions, draw_gained_and_lost, plot_accuracies, plot_confusions
from .recipe import read_row
from .sets import PUBLISHED
from .statistics import MIN_SEEDS, compare_classes, explain_verdict, summarize

GAINED_LOST_FILE = "gained_lost.png"


def write_report(comparison: Comparison, baseline: str, num_leaked: int, tests_on_share: bool) -> None:
    """Write results.json, results.md, per_class.csv and the figures, the same whoever does it; print the table.

    Args:
        comparison: with the predictions of all jobs.
        baseline: the row with which the others are compared.
        num_leaked: the number of pictures that are for training and for the test, too.
        tests_on_share: whether the test pictures are a share of those in --train_dir.
    """
    recipe, sets, num_train = comparison.recipe, comparison.sets, len(comparison.train.files)

    # Differences and their errors
    test_labels, class_names = np.array(comparison.test.labels), comparison.train.class_names
    seeds = range(comparison.seeds)
    predicted = {row: np.stack([comparison.read_predicted((row, n)) for n in seeds]) for row in comparison.rows}
    is_right = {row: values == test_labels for row, values in predicted.items()}
    summary = summarize(is_right, test_labels, baseline)

    # How many pictures classifier and generator have seen
    seen: dict[str, Sequence[str]] = {"": ("real pictures seen by the classifier", "by the generator", "augmented")}
    for row, entry in summary.items():
        _, name = read_row(row)
        by_generator = sets[name].seen if name else (0, None, 0)
        num_seen = by_generator[0] if by_generator else None
        kept = len(comparison.find_kept(name)) if name else 0
        entry |= {"real_pictures": num_train, "real_pictures_of_generator": num_seen, "augmented_pictures": kept}
        seen[row] = (f"{num_train}", "", "")
        if name:
            known = PUBLISHED.get(sets[name].checkpoint, "unknown") if num_seen is None else f"{num_seen}"
            seen[row] = (f"{num_train}", known, f"{kept}")

    # Which classes gain, and whether they are those of which there are many augmented pictures
    counts = {name: chosen.pictures.soft_labels[comparison.find_kept(name)].sum(0) for name, chosen in sets.items()}
    of_classes = compare_classes(is_right, test_labels, baseline)

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
    if tests_on_share and any(may_have_seen_share(chosen.seen, comparison) for chosen in sets.values()):
        notes.append(
            "The test pictures are a part of --train_dir. A generator that was fine-tuned on all of it has seen them: "
            "then the rows with augmented pictures come out too good, and only --test_dir is fair."
        )
    for name, chosen in sets.items():
        if chosen.checkpoint == "flower":
            half = "a random half of all pictures, so also of the published test's: its rows may come out too good"
            notes.append(f"Warning: {name} was drawn with Diff-Mix's flower checkpoint, which has seen {half}.")
        elif chosen.checkpoint and not comparison.test.published:
            known = f"{chosen.checkpoint} checkpoint, which has seen the published training pictures"
            notes.append(f"Warning: {name} was drawn with Diff-Mix's {known}; only the published test is new to it.")
    if sets and comparison.result_file(REFERENCE).exists():
        top1 = comparison.read_top1(REFERENCE)
        pictures = ", ".join(f"highest_loss_{name}.png" for name in sets)
        weak = describe_weak_reference(top1)
        looks = f"Look at the augmented pictures on which the first classifier of row none is worst: {pictures}."
        notes.append(f"{weak}." if top1 < MIN_ACCURACY else looks)

    for row in comparison.rows:
        if name := read_row(row)[1]:
            notes += explain_gain(row, of_classes[row][1], counts[name], test_labels)

    # The figures
    figures = {"accuracy.png": plot_accuracies(summary, f"{recipe.model}, {comparison.seeds} seeds")}
    best = find_best(summary, [row for row in comparison.rows if row != baseline])
    shown = {row: predicted[row] for row in (baseline, best) if row}
    confusions = {row: count_confusions(values, test_labels, len(class_names)) for row, values in shown.items()}
    figures["confusion.png"] = plot_confusions(confusions, class_names)
    augmented = find_best(summary, [row for row in comparison.rows if read_row(row)[1] and row != baseline]) or best
    of_row = counts.get(read_row(augmented)[1])
    grid = draw_gained_and_lost(comparison.test, predicted, baseline, augmented or baseline, of_row)
    if grid:
        write_png(comparison.root / GAINED_LOST_FILE, grid)
    else:  # an earlier one may be of another baseline
        (comparison.root / GAINED_LOST_FILE).unlink(missing_ok=True)

    # The files
    table = format_table(summary, baseline, seen)
    results = {"baseline": baseline, "seeds": comparison.seeds, "leaked_pictures": num_leaked, "rows": summary}
    text = "\n\n".join([table, *notes]) + "\n"
    for name, content in (
        ("results.json", json.dumps(results, indent=2).encode()),
        ("results.md", text.encode()),
        ("per_class.csv", format_classes(of_classes, counts, class_names, test_labels).encode()),
        *figures.items(),
    ):
        write_file(comparison.root / name, content)
    if launch.is_first_process():
        print(text)


def find_best(summary: dict[str, dict[str, Any]], rows: Sequence[str]) -> str:
    """Return the row with the highest accuracy, "" without rows."""
    return max(rows, key=lambda row: float(summary[row]["top1_mean"]), default="")


def format_progress(comparison: Comparison) -> str:
    """Return a table in Markdown of the classifiers that are trained already; without verdicts, which need all."""
    lines = ["| training | classifiers | top-1 so far (%) |", "|---|---|---|"]
    for row in comparison.rows:
        done = [job for job in comparison.jobs if job[0] == row and comparison.is_done(job)]
        mean = f"{np.mean([comparison.read_top1(job) for job in done]):.1f}" if done else ""
        lines.append(f"| {row} | {len(done)} of {comparison.seeds} | {mean} |")
    return "\n".join(lines)


def explain_gain(row: str, differences: np.ndarray, counts: np.ndarray, labels: np.ndarray) -> list[str]:
    """Return a sentence: do the classes gain of which there are many augmented pictures? [] if they cannot be ranked.

    Args:
        row: its name.
        differences: (classes of the test,), to the baseline.
        counts: (classes,), sum of the augmented set's soft labels.
        labels: (pictures,), the class of each test picture.
    """
    from scipy.stats import spearmanr

    counts = counts[np.unique(labels)]
    if len(counts) < 3 or len(set(counts.tolist())) == 1 or len(set(differences.tolist())) == 1:
        return []
    correlation, error = float(spearmanr(counts, differences).statistic), 1 / math.sqrt(len(counts) - 1)
    verdict = "no relation can be told" if abs(correlation) < 2 * error else "so the two are related"
    return [
        f"{row}: over {len(counts)} classes, the rank correlation of the augmented pictures of a class (the sum of its "
        f"labels) and its difference is {correlation:+.2f}, with an error of {error:.2f} if there is none: {verdict}."
    ]


def format_classes(
    of_classes: dict[str, tuple[np.ndarray, np.ndarray, list[float | None]]],
    counts: dict[str, np.ndarray],
    class_names: Sequence[str],
    labels: np.ndarray,
) -> str:
    """Return per_class.csv: what `compare_classes` returns, test pictures, and augmented pictures of each class."""
    content = io.StringIO()
    table = csv.writer(content, lineterminator="\n")
    columns = [f"{row} {what}" for row in of_classes for what in ("accuracy", "difference", "standard error")]
    table.writerow(["class", "test pictures", *(f"augmented pictures in {name}" for name in counts), *columns])
    for place, label in enumerate(np.unique(labels)):
        numbers = [f"{of_set[label]:.2f}" for of_set in counts.values()]
        for accuracy, differences, errors in of_classes.values():
            error = errors[place]
            numbers += [f"{accuracy[place]:.2f}", f"{differences[place]:+.2f}", "" if error is None else f"{error:.2f}"]
        table.writerow([class_names[label], (labels == label).sum(), *numbers])
    return content.getvalue()


def may_have_seen_share(seen: tuple[int, int | None, int] | None, comparison: Comparison) -> bool:
    """Return whether a generator may have been fine-tuned on pictures of the share of --train_dir that is the test.

    With the same seed, the first pictures of a class come first in fine-tuning, too, and the share is the last ones.
    """
    if seen is None or seen[1] is None or seen[2] != comparison.seed:
        return True
    train, test = (np.bincount(p.labels, minlength=len(p.class_names)) for p in (comparison.train, comparison.test))
    used = np.minimum(seen[1], train + test)
    return seen[0] != used.sum() or bool((used > train).any())


def format_table(summary: dict[str, dict[str, Any]], baseline: str, seen: dict[str, Sequence[str]]) -> str:
    """Return the table in Markdown.

    Args:
        summary: see `summarize`.
        baseline: the row with which the others are compared.
        seen: for each row how many real pictures the classifier and the generator saw, and how many augmented pictures
            the classifier chose from; the titles of these columns under the key "".
    """
    to_baseline = f"difference to {baseline}"
    lines = [["training", "top-1 (%)", to_baseline, "verdict", "mean per class (%)", "its difference", *seen[""]]]
    for row, entry in summary.items():
        scores = ((entry[f"{name}_mean"], entry[f"{name}_standard_deviation"]) for name in ("top1", "per_class"))
        top1, per_class = (_with_error(*score, ".1f") for score in scores)
        pairs = [(entry[f"{name}difference"], entry[f"{name}standard_error"]) for name in ("", "per_class_")]
        difference, of_classes = ("" if row == baseline else _with_error(*pair, "+.2f") for pair in pairs)
        lines.append([row, top1, difference, entry["verdict"], per_class, of_classes, *seen[row]])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _with_error(value: float, error: float | None, form: str) -> str:
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:{form.lstrip('+')}}"

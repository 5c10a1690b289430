"""The figures of a comparison: accuracies, confused classes, pictures gained and lost, those of the highest loss."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..photos import Photos, crop_square
from ..preview import MAX_PICTURES, SIDE, Caption, draw_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .. import AugmentedDataset

MAX_CLASSES, MAX_PAIRS = 30, 30  # of a matrix of confusions; of the pairs that are shown beyond it
LABEL_COLOR, PREDICTION_COLOR, BASELINE_COLOR = (0, 0, 0), (148, 60, 189), (31, 119, 180)


def plot_accuracies(summary: dict[str, dict[str, Any]], title: str) -> bytes:
    """Return a PNG file: a dot for the top-1 accuracy of every seed, and a line at every row's mean."""
    rows = list(summary)
    figure = _create_figure(7, 1.2 + 0.4 * len(rows))
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
    return _as_png(figure)


def count_confusions(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return (classes, classes): which percentage of the pictures of a class (row) is predicted as which (column).

    Args:
        predicted: (seeds, pictures), the predicted classes.
        labels: (pictures,), the true ones.
        num_classes: the number of classes; the row of one without a picture is 0.
    """
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (np.broadcast_to(labels, predicted.shape), predicted), 1)
    counts *= 100 / np.maximum(counts.sum(1, keepdims=True), 1)
    return counts


def plot_confusions(confusions: dict[str, np.ndarray], class_names: Sequence[str]) -> bytes:
    """Return a PNG file: the confusions of one or two rows side by side, see `count_confusions`.

    Beyond 30 classes, it has the 30 pairs of classes that are confused most, in the mean of the rows.
    """
    names = [_as_label(name, label) for label, name in enumerate(class_names)]
    if len(names) > MAX_CLASSES:
        return _plot_pairs(confusions, names)
    figure = _create_figure(2 + (2.2 + 0.25 * len(names)) * len(confusions), 2.2 + 0.25 * len(names))
    highest = max(float((values * (1 - np.eye(len(names)))).max()) for values in confusions.values())
    panels = figure.subplots(1, len(confusions), squeeze=False, sharey=True)[0]
    for axes, (row, values) in zip(panels, confusions.items()):
        wrong = np.ma.masked_array(values, np.eye(len(names), dtype=bool))
        image = axes.imshow(wrong, cmap="Reds", vmin=0, vmax=max(highest, 1.0))
        for label, share in enumerate(np.diag(values)):
            axes.text(label, label, f"{share:.0f}", ha="center", va="center", fontsize=7)
        axes.set(title=f"{row}: right on the diagonal (%)", xlabel="predicted", ylabel="true class")
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        figure.colorbar(image, ax=axes, label="% of the class", shrink=0.8)
    return _as_png(figure)


def _plot_pairs(confusions: dict[str, np.ndarray], names: Sequence[str]) -> bytes:
    mean = np.mean(list(confusions.values()), axis=0) * (1 - np.eye(len(names)))
    order = np.argsort(-mean, axis=None, kind="stable")[:MAX_PAIRS]
    pairs = [(int(place // len(names)), int(place % len(names))) for place in order if mean.flat[place]]
    figure = _create_figure(9, 1.6 + 0.3 * len(pairs))
    axes = figure.add_subplot(xlabel="% of the class", title=f"the {len(pairs)} pairs that are confused most")
    heights, step = np.arange(len(pairs)), 0.8 / len(confusions)
    for number, (row, values) in enumerate(confusions.items()):
        axes.barh(heights + number * step, [values[pair] for pair in pairs], step, label=row)
    first, *others = confusions.values()
    changes = [f" ({others[0][pair] - first[pair]:+.0f})" if others else "" for pair in pairs]
    labels = [f"{names[true]} as {names[other]}{change}" for (true, other), change in zip(pairs, changes)]
    axes.set_yticks(heights + (len(confusions) - 1) * step / 2, labels, fontsize=8)
    axes.invert_yaxis()
    axes.legend()
    return _as_png(figure)


def draw_gained_and_lost(
    test: Photos, predicted: dict[str, np.ndarray], baseline: str, row: str, counts: np.ndarray | None
) -> Image.Image | None:
    """Return up to 16 test pictures that most classifiers of a row name right and those of the baseline do not, and
    below them up to 16 the other way round; None if there are none.

    Args:
        test: the test pictures.
        predicted: for each row (seeds, pictures), the predicted classes.
        baseline: the row to compare with.
        row: the other one.
        counts: (classes,), the augmented pictures of each class (the sum of its labels); None without any.
    """
    labels = np.array(test.labels)
    shares = {name: (predicted[name] == labels).mean(0) for name in (baseline, row)}
    difference, grids = shares[row] - shares[baseline], []
    for winner, loser, sign in ((row, baseline, -1), (baseline, row, 1)):
        order = np.argsort(sign * difference, kind="stable").tolist()
        found = [place for place in order if shares[winner][place] > 0.5 >= shares[loser][place]]
        if not found:
            continue
        legend = [
            (f"{len(found)} pictures that most classifiers of {winner} name right, those of {loser} not", LABEL_COLOR),
            (f"blue: the most frequent prediction of {baseline}", BASELINE_COLOR),
            (f"purple: that of {row}", PREDICTION_COLOR),
        ]
        found = found[:MAX_PICTURES]
        captions: list[list[Caption]] = []
        for place in found:
            lines = [("label:", test.labels[place], LABEL_COLOR)]
            for name, color in ((baseline, BASELINE_COLOR), (row, PREDICTION_COLOR)):
                votes = np.bincount(predicted[name][:, place])
                lines.append((f"{name}, {votes.max()} of {votes.sum()}:", int(votes.argmax()), color))
            if counts is not None:
                label = test.labels[place]
                lines.append((f"{counts[label]:.1f} augmented of", label, LABEL_COLOR))
            captions.append(lines)
        images = [crop_square(Photos.open(test, place, SIDE), SIDE) for place in found]  # also of reduced photos
        grids.append(draw_grid(images, captions, test.class_names, legend))
    if not grids:
        return None
    whole = Image.new("RGB", (max(grid.width for grid in grids), sum(grid.height for grid in grids)), "white")
    for number, grid in enumerate(grids):
        whole.paste(grid, (0, sum(above.height for above in grids[:number])))
    return whole


def draw_highest_losses(
    pictures: AugmentedDataset, losses: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]
) -> Image.Image:
    """Return the augmented pictures of the highest loss (pictures,), with soft label and prediction below each."""
    legend = [
        ("black: the soft label", LABEL_COLOR),
        ("purple: the prediction of the classifier", PREDICTION_COLOR),
        ("sorted by the loss between them", LABEL_COLOR),
    ]
    highest, captions = np.argsort(-losses, kind="stable")[:MAX_PICTURES], []
    for index in highest:
        shares = enumerate(pictures.soft_labels[index])
        lines = [(f"{share:.2f}", label, LABEL_COLOR) for label, share in shares if share]
        predicted = int(probabilities[index].argmax())
        captions.append([*lines, (f"predicted: {probabilities[index].max():.2f}", predicted, PREDICTION_COLOR)])
    return draw_grid([pictures[int(index)][0] for index in highest], captions, class_names, legend)


def _as_label(name: str, label: int) -> str:
    """Return a class name as matplotlib's font shows it: Latin, Greek and Cyrillic letters, and no formulas."""
    if not name.isprintable() or any(letter > "\u052f" for letter in name):
        return f"class {label}"
    return (name if len(name) <= 24 else f"{name[:23]}…").replace("$", r"\$")


def _create_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")  # inches


def _as_png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    return content.getvalue()

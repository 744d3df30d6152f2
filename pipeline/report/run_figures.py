"""The figures of run reports and comparisons, each with its points as a table; small enough to be read on a phone."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import precision_recall_curve, roc_curve

from ...evaluation.calibration import calibration_curve
from ...evaluation.survival import kaplan_meier

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Drawing = tuple[Figure, pd.DataFrame]
"""A figure, and the points that it shows."""

Curve = tuple["np.ndarray", "np.ndarray"]
"""`(n,)` bool whether each row is positive, and its `(n,)` score."""

# Okabe & Ito: distinguishable with any colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b6b6b", "#b8a800")
# What differs in colour differs in its dashes too; the first line is whole.
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))

SMALLEST_BIN = 5
"""Rows that a point of a calibration curve rests on at least."""

INK, SOFT, GRID = "#1c2430", "#5a6675", "#e3e7ec"


def roc(curves: Mapping[str, Curve], thin: Mapping[str, Curve]) -> Drawing:
    """ROC curves by name; the thin ones (folds) in grey behind."""
    figure, axes = _square("False positive rate (1 - specificity)", "True positive rate (sensitivity)")
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=0.8, linestyle=(0, (4, 3)))
    points = []
    for name, (target, score) in thin.items():
        false, true, threshold = roc_curve(target, score)
        axes.plot(false, true, color="#9fb3c4", linewidth=0.8)
        points.append(_points(name, false_positive_rate=false, true_positive_rate=true, threshold=threshold))
    for colour, dash, (name, (target, score)) in zip(*_styles(len(curves)), curves.items(), strict=True):
        false, true, threshold = roc_curve(target, score)
        axes.plot(false, true, color=colour, linestyle=dash, label=name)
        points.append(_points(name, false_positive_rate=false, true_positive_rate=true, threshold=threshold))
    return _legend(figure, axes, curves, "lower right"), pd.concat(points)


def precision_recall(curves: Mapping[str, Curve]) -> Drawing:
    """Precision-recall curves by name, with the prevalence as a dotted line of the same colour."""
    figure, axes = _square("Recall (sensitivity)", "Precision (positive predictive value)")
    points = []
    for colour, dash, (name, (target, score)) in zip(*_styles(len(curves)), curves.items(), strict=True):
        precision, recall, threshold = precision_recall_curve(target, score)
        ends = np.append(threshold, np.inf)
        points.append(_points(name, recall=recall, precision=precision, threshold=ends, prevalence=target.mean()))
        axes.axhline(target.mean(), color=colour, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.plot(recall, precision, color=colour, linestyle=dash, label=name, drawstyle="steps-post")
    return _legend(figure, axes, curves, "lower left"), pd.concat(points)


def calibration(curves: Mapping[str, Curve], xlabel: str, ylabel: str) -> Drawing:
    """Observed against predicted, in bins of `SMALLEST_BIN` rows or more; the size of a point is the number of rows.

    Args:
        curves: Name -> `(n,)` whether each prediction holds, and its `(n,)` probability.
        xlabel: What the probability is of.
        ylabel: What the share is of.
    """
    figure, axes = _square(xlabel, ylabel)
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=0.8, linestyle=(0, (4, 3)))
    points = []
    for colour, dash, (name, (correct, confidence)) in zip(*_styles(len(curves)), curves.items(), strict=True):
        bins = calibration_curve(confidence, correct.astype(np.float64))
        confidences, observed, sizes = np.array([b for b in bins if b.n >= SMALLEST_BIN] or bins).T
        points.append(_points(name, predicted=confidences, observed=observed, n=sizes.astype(np.int64)))
        axes.plot(confidences, observed, color=colour, linestyle=dash, linewidth=1.2, label=name)
        axes.scatter(confidences, observed, s=12 + 160 * sizes / sizes.sum(), color=colour, alpha=0.85, linewidth=0)
    return _legend(figure, axes, curves, "upper left"), pd.concat(points)


def confusion(matrix: "np.ndarray", names: Sequence[str]) -> Drawing:
    """Counts `(C, C)`, shaded by their share of the true class."""
    figure, axes = _axes("Predicted", "True", height=3.9)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    edges = np.arange(len(names) + 1) - 0.5
    axes.pcolormesh(edges, edges, share, cmap="Blues", vmin=0, vmax=1)  # not imshow: cells stay sharp in print
    axes.set_aspect("equal")
    axes.invert_yaxis()
    if len(names) <= 10:
        for row, column in np.ndindex(matrix.shape):
            text = f"{matrix[row, column]:,}\n{share[row, column]:.0%}"
            colour = "white" if share[row, column] > 0.55 else INK
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=10 if len(names) < 5 else 7)
    short = [name if len(name) <= 14 else name[:13] + "…" for name in names]
    crowded = len(names) > 3 or max(map(len, short)) > 10
    axes.set_xticks(range(len(names)), short, rotation=35 if crowded else 0, ha="right" if crowded else "center")
    axes.set_yticks(range(len(names)), short)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    cells = [
        {"true": names[i], "predicted": names[j], "n": matrix[i, j], "share": share[i, j]}
        for i, j in np.ndindex(matrix.shape)
    ]
    return figure, pd.DataFrame(cells)


def scatter(target: "np.ndarray", prediction: "np.ndarray", label: str) -> Drawing:
    """Predicted against true numbers."""
    figure, axes = _axes(f"True {label}", f"Predicted {label}", height=3.9)
    ends = [min(target.min(), prediction.min()), max(target.max(), prediction.max())]
    axes.plot(ends, ends, color=SOFT, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.scatter(target, prediction, s=14, color=COLOURS[0], alpha=0.55, linewidth=0)
    return figure, pd.DataFrame({"true": target, "predicted": prediction})


def survival_curves(groups: Mapping[str, Curve], unit: str) -> Drawing:
    """Kaplan-Meier curves by group, with 95% intervals and the number at risk.

    Args:
        groups: Name -> `(n,)` event and time.
        unit: What the times are, for the axis.
    """
    figure, axes = _axes(unit, "Survival", height=3.9 + 0.16 * len(groups))
    last = max(time.max() for _, time in groups.values())
    points = []
    for colour, dash, (name, (event, time)) in zip(*_styles(len(groups)), groups.items(), strict=True):
        curve = kaplan_meier(time, event.astype(bool))
        at_risk = (time[:, None] >= curve.time).sum(0)
        points.append(
            _points(name, time=curve.time, survival=curve.survival, low=curve.low, high=curve.high, at_risk=at_risk)
        )
        axes.step(
            curve.time, curve.survival, where="post", color=colour, linestyle=dash, label=f"{name} (n = {len(time)})"
        )
        axes.fill_between(curve.time, curve.low, curve.high, step="post", color=colour, alpha=0.12, linewidth=0)
        at = curve.survival[np.searchsorted(curve.time, curve.censored, side="right") - 1]
        axes.plot(curve.censored, at, "|", color=colour, markersize=5, markeredgewidth=0.8)
    axes.set_xlim(0, last)
    axes.set_ylim(0, 1.02)
    ticks = [tick for tick in MaxNLocator(5).tick_values(0, last) if 0 <= tick <= last]
    axes.set_xticks(ticks)
    for line, (colour, (_, time)) in enumerate(zip(_styles(len(groups))[0], [*groups.values()], strict=True)):
        for tick in ticks:
            position = (tick / last, -0.2 - 0.055 * line)
            axes.text(
                *position,
                f"{int((time >= tick).sum())}",
                transform=axes.transAxes,
                color=colour,
                ha="center",
                va="top",
                fontsize=8.5,
            )
    axes.text(-0.06, -0.2, "at risk", transform=axes.transAxes, color=SOFT, ha="right", va="top", fontsize=8.5)
    axes.legend(loc="lower left", frameon=False)
    return figure, pd.concat(points)


def learning_curve(history: "pd.DataFrame", columns: Mapping[str, str], ylabel: str) -> Drawing:
    """Columns of `history.csv` by epoch: the mean over the folds, and each fold thin.

    Args:
        history: Rows of `history.csv`.
        columns: Column -> its name in the legend.
        ylabel: What they are.
    """
    figure, axes = _axes("Epoch", ylabel)
    for colour, dash, (column, name) in zip(*_styles(len(columns)), columns.items(), strict=True):
        known = history.dropna(subset=[column])
        folds = [rows.groupby("epoch")[column].mean() for _, rows in known.groupby("fold")]
        if len(folds) > 1:
            for fold in folds:
                axes.plot(fold.index, fold.to_numpy(), color=colour, linestyle=dash, linewidth=0.7, alpha=0.4)
        mean = known.groupby("epoch")[column].mean()
        single = "o" if len(mean) == 1 else ""
        axes.plot(mean.index, mean.to_numpy(), color=colour, linestyle=dash, label=name, marker=single)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.legend(frameon=False)
    return figure, history[["fold", "epoch", *columns]]


def forest(rows: Sequence[tuple[str, float, float, float]], xlabel: str, reference: float | None = None) -> Drawing:
    """Values with intervals, one below the other.

    Args:
        rows: Name, value, low and high each, from the top.
        xlabel: What they are.
        reference: A value to draw a line at.
    """
    figure, axes = _axes(xlabel, "", height=0.9 + 0.34 * len(rows))
    for place, (_, value, low, high) in enumerate(rows):
        axes.plot([low, high], [place, place], color=COLOURS[0], linewidth=1.8, solid_capstyle="butt")
        axes.plot([value], [place], "o", color=COLOURS[0], markersize=5.5)
    if reference is not None:
        axes.axvline(reference, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(rows)), [name if len(name) <= 34 else name[:33] + "…" for name, *_ in rows])
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    return figure, pd.DataFrame(rows, columns=["name", "value", "low", "high"])


def _points(name: str, **columns: Any) -> pd.DataFrame:
    """Points of one curve; the lone one of a figure may have no name."""
    return pd.DataFrame({"curve": name} | columns)


def _axes(xlabel: str, ylabel: str, *, height: float = 3.3) -> "tuple[Figure, Axes]":
    figure = Figure(figsize=(4.6, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b9c2cc")
    return figure, axes


def _square(xlabel: str, ylabel: str) -> "tuple[Figure, Axes]":
    figure, axes = _axes(xlabel, ylabel, height=4.3)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal")
    return figure, axes


def _styles(count: int) -> tuple[list[str], list[Any]]:
    """Colours and dashes of so many lines."""
    numbers = range(count)
    return [COLOURS[n % len(COLOURS)] for n in numbers], [DASHES[n % len(DASHES)] for n in numbers]


def _legend(
    figure: Figure,
    axes: "Axes",
    curves: Mapping[str, Curve],
    place: Literal["lower right", "lower left", "upper left"],
) -> Figure:
    if any(curves):  # a lone curve may go without a name
        axes.legend(loc=place, frameon=False, fontsize=8.5)
    return figure

"""The worst mistakes of a model on its test part, and the slides to look at."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...evaluation.classification import Classes, Labels
from ...evaluation.outcomes import read_outcomes
from ...evaluation.regression import Values
from ...evaluation.scopes import select
from ...task import Task
from .page import Cell, Table
from .wording import probability, significant

if TYPE_CHECKING:
    import pandas as pd

WORST = 15
"""Mistakes that are listed."""

FAR_OFF = 0.1
"""Share of the rows of a regression whose errors, the largest, count as mistakes."""

OPPOSITE = 0.5
"""A survival prediction is a mistake where the ranks of risk and time lie more than half of all rows apart."""


@dataclass(frozen=True)
class _Judged:
    """Rows of predictions, judged.

    Attributes:
        badness: `(n,)` how wrong each row is; at most 0 where it is no mistake.
        columns: What is shown of a mistake.
        numeric: Those of the columns that are numbers.
        cells: `(n, columns)`.
    """

    badness: np.ndarray
    columns: list[str]
    numeric: list[str]
    cells: list[list[Cell]]


def mistakes_table(predictions: "pd.DataFrame", task: Task, level: str, noun: str) -> tuple[Table | None, str]:
    """The test patients (or slides) that were wrong with the most confidence, and what counts as a mistake.

    Args:
        predictions: The content of `predictions.csv`.
        task: The task.
        level: `patient` or `slide`.
        noun: What a row is called.

    Returns:
        A table with the slides of each that are wrong (where none is alone, the one furthest off); None without mistakes.
    """
    rows = select(predictions, level)
    judged = _judged(rows, task)
    order = [int(i) for i in np.argsort(-judged.badness, kind="stable")[:WORST] if judged.badness[i] > 0]
    what = _what_counts(task, noun, int((judged.badness > 0).sum()), len(rows))
    if not order:
        return None, what
    wrong = _wrong_slides(predictions, task)
    folds = rows["fold"].nunique() > 1
    table: list[list[Cell]] = []
    for i in order:
        row = rows.iloc[i]
        patient = str(row["patient_id"])
        slide = str(row["slide_id"]) if level == "slide" else patient
        names: list[Cell] = [slide] if noun == "slide" else [patient, wrong.get((row["fold"], patient), "")]
        table.append([*names, *([str(row["fold"])] if folds else []), *judged.cells[i]])
    names_of = ["Slide"] if noun == "slide" else ["Patient", "Slides that are wrong"]
    columns = [*names_of, *(["Fold"] if folds else []), *judged.columns]
    return Table(columns, table, ["Fold", *judged.numeric]), what


def _what_counts(task: Task, noun: str, n: int, of: int) -> str:
    shown = "" if n <= WORST else f" The worst {WORST} are listed."
    if task.kind == "regression":
        return f"The tenth of the test {noun}s with the largest errors.{shown}"
    if task.kind == "survival":
        return (
            f"The {n:,} of {of:,} test {noun}s with an early event at low risk, or a long time at high risk: ranks of risk "
            f"and time (in the fold) more than half of all apart.{shown}"
        )
    return f"The {n:,} of {of:,} test {noun}s that were wrong, those with the most confidence first.{shown}"


def _wrong_slides(predictions: "pd.DataFrame", task: Task) -> dict[tuple[object, str], str]:
    """(fold, patient) -> its slides that are wrong by themselves, the worst first; the worst one if none is."""
    slides = select(predictions, "slide")
    if not len(slides):
        return {}
    slides = slides.assign(badness=_judged(slides, task).badness).sort_values("badness", ascending=False, kind="stable")
    named = {}
    for key, group in slides.groupby(["fold", "patient_id"], sort=False):
        names = [str(name) for name in group.loc[group["badness"] > 0, "slide_id"]] or [str(group["slide_id"].iloc[0])]
        fold, patient = key
        named[fold, str(patient)] = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return named


def _judged(rows: "pd.DataFrame", task: Task) -> _Judged:
    outcomes = read_outcomes(rows, task)
    index = np.arange(len(rows))
    if isinstance(outcomes, Classes):
        predicted, true = outcomes.prediction, outcomes.target
        p = outcomes.probability
        # Above 0 for any mistake, also one that a threshold made against the larger probability.
        surplus = 1 + p[index, predicted] - p[index, true]
        return _Judged(
            np.where(predicted == true, p[index, predicted] - 1, surplus),
            ["True", "Predicted", "Probability of predicted", "Probability of true"],
            ["Probability of predicted", "Probability of true"],
            [
                [
                    outcomes.names[true[i]],
                    outcomes.names[predicted[i]],
                    probability(p[i, predicted[i]]),
                    probability(p[i, true[i]]),
                ]
                for i in index
            ],
        )
    if isinstance(outcomes, Labels):
        error = np.nan_to_num(np.abs(outcomes.probability - outcomes.target))
        wrong = (outcomes.prediction != outcomes.target) & ~np.isnan(outcomes.target)
        per_label = np.where(wrong, error, error - 1)
        worst = per_label.argmax(1)
        return _Judged(
            per_label.max(1),
            ["Label", "True", "Predicted", "Probability"],
            ["Probability"],
            [
                [
                    outcomes.names[label],
                    "yes" if outcomes.target[i, label] == 1 else "no",
                    "yes" if outcomes.prediction[i, label] == 1 else "no",
                    probability(outcomes.probability[i, label]),
                ]
                for i, label in enumerate(worst)
            ],
        )
    if isinstance(outcomes, Values):
        error = np.abs(outcomes.prediction - outcomes.target)
        limit = np.quantile(error, 1 - FAR_OFF, method="lower") if len(error) else 0.0
        cells: list[list[Cell]] = [
            [_as_given(target), significant(prediction, 4), significant(prediction - target, 4, "+")]
            for target, prediction in zip(outcomes.target, outcomes.prediction, strict=True)
        ]
        return _Judged(error - limit, ["True", "Predicted", "Error"], ["True", "Predicted", "Error"], cells)
    earliness = 1 - rows.groupby("fold")["time"].rank(pct=True).to_numpy()
    risk = rows.groupby("fold")["risk"].rank(pct=True).to_numpy()
    # Who was censored lived at least as long.
    apart = np.where(outcomes.event, np.abs(earliness - risk), risk - earliness)
    percentile = "Percentile of the risk"
    return _Judged(
        apart - OPPOSITE,
        ["Time", "Event", percentile],
        ["Time", percentile],
        [
            [_as_given(outcomes.time[i]), "yes" if outcomes.event[i] else "censored", f"{100 * risk[i]:.0f}"]
            for i in index
        ],
    )


def _as_given(value: float) -> str:
    """A number with the digits that it has in the table, and no more."""
    return np.format_float_positional(value, trim="-")

"""Predictions as a table -> arrays of outcomes, checked."""

from typing import Any, assert_never

import numpy as np
import pandas as pd

from ..errors import LongslideError
from ..prediction_columns import PredictionColumns, survival_times
from ..task import Task
from .classification import Classes, Labels
from .regression import Values
from .survival import Survival
from .weighted import Floats, Integers

Outcomes = Classes | Labels | Values | Survival
"""What was true and what was predicted, for n rows: `scores()`, `resampled(weights)`, `interval(metric, ...)`, `take(rows)`,
`len()`."""


def read_outcomes(predictions: pd.DataFrame, task: Task) -> Outcomes:
    """The outcomes in the rows of a predictions table.

    Args:
        predictions: Rows of `predictions.csv`, all of one level.
        task: What was predicted.

    Returns:
        The rows in the same order.

    Raises:
        LongslideError: A column is missing, a class is unknown, or a number is missing or impossible.
    """
    match task.kind:
        case "binary" | "multiclass" | "ordinal":
            return _classes(predictions, task)
        case "multilabel":
            return _labels(predictions, task)
        case "regression":
            columns = PredictionColumns(task)
            both = _numbers(predictions, [*columns.target, *columns.score])
            return Values(both[:, 0], both[:, 1])
        case "survival":
            return _survival(predictions, task)
        case _:
            assert_never(task.kind)


def _labels(predictions: pd.DataFrame, task: Task) -> Labels:
    columns = PredictionColumns(task)
    probability = _numbers(predictions, columns.score)
    _check_probabilities(probability)
    return Labels(
        target=_numbers(predictions, columns.target, missing=True),
        prediction=_numbers(predictions, columns.decision),
        probability=probability,
        names=task.classes,
    )


def _survival(predictions: pd.DataFrame, task: Task) -> Survival:
    columns = PredictionColumns(task)
    time, event, risk = _numbers(predictions, [*columns.target, columns.score[0]]).T
    named = survival_times(map(str, predictions))
    order = sorted(named, key=named.__getitem__)
    survival = _numbers(predictions, order, missing=True)
    for fold in predictions["fold"].unique():  # each fold may have times of its own; other gaps are no numbers
        of_fold = predictions["fold"] == fold
        _numbers(predictions[of_fold], [name for name in order if predictions.loc[of_fold, name].notna().any()])
    return Survival(time, event == 1, risk, survival, np.array([named[name] for name in order], np.float64))


def _classes(predictions: pd.DataFrame, task: Task) -> Classes:
    columns = PredictionColumns(task)
    probability = _numbers(predictions, columns.score)
    _check_probabilities(probability)
    total = probability.sum(1, keepdims=True)
    if (np.abs(total - 1) > 1e-3).any():
        raise LongslideError(
            "the predictions have rows whose class probabilities do not sum to 1; run the prediction again"
        )
    return Classes(
        target=_indices(predictions, columns.target[0], task.classes),
        prediction=_indices(predictions, columns.decision[0], task.classes),
        probability=probability / total,
        names=task.classes,
        ordinal=task.kind == "ordinal",
    )


def _column(predictions: pd.DataFrame, name: str) -> "pd.Series[Any]":
    if name not in predictions:
        raise LongslideError(
            f"the predictions have no column {name!r}, which this task needs; run the prediction again"
        )
    return predictions[name]


def _numbers(predictions: pd.DataFrame, names: list[str], *, missing: bool = False) -> Floats:
    """Columns as `(n, len(names))` float64."""
    columns = [
        pd.to_numeric(_column(predictions, name), errors="coerce").to_numpy(np.float64, na_value=np.nan)
        for name in names
    ]
    for name, column in zip(names, columns, strict=True):
        if not missing and not np.isfinite(column).all():
            rows = int((~np.isfinite(column)).sum())
            raise LongslideError(
                f"column {name!r} of the predictions is not a finite number in {rows} of {len(column)} rows; "
                "look for NaN in the features or a training run that diverged"
            )
    return np.stack(columns, 1) if columns else np.empty((len(predictions), 0))


def _check_probabilities(probability: Floats) -> None:
    if ((probability < 0) | (probability > 1)).any():
        raise LongslideError("the predictions hold probabilities outside 0 to 1; run the prediction again")


def _indices(predictions: pd.DataFrame, name: str, classes: tuple[str, ...]) -> Integers:
    """A column of class names as `(n,)` int64 class numbers."""
    column = _column(predictions, name)
    index = pd.Index(classes).get_indexer(pd.Index(column.astype(str)))
    if (index < 0).any():
        unknown = column[index < 0].iloc[0]
        raise LongslideError(
            f"column {name!r} of the predictions holds {unknown!r}, which is none of the classes {', '.join(classes)}"
        )
    return np.asarray(index, np.int64)

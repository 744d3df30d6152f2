"""Metrics of predicted classes: binary, multi-class, ordinal, and multi-label with missing labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from sklearn import metrics

from . import weighted
from .weighted import Floats, Integers

CALIBRATION_BINS = 10
"""Bins of equal width of the expected calibration error and of the calibration curve."""

_TINY = float(np.finfo(np.float64).eps)


class Score(NamedTuple):
    """The value of a metric (NaN where it is not defined) and the number of rows that it rests on."""

    value: float
    n: int


@dataclass(frozen=True)
class Classes:
    """Rows with one class each.

    Attributes:
        target: `(n,)` int64 true class.
        prediction: `(n,)` int64 predicted class, at the threshold that was chosen on validation data.
        probability: `(n, C)` float64, each row sums to 1.
        names: The C class names in their order.
        ordinal: Whether the classes are ordered.
    """

    target: Integers
    prediction: Integers
    probability: Floats
    names: tuple[str, ...]
    ordinal: bool = False

    def __len__(self) -> int:
        return len(self.target)

    def take(self, rows: Integers) -> "Classes":
        """The same with some of the rows."""
        return Classes(self.target[rows], self.prediction[rows], self.probability[rows], self.names, self.ordinal)

    @property
    def present(self) -> Integers:
        """The classes that occur; macro averages are over these."""
        return np.unique(self.target)

    def scores(self) -> dict[str, Score]:
        """Every metric of these rows, by scikit-learn."""
        present, names = self.present, self.names
        one_hot = np.eye(len(names))[self.target]
        values: dict[str, float] = {}
        if len(names) == 2:
            values |= self._ranking(one_hot[:, 1] == 1, self.probability[:, 1])
            matrix = metrics.confusion_matrix(self.target, self.prediction, labels=[0, 1])[None].astype(np.float64)
            found = weighted.recall(matrix)[0]
            values |= {"balanced_accuracy": found.mean(), "sensitivity": found[1], "specificity": found[0]}
            called = (self.target == 1).any() or (self.prediction == 1).any()
            values["f1"] = metrics.f1_score(self.target, self.prediction) if called else np.nan
        else:
            each = [self._ranking(one_hot[:, c] == 1, self.probability[:, c]) for c in range(len(names))]
            values |= {name: _macro([score[name] for score in each]) for name in ("auroc", "auprc")}
            for class_name, score in zip(names, each, strict=True):
                values |= {f"{name}:{class_name}": value for name, value in score.items()}
            values["balanced_accuracy"] = metrics.recall_score(
                self.target, self.prediction, labels=present, average="macro", zero_division=0
            )
            values["f1"] = metrics.f1_score(
                self.target, self.prediction, labels=present, average="macro", zero_division=0
            )
        values["quadratic_kappa"] = float(
            weighted.quadratic_kappa(
                weighted.confusion(self.target, self.prediction, len(names), np.ones((1, len(self))))
            )[0]
            if len(np.unique(np.r_[self.target, self.prediction])) < 2
            else metrics.cohen_kappa_score(
                self.target, self.prediction, labels=np.arange(len(names)), weights="quadratic"
            )
        )
        if self.ordinal:
            values["mae"] = metrics.mean_absolute_error(self.target, self.prediction)
        values["brier"] = float(np.mean(self._brier()))
        values["ece"] = float(
            weighted.expected_calibration_error(*self.confidence(), np.ones((1, len(self))), CALIBRATION_BINS)[0]
        )
        values["log_loss"] = metrics.log_loss(self.target, self.probability, labels=np.arange(len(names)))
        return {name: Score(float(value), len(self)) for name, value in values.items()}

    def resampled(self, weights: Floats) -> dict[str, Floats]:
        """The same metrics of each resample.

        Args:
            weights: `(R, n)` how often each row was drawn.

        Returns:
            `(R,)` for each metric.
        """
        present, names = self.present, self.names
        matrix = weighted.confusion(self.target, self.prediction, len(names), weights)
        found, f1 = weighted.recall(matrix), weighted.f1(matrix)
        values: dict[str, Floats] = {}
        if len(names) == 2:
            ranking = weighted.auroc_and_auprc(self.target == 1, self.probability[:, 1], weights)
            values["auroc"], values["auprc"] = ranking
            values |= {"balanced_accuracy": found.mean(1), "sensitivity": found[:, 1], "specificity": found[:, 0]}
            values["f1"] = f1[:, 1]
        else:
            each = [
                weighted.auroc_and_auprc(self.target == c, self.probability[:, c], weights) for c in range(len(names))
            ]
            for index, name in enumerate(("auroc", "auprc")):
                values |= {f"{name}:{names[c]}": score[index] for c, score in enumerate(each)}
                defined: list[int] = present.tolist() if len(present) > 1 else []
                values[name] = _macro_resampled([each[c][index] for c in defined], len(weights))
            values["balanced_accuracy"] = found[:, present].mean(1)  # NaN where a class that occurs was not drawn
            values["f1"] = np.where(np.isnan(values["balanced_accuracy"]), np.nan, f1[:, present].mean(1))
        values["quadratic_kappa"] = weighted.quadratic_kappa(matrix)
        if self.ordinal:
            values["mae"] = weighted.mean(np.abs(self.target - self.prediction).astype(np.float64), weights)
        values["brier"] = weighted.mean(self._brier(), weights)
        values["ece"] = weighted.expected_calibration_error(*self.confidence(), weights, CALIBRATION_BINS)
        values["log_loss"] = weighted.mean(self._log_loss(), weights)
        return values

    def confidence(self) -> tuple[Floats, Floats]:
        """`(n,)` what is held against what for calibration: the probability of the positive class and whether it is so; for
        more than two classes, the highest probability and whether that class is right."""
        if len(self.names) == 2:
            return self.probability[:, 1], (self.target == 1).astype(np.float64)
        best = self.probability.argmax(1)
        return self.probability[np.arange(len(self)), best], (best == self.target).astype(np.float64)

    def _brier(self) -> Floats:
        # Two classes: of the positive class, 0 to 1. More: the sum over classes, 0 to 2 (Brier 1950).
        if len(self.names) == 2:
            return (self.probability[:, 1] - self.target) ** 2
        return np.asarray(((self.probability - np.eye(len(self.names))[self.target]) ** 2).sum(1))

    def _log_loss(self) -> Floats:
        given = self.probability[np.arange(len(self)), self.target]
        return -np.log(np.clip(given, _TINY, 1 - _TINY))

    @staticmethod
    def _ranking(target: "np.ndarray", score: Floats) -> dict[str, float]:
        if target.all() or not target.any():
            return {"auroc": np.nan, "auprc": np.nan}
        return {
            "auroc": float(metrics.roc_auc_score(target, score)),
            "auprc": float(metrics.average_precision_score(target, score)),
        }


@dataclass(frozen=True)
class Labels:
    """Rows with several labels, each of which may be missing.

    Attributes:
        target: `(n, L)` float64 0, 1, or NaN where it is missing.
        prediction: `(n, L)` float64 0 or 1.
        probability: `(n, L)` float64.
        names: The L label names.
    """

    target: Floats
    prediction: Floats
    probability: Floats
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.target)

    def take(self, rows: Integers) -> "Labels":
        """The same with some of the rows."""
        return Labels(self.target[rows], self.prediction[rows], self.probability[rows], self.names)

    def label(self, index: int) -> tuple[Integers, Classes]:
        """The rows that have this label, and what they are as a binary task."""
        rows = np.flatnonzero(~np.isnan(self.target[:, index]))
        score = self.probability[rows, index]
        return rows, Classes(
            target=self.target[rows, index].astype(np.int64),
            prediction=self.prediction[rows, index].astype(np.int64),
            probability=np.stack([1 - score, score], 1),
            names=(f"no {self.names[index]}", self.names[index]),
        )

    def scores(self) -> dict[str, Score]:
        """Every metric for each label, over the rows that have it, and its mean over the labels where it is defined."""
        each = {}
        for index, name in enumerate(self.names):
            _, rows = self.label(index)
            if len(rows):
                each[name] = rows.scores()
        result: dict[str, Score] = {}
        for metric in next(iter(each.values()), {}):
            values = [scores[metric].value for scores in each.values()]
            result[metric] = Score(_macro(values), len(self))
        for name, scores in each.items():
            result |= {f"{metric}:{name}": score for metric, score in scores.items()}
        return result

    def resampled(self, weights: Floats) -> dict[str, Floats]:
        """The same metrics of each resample, `(R,)`; weights: `(R, n)`."""
        each: dict[str, dict[str, Floats]] = {}
        defined: dict[str, set[str]] = {}
        for index, name in enumerate(self.names):
            present, rows = self.label(index)
            if len(rows):
                each[name] = rows.resampled(weights[:, present])
                defined[name] = {metric for metric, score in rows.scores().items() if np.isfinite(score.value)}
        result: dict[str, Floats] = {}
        for metric in next(iter(each.values()), {}):
            used = [values[metric] for name, values in each.items() if metric in defined[name]]
            result[metric] = _macro_resampled(used, len(weights))
        for name, values in each.items():
            result |= {f"{metric}:{name}": value for metric, value in values.items()}
        return result


def _macro(values: Sequence[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else np.nan


def _macro_resampled(values: Sequence[Floats], resamples: int) -> Floats:
    return np.mean(np.stack(values), 0) if values else np.full(resamples, np.nan)

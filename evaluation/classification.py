"""Metrics of predicted classes: binary, multi-class, ordinal, and multi-label with missing labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from . import weighted
from .intervals import (
    NO_INTERVAL,
    Interval,
    Replicates,
    interval_of_auroc,
    interval_of_mean,
    interval_of_mean_loss,
    interval_of_precision,
    interval_of_share,
    interval_on_scale,
)
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
        """Every metric of these rows."""
        values = self.resampled(np.ones((1, len(self))))
        return {name: Score(float(value[0]), len(self)) for name, value in values.items()}

    def resampled(self, weights: Floats) -> dict[str, Floats]:
        """Every metric of weighted rows.

        Args:
            weights: `(R, n)` how often each row counts.

        Returns:
            `(R,)` for each metric, NaN where it is not defined.
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
            values |= {f"sensitivity:{name}": found[:, c] for c, name in enumerate(names)}
            values["balanced_accuracy"] = found[:, present].mean(1)  # NaN where a class that occurs has no weight
            values["f1"] = np.where(np.isnan(values["balanced_accuracy"]), np.nan, f1[:, present].mean(1))
        if self.ordinal:
            values["quadratic_kappa"] = weighted.quadratic_kappa(matrix)
            values["mae"] = weighted.mean(self._distance(self.target), weights)
        values["brier"] = weighted.mean(self._brier(self.target), weights)
        values["ece"] = weighted.expected_calibration_error(*self.confidence(), weights, CALIBRATION_BINS)
        values["log_loss"] = weighted.mean(self._log_loss(self.target), weights)
        return values

    def interval(
        self, metric: str, replicates: Mapping[str, Replicates], patients: "np.ndarray", inflation: float = 1.0
    ) -> Interval:
        """The 95% interval of a metric.

        Args:
            metric: A metric of `scores`.
            replicates: Every metric with each group of patients left out.
            patients: `(n,)` the patient of each row.
            inflation: What variances are multiplied by.
        """
        name, _, of = metric.partition(":")
        own = replicates[metric]
        if name == "balanced_accuracy" or (name in ("auroc", "auprc") and not of and len(self.names) > 2):
            parts = self._parts(name)
            return interval_of_mean(
                own.value,
                [self.interval(part, replicates, patients, inflation) for part in parts],
                [replicates[part] for part in parts],
                independent=name == "balanced_accuracy",
            )
        of_class = self.target == (0 if name == "specificity" else self.names.index(of) if of else 1)
        positives, negatives = len(np.unique(patients[of_class])), len(np.unique(patients[~of_class]))
        if name == "auroc":
            return interval_of_auroc(own, positives, negatives, inflation, len(self) / len(np.unique(patients)))
        if name == "auprc":
            return interval_of_precision(own, positives, inflation)
        if name in ("sensitivity", "specificity"):
            return interval_of_share(own, int(of_class.sum()), positives, inflation)
        if name == "f1":
            n = positives if len(self.names) == 2 else positives + negatives
            return interval_on_scale(own, "logit", n, inflation)
        if name == "quadratic_kappa":
            return interval_on_scale(own, "fisher", len(np.unique(patients)), inflation)
        if name == "ece":  # so biased upwards in small samples that an interval around it would mislead
            return NO_INTERVAL
        losses = {"brier": self._brier, "log_loss": self._log_loss, "mae": self._distance}[name]
        worst = max(float(losses(np.full(len(self), c)).max()) for c in range(len(self.names)))
        return interval_of_mean_loss(own, worst, inflation)

    def _parts(self, name: str) -> list[str]:
        """The metrics that another is the mean of."""
        if len(self.names) == 2:
            return ["sensitivity", "specificity"]
        of = "sensitivity" if name == "balanced_accuracy" else name
        return [f"{of}:{self.names[c]}" for c in self.present]

    def confidence(self) -> tuple[Floats, Floats]:
        """`(n,)` what is held against what for calibration: the probability of the positive class and whether it is so; for
        more than two classes, the highest probability and whether that class is right."""
        if len(self.names) == 2:
            return self.probability[:, 1], (self.target == 1).astype(np.float64)
        best = self.probability.argmax(1)
        return self.probability[np.arange(len(self)), best], (best == self.target).astype(np.float64)

    # The loss of each row, `(n,)`, if these were the classes.

    def _brier(self, classes: Integers) -> Floats:
        # Two classes: of the positive class, 0 to 1. More: the sum over classes, 0 to 2 (Brier 1950).
        if len(self.names) == 2:
            return np.asarray((self.probability[:, 1] - classes) ** 2)
        return np.asarray(((self.probability - np.eye(len(self.names))[classes]) ** 2).sum(1))

    def _log_loss(self, classes: Integers) -> Floats:
        given = self.probability[np.arange(len(self)), classes]
        return -np.log(np.clip(given, _TINY, 1 - _TINY))

    def _distance(self, classes: Integers) -> Floats:
        return np.asarray(np.abs(classes - self.prediction), np.float64)


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
        n = {name: len(self.label(index)[0]) for index, name in enumerate(self.names)}
        values = self.resampled(np.ones((1, len(self))))
        return {
            name: Score(float(value[0]), n.get(name.partition(":")[2], len(self))) for name, value in values.items()
        }

    def resampled(self, weights: Floats) -> dict[str, Floats]:
        """The same metrics of weighted rows, `(R,)`; weights: `(R, n)`."""
        each: dict[str, dict[str, Floats]] = {}
        used: dict[str, list[Floats]] = {}
        for index, name in enumerate(self.names):
            present, rows = self.label(index)
            if len(rows):
                each[name] = rows.resampled(weights[:, present])
                defined = rows.scores()
                for metric, values in each[name].items():
                    used.setdefault(metric, []).extend([values] if np.isfinite(defined[metric].value) else [])
        result = {metric: _macro_resampled(values, len(weights)) for metric, values in used.items()}
        for name, of_label in each.items():
            result |= {f"{metric}:{name}": values for metric, values in of_label.items()}
        return result

    def interval(
        self, metric: str, replicates: Mapping[str, Replicates], patients: "np.ndarray", inflation: float = 1.0
    ) -> Interval:
        """See `Classes.interval`."""
        name, _, of = metric.partition(":")
        if not of:
            parts = [f"{name}:{label}" for label in self.names]
            parts = [part for part in parts if part in replicates and np.isfinite(replicates[part].value)]
            return interval_of_mean(
                replicates[metric].value,
                [self.interval(part, replicates, patients, inflation) for part in parts],
                [replicates[part] for part in parts],
                independent=False,
            )
        rows, classes = self.label(self.names.index(of))
        of_label = {key.partition(":")[0]: values for key, values in replicates.items() if key.partition(":")[2] == of}
        return classes.interval(name, of_label, patients[rows], inflation)


def _macro_resampled(values: Sequence[Floats], resamples: int) -> Floats:
    return np.mean(np.stack(values), 0) if values else np.full(resamples, np.nan)

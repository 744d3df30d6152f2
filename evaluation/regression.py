"""Metrics of predicted numbers."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from . import weighted
from .classification import Score
from .intervals import Interval, Replicates, interval_on_scale
from .weighted import Floats, Integers


@dataclass(frozen=True)
class Values:
    """Rows with one number each.

    Attributes:
        target: `(n,)` float64.
        prediction: `(n,)` float64.
    """

    target: Floats
    prediction: Floats

    def __len__(self) -> int:
        return len(self.target)

    def take(self, rows: Integers) -> "Values":
        """The same with some of the rows."""
        return Values(self.target[rows], self.prediction[rows])

    def scores(self) -> dict[str, Score]:
        """Every metric of these rows."""
        values = self.resampled(np.ones((1, len(self))))
        return {name: Score(float(value[0]), len(self)) for name, value in values.items()}

    def resampled(self, weights: Floats) -> dict[str, Floats]:
        """The same metrics of weighted rows, `(R,)`; weights: `(R, n)`."""
        return {
            "r2": weighted.r2(self.target, self.prediction, weights),
            "mae": weighted.mean(np.abs(self.target - self.prediction), weights),
            "spearman": weighted.spearman(self.target, self.prediction, weights),
        }

    def interval(
        self, metric: str, replicates: Mapping[str, Replicates], patients: "np.ndarray", inflation: float = 1.0
    ) -> Interval:
        """See `Classes.interval`."""
        scale = {"r2": "log1m", "mae": "log", "spearman": "fisher"}[metric]
        return interval_on_scale(replicates[metric], scale, len(np.unique(patients)), inflation)

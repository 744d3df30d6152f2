"""Metrics of predicted numbers."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr
from sklearn import metrics

from . import weighted
from .classification import Score
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
        """Every metric of these rows, by scikit-learn and scipy."""
        varied = len(np.unique(self.target)) > 1
        ranked = varied and len(np.unique(self.prediction)) > 1
        values = {
            "r2": metrics.r2_score(self.target, self.prediction) if varied else np.nan,
            "mae": metrics.mean_absolute_error(self.target, self.prediction),
            "spearman": spearmanr(self.target, self.prediction).statistic if ranked else np.nan,
        }
        return {name: Score(float(value), len(self)) for name, value in values.items()}

    def resampled(self, weights: Floats) -> dict[str, Floats]:
        """The same metrics of each resample, `(R,)`; weights: `(R, n)`."""
        return {
            "r2": weighted.r2(self.target, self.prediction, weights),
            "mae": weighted.mean(np.abs(self.target - self.prediction), weights),
            "spearman": weighted.spearman(self.target, self.prediction, weights),
        }

"""What is fitted on validation predictions after training: the temperature and the decision threshold."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from sklearn.metrics import roc_curve

from ..errors import LongslideError
from .classification import CALIBRATION_BINS
from .weighted import Booleans, Floats, Integers

TEMPERATURES = (0.5, 5.0)
"""Range of the temperature: a validation part that is perfectly separated would ask for 0."""

FEWEST_CALIBRATED = 50
"""With fewer validation patients there is no temperature: it would follow their noise."""

PRIOR_SPREAD = 0.5
"""Standard deviation of the normal prior of log T around 0, that is around no temperature."""


def fit_temperature(probability: Callable[[float], Floats], target: Integers, patients: int) -> float | None:
    """The most probable temperature T (Guo et al. 2017), given a prior around 1 that few rows do not outweigh.

    Args:
        probability: The `(N, C)` probabilities of the classes at a temperature, float64.
        target: `(N,)` class numbers.
        patients: How many patients the rows are of.

    Returns:
        T, above 1 where predictions become less sure; None of fewer than `FEWEST_CALIBRATED` patients.

    Raises:
        LongslideError: No rows, or probabilities that are not finite.
    """
    target = np.asarray(target)
    if not len(target) or not np.isfinite(probability(1.0)).all():
        raise LongslideError("cannot fit the temperature: there are no validation outputs, or some are not finite")
    if patients < FEWEST_CALIBRATED:
        return None
    share = patients / len(target)  # slides of one patient are not so many patients

    def loss(log_temperature: float) -> float:
        given = probability(float(np.exp(log_temperature)))[np.arange(len(target)), target]
        likelihood = float(np.log(np.clip(given, 1e-300, None)).sum())
        return (log_temperature / PRIOR_SPREAD) ** 2 / 2 - share * likelihood

    return float(np.exp(minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded").x))


def best_threshold(target: Booleans, probability: Floats) -> float:
    """The threshold with the highest sensitivity + specificity (Youden 1950); positive means `probability >= threshold`.

    It lies halfway between two predictions, so that it does not hang on the last digits of one. Of several equally good
    ones, the closest to 0.5.

    Args:
        target: `(N,)` whether each row is positive.
        probability: `(N,)` of the positive class.

    Returns:
        The threshold; 0.5 where there is one class only.
    """
    target = np.asarray(target, bool)
    probability = np.asarray(probability, np.float64)
    if target.all() or not target.any():
        return 0.5
    false_positives, true_positives, thresholds = roc_curve(target, probability, drop_intermediate=False)
    youden = true_positives - false_positives
    best = np.flatnonzero(youden[1:] >= youden.max() - 1e-12) + 1  # the first is above all predictions
    if not len(best):
        return 0.5
    lower = np.r_[thresholds, thresholds[-1]]
    candidates = (thresholds[best] + lower[best + 1]) / 2
    return float(candidates[np.argmin(np.abs(candidates - 0.5))])


class CalibrationBin(NamedTuple):
    """Rows whose confidence falls in one bin: their mean confidence, the share that is right, and how many they are."""

    confidence: float
    observed: float
    n: int


def calibration_curve(confidence: Floats, correct: Floats, bins: int = CALIBRATION_BINS) -> list[CalibrationBin]:
    """What the expected calibration error is made of: the bins of equal width that are not empty.

    Args:
        confidence: `(n,)` probabilities.
        correct: `(n,)` 1 where what they are the probability of holds, else 0.
        bins: Number of bins.
    """
    bin_of = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    return [
        CalibrationBin(
            float(confidence[bin_of == b].mean()), float(correct[bin_of == b].mean()), int((bin_of == b).sum())
        )
        for b in np.unique(bin_of)
    ]

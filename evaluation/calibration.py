"""What is fitted on validation predictions after training: the temperature and the decision threshold."""

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import roc_curve

from ..errors import LongslideError
from .classification import CALIBRATION_BINS
from .weighted import Booleans, Floats, Integers

TEMPERATURES = (0.05, 20.0)
"""Range of the temperature: a validation part that is perfectly separated would ask for 0."""


def fit_temperature(logits: Floats, target: Integers) -> float:
    """The temperature T for which `logits / T` have the least log-loss (Guo et al. 2017); it leaves the order of scores.

    Args:
        logits: `(N, C)` logits or log-probabilities of the classes; or `(N,)` or `(N, 1)` of the positive class of two.
        target: `(N,)` class numbers.

    Returns:
        T; above 1 makes predictions less sure.

    Raises:
        LongslideError: No rows, or logits that are not finite.
    """
    logits, target = np.asarray(logits, np.float64), np.asarray(target)
    if not len(target) or not np.isfinite(logits).all():
        raise LongslideError("cannot fit the temperature: there are no validation logits, or some are not finite")
    logits = logits.reshape(len(target), -1)
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], 1)

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(logits / np.exp(log_temperature), 1)[np.arange(len(target)), target].mean())

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

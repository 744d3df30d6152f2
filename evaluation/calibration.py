"""What is fitted on validation predictions after training: temperature, intercept and the decision threshold."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.stats import chi2
from sklearn.metrics import roc_curve

from ..errors import LongslideError
from .classification import CALIBRATION_BINS
from .weighted import Booleans, Floats, Integers

TEMPERATURES = (0.5, 5.0)
"""Range of the temperature: a validation part that is perfectly separated would ask for 0."""

FEWEST_CALIBRATED = 50
"""With fewer validation patients there is no temperature: it would follow their noise."""

PRIOR_SPREAD = 0.5, 1.0
"""Standard deviations of the normal priors of log T and of the intercept, both around 0: around no calibration."""

HELPS = float(chi2.ppf(0.95, 1))
"""An intercept is there if its likelihood ratio statistic is larger: with weighted classes it is, since a model so trained
takes the classes for equally frequent."""


class Calibration(NamedTuple):
    """The log-odds of a class become `log-odds / temperature + intercept`."""

    temperature: float
    intercept: float = 0.0


def fit_calibration(
    probability: Callable[[Calibration], Floats], target: Integers, patients: int, *, intercept: bool = False
) -> Calibration | None:
    """The most probable calibration (Guo et al. 2017, Platt 1999), given priors that few rows do not outweigh.

    Args:
        probability: The `(N, C)` probabilities of the classes by a calibration, float64.
        target: `(N,)` class numbers.
        patients: How many patients the rows are of.
        intercept: Whether there may be one, of two classes: of more it would change decisions.

    Returns:
        A temperature above 1 where predictions become less sure, and an intercept where it helps; None of fewer than
        `FEWEST_CALIBRATED` patients.

    Raises:
        LongslideError: No rows, or probabilities that are not finite.
    """
    target = np.asarray(target)
    if not len(target) or not np.isfinite(probability(Calibration(1.0))).all():
        raise LongslideError("cannot fit the temperature: there are no validation outputs, or some are not finite")
    if patients < FEWEST_CALIBRATED:
        return None
    share = patients / len(target)  # slides of one patient are not so many patients
    spreads = np.array(PRIOR_SPREAD)

    def loss(values: Floats) -> float:
        given = probability(Calibration(float(np.exp(values[0])), float(values[1])))[np.arange(len(target)), target]
        return -share * float(np.log(np.clip(given, 1e-300, None)).sum())

    def penalised(values: Floats) -> float:
        return loss(values) + float(((values / spreads) ** 2).sum()) / 2

    ends = tuple(np.log(TEMPERATURES))
    alone = minimize_scalar(lambda value: penalised(np.array([value, 0.0])), bounds=ends, method="bounded")
    values = np.array([alone.x, 0.0])
    if intercept:
        both = np.asarray(minimize(penalised, values, method="Nelder-Mead", bounds=[ends, (None, None)]).x)
        values = both if 2 * (loss(values) - loss(both)) > HELPS else values
    return Calibration(float(np.exp(values[0])), float(values[1]))


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

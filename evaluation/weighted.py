"""Metrics of many weighted samples at once: what makes a bootstrap of thousands of resamples take seconds.

A resample of n rows is a row of `weights`, `(R, n)` float64: how often each row was drawn. A weight of 2 counts as two
rows, so that each function gives what the library's function gives for the resample written out. NaN marks a resample for
which the metric is not defined (one class only, no variance).
"""

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import trapezoid

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]
Integers = NDArray[np.int64]


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Elementwise quotient; NaN where the denominator is zero."""
    quotient = np.full(np.broadcast_shapes(np.shape(numerator), np.shape(denominator)), np.nan)
    np.divide(numerator, denominator, out=quotient, where=np.asarray(denominator) != 0)
    return quotient


def mean(values: Floats, weights: Floats) -> Floats:
    """Mean of values `(n,)` or `(n, K)` in each resample: `(R,)` or `(R, K)`."""
    total = weights.sum(1)
    return ratio(weights @ values, total if values.ndim == 1 else total[:, None])


def _tied_sums(values: Floats, columns: list[Floats]) -> tuple[Integers, list[Floats]]:
    """Sums of the columns `(R, n)` over rows of equal value, in ascending order of value: each `(R, G)`.

    Also `(n,)` the group of each row.
    """
    order = np.argsort(values, kind="stable")
    new = np.r_[True, np.diff(values[order]) > 0]
    group = np.empty(len(values), np.int64)
    group[order] = np.cumsum(new) - 1
    ordered = [column[:, order] for column in columns]
    if not new.all():
        ordered = [np.add.reduceat(column, np.flatnonzero(new), axis=1) for column in ordered]
    return group, ordered


def auroc_and_auprc(target: Booleans, score: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Area under the ROC curve, and average precision (the area under the precision-recall curve as a step function).

    Args:
        target: `(n,)` whether each row is positive.
        score: `(n,)` higher for the positive class.
        weights: `(R, n)`.

    Returns:
        Both `(R,)`.
    """
    _, (positive, negative) = _tied_sums(score, [weights * target, weights * ~target])
    positives, negatives = positive.sum(1), negative.sum(1)
    below = np.cumsum(negative, 1) - negative / 2  # a tie counts half
    auroc = ratio((positive * below).sum(1), positives * negatives)
    true_positives = np.cumsum(positive[:, ::-1], 1)[:, ::-1]  # at or above each score
    called = true_positives + np.cumsum(negative[:, ::-1], 1)[:, ::-1]
    precision = np.divide(true_positives, called, out=np.zeros_like(called), where=called > 0)
    auprc = ratio((positive * precision).sum(1), positives)
    auprc[negatives == 0] = np.nan  # 1 whatever the scores are
    return auroc, auprc


def confusion(target: Integers, prediction: Integers, classes: int, weights: Floats) -> Floats:
    """Confusion matrices `(R, C, C)`: rows are the true classes.

    Args:
        target: `(n,)` true class numbers.
        prediction: `(n,)` predicted class numbers.
        classes: C.
        weights: `(R, n)`.
    """
    cell = np.zeros((len(target), classes * classes))
    cell[np.arange(len(target)), target * classes + prediction] = 1
    return (weights @ cell).reshape(-1, classes, classes)


def recall(matrix: Floats) -> Floats:
    """Share of each true class that is found, `(R, C)`."""
    return ratio(np.diagonal(matrix, axis1=1, axis2=2), matrix.sum(2))


def f1(matrix: Floats) -> Floats:
    """F1 of each class, `(R, C)`."""
    return ratio(2 * np.diagonal(matrix, axis1=1, axis2=2), matrix.sum(1) + matrix.sum(2))


def quadratic_kappa(matrix: Floats) -> Floats:
    """Cohen's kappa with quadratic weights, `(R,)`: for two classes, plain kappa."""
    steps = np.arange(matrix.shape[1])
    distance = (steps[:, None] - steps[None, :]) ** 2.0
    expected = matrix.sum(2)[:, :, None] * matrix.sum(1)[:, None, :]
    return 1 - ratio((matrix * distance).sum((1, 2)) * matrix.sum((1, 2)), (expected * distance).sum((1, 2)))


def expected_calibration_error(confidence: Floats, correct: Floats, weights: Floats, bins: int) -> Floats:
    """Mean distance between confidence and the share that is right, over bins of equal width weighted by size, `(R,)`.

    Naeini et al. 2015, Guo et al. 2017. It is biased upwards, more so the fewer rows a bin has: resamples too.

    Args:
        confidence: `(n,)` probabilities.
        correct: `(n,)` 1 where what they are the probability of holds, else 0.
        weights: `(R, n)`.
        bins: Number of bins.
    """
    bin_of = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    surplus = np.zeros((len(confidence), bins))
    surplus[np.arange(len(confidence)), bin_of] = confidence - correct
    return ratio(np.abs(weights @ surplus).sum(1), weights.sum(1))


def r2(target: Floats, prediction: Floats, weights: Floats) -> Floats:
    """Coefficient of determination `(R,)` of `(n,)` predictions; `weights` is `(R, n)`."""
    centred = target - target.mean()  # keeps the difference of squares below accurate
    variance = mean(centred**2, weights) - mean(centred, weights) ** 2
    return 1 - ratio(mean((target - prediction) ** 2, weights), np.where(variance > 1e-12, variance, 0))


def spearman(target: Floats, prediction: Floats, weights: Floats) -> Floats:
    """Spearman's rank correlation `(R,)` of `(n,)` numbers, `weights` being `(R, n)`; ties share the mean of their ranks."""
    total = weights.sum(1, keepdims=True)
    centred = []
    for values in (target, prediction):
        group, (size,) = _tied_sums(values, [weights])
        rank = (np.cumsum(size, 1) - size + (size + 1) / 2)[:, group]
        centred.append(rank - (total + 1) / 2)  # the mean rank
    a, b = centred
    spread = (weights * a * a).sum(1) * (weights * b * b).sum(1)
    return ratio((weights * a * b).sum(1), np.sqrt(spread))


def c_index(time: Floats, event: Booleans, risk: Floats, weights: Floats) -> Floats:
    """Harrell's concordance index, `(R,)`: the share of comparable pairs in which the earlier event had the higher risk.

    Harrell et al. 1996. A pair is comparable when the shorter time is an event, or the times are equal and one is an event.
    Equal risks count half.

    Args:
        time: `(n,)` time to event or censoring.
        event: `(n,)` whether the event was seen.
        risk: `(n,)` higher for earlier events.
        weights: `(R, n)`.
    """
    drawn = weights.astype(np.float32)  # whole numbers, far below 2**24: exact, and twice as fast
    concordant, comparable = np.zeros(len(weights)), np.zeros(len(weights))
    first = np.flatnonzero(event)
    for start in range(0, len(first), 1024):  # (1024, n) pairs at a time
        i = first[start : start + 1024, None]
        pair = (time[i] < time) | ((time[i] == time) & ~event)
        difference = risk[i] - risk
        won = pair * np.where(np.abs(difference) <= 1e-8, 0.5, difference > 0)  # 1e-8 as in scikit-survival
        concordant += np.einsum("rb,rb->r", weights[:, i[:, 0]], drawn @ won.T.astype(np.float32))
        comparable += np.einsum("rb,rb->r", weights[:, i[:, 0]], drawn @ pair.T.astype(np.float32))
    return ratio(concordant, comparable)


def integrated_brier(time: Floats, event: Booleans, survival: Floats, times: Floats, weights: Floats) -> Floats:
    """Integrated Brier score with inverse probability of censoring weights, `(R,)`.

    Graf et al. 1999. The censoring distribution is that of the resample itself, so that the interval holds its
    uncertainty too. Not defined for a resample without events, or whose follow-up ends before the last of `times`.

    Args:
        time: `(n,)` time to event or censoring.
        event: `(n,)` whether the event was seen.
        survival: `(n, T)` predicted probability of no event until each of `times`.
        times: `(T,)` ascending.
        weights: `(R, n)`.
    """
    group, (size, events) = _tied_sums(time, [weights, weights * event])
    moments = np.unique(time)
    at_risk = np.cumsum(size[:, ::-1], 1)[:, ::-1] - events  # for being censored: events come first at a tie
    hazard = np.divide(size - events, at_risk, out=np.zeros_like(at_risk), where=at_risk > 0)
    censoring = np.cumprod(1 - hazard, 1)  # the probability to be uncensored after each moment
    inverse = np.divide(1, censoring, out=np.zeros_like(censoring), where=censoring > 0)
    total = weights.sum(1)
    scores = []
    for index, moment in enumerate(times):
        case = weights * ((time <= moment) & event) * survival[:, index] ** 2
        control = weights @ ((time > moment) * (1 - survival[:, index]) ** 2)
        now = np.searchsorted(moments, moment, side="right") - 1
        scores.append(ratio((case * inverse[:, group]).sum(1) + control * inverse[:, now], total))
    integral = trapezoid(np.stack(scores, 1), times, axis=1) / (times[-1] - times[0])
    followed = np.max(np.where(weights > 0, time, -np.inf), 1, initial=-np.inf)
    integral[(followed <= times[-1]) | ~(events > 0).any(1)] = np.nan
    return np.asarray(integral)

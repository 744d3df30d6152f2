"""Metrics of many weighted samples at once: what makes a jackknife of hundreds of patients take moments.

A row of `weights`, `(R, n)` float64, says how often each of n rows counts: 1 for all gives the metric, 0 leaves a row out, a
weight of 2 counts as two rows. Each function gives what the library's function gives for such rows written out. NaN marks
weights for which the metric is not defined (one class only, no variance).
"""

import numpy as np
from numpy.typing import NDArray

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


def tied_sums(values: Floats, columns: list[Floats]) -> tuple[Integers, list[Floats]]:
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
    _, (positive, negative) = tied_sums(score, [weights * target, weights * ~target])
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
    rounding = max(1e-12 * float((centred**2).mean()), 1e-24 * float((target**2).max()))
    return 1 - ratio(mean((target - prediction) ** 2, weights), np.where(variance > rounding, variance, 0))


def spearman(target: Floats, prediction: Floats, weights: Floats) -> Floats:
    """Spearman's rank correlation `(R,)` of `(n,)` numbers, `weights` being `(R, n)`; ties share the mean of their ranks."""
    total = weights.sum(1, keepdims=True)
    centred = []
    for values in (target, prediction):
        group, (size,) = tied_sums(values, [weights])
        rank = (np.cumsum(size, 1) - size + (size + 1) / 2)[:, group]
        centred.append(rank - (total + 1) / 2)  # the mean rank
    a, b = centred
    spread = (weights * a * a).sum(1) * (weights * b * b).sum(1)
    return ratio((weights * a * b).sum(1), np.sqrt(spread))

"""DeLong's variance of AUROC, and the test that two AUROCs on the same patients are equal."""

import numpy as np
from scipy.stats import norm, rankdata

from .intervals import Difference, Z
from .weighted import Booleans, Floats


def delong(target: Booleans, scores: Floats) -> tuple[Floats, Floats]:
    """AUROCs of several scores of the same rows, and their covariance.

    DeLong, DeLong & Clarke-Pearson 1988, by the ranks of Sun & Xu 2014: O(n log n) in place of O(n^2). Rows must be
    independent: one a patient.

    Args:
        target: `(n,)` whether each row is positive; at least two of each class for a finite covariance.
        scores: `(K, n)` higher for the positive class.

    Returns:
        `(K,)` AUROCs and `(K, K)` covariance; NaN where there is one class only.
    """
    positives, negatives = int(target.sum()), int((~target).sum())
    if not positives or not negatives:
        return np.full(len(scores), np.nan), np.full((len(scores), len(scores)), np.nan)
    together = rankdata(scores, axis=1)
    # For each positive, the share of negatives below it; for each negative, the share of positives above it.
    below = (together[:, target] - rankdata(scores[:, target], axis=1)) / negatives
    above = 1 - (together[:, ~target] - rankdata(scores[:, ~target], axis=1)) / positives
    if min(positives, negatives) < 2:
        return below.mean(1), np.full((len(scores), len(scores)), np.nan)
    covariance = np.atleast_2d(np.cov(below)) / positives + np.atleast_2d(np.cov(above)) / negatives
    return below.mean(1), covariance


def delong_difference(target: Booleans, score_a: Floats, score_b: Floats) -> Difference:
    """DeLong's test that two scores of the same rows have the same AUROC, and the 95% interval of the difference.

    Args:
        target: `(n,)` whether each row is positive.
        score_a: `(n,)`.
        score_b: `(n,)`.

    Returns:
        Of a minus b. p is 1, without an interval, for scores that rank alike; NaN where the variance is unknown.
    """
    (a, b), covariance = delong(target, np.stack([score_a, score_b]))
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    if not variance > 1e-15:  # rounding; nothing that differs between rows
        return Difference(np.nan, np.nan, 1.0 if variance <= 1e-15 and np.isclose(a, b) else np.nan)
    half = Z * np.sqrt(variance)
    return Difference(float(a - b - half), float(a - b + half), float(2 * norm.sf(abs(a - b) / np.sqrt(variance))))

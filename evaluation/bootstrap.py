"""The patient-level bootstrap."""

from collections.abc import Iterator

import numpy as np

from .weighted import Floats

LEVEL = 0.95
"""Coverage of the intervals."""

_CELLS = 4_000_000
"""Weights held at a time: 32 MB."""


def resample_weights(patients: "np.ndarray", resamples: int, seed: int) -> Iterator[Floats]:
    """Draw patients with replacement; each comes with all its rows.

    The same patients and seed give the same draws whatever the order and number of their rows, so that runs can be
    compared resample by resample.

    Args:
        patients: `(n,)` the patient of each row.
        resamples: Number of resamples.
        seed: Seed of the draws.

    Yields:
        `(r, n)` how often each row was drawn; the r add up to `resamples`.
    """
    unique, row = np.unique(patients, return_inverse=True)
    random = np.random.default_rng(seed)
    at_once = max(1, _CELLS // max(len(patients), 1))
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        drawn = random.integers(len(unique), size=(count, len(unique)))
        drawn += len(unique) * np.arange(count)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=count * len(unique)).reshape(count, len(unique))
        yield counts[:, row].astype(np.float64)


def percentile_interval(samples: Floats) -> tuple[float, float]:
    """The 95% percentile interval of a bootstrapped metric (Efron & Tibshirani 1993, chapter 13).

    It stays within the range of the metric and asks nothing of its distribution. Resamples for which the metric is not
    defined are left out; where they are more than half, there is no interval.

    Args:
        samples: `(R,)` value of each resample, NaN where it is not defined.

    Returns:
        The ends, or NaN.
    """
    defined = samples[np.isfinite(samples)]
    if not len(defined) or 2 * len(defined) < len(samples):
        return np.nan, np.nan
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def basic_interval(value: float, samples: Floats) -> tuple[float, float]:
    """The 95% basic interval of a metric that is at least 0 (Davison & Hinkley 1997, section 5.2): the percentile interval
    mirrored at the value.

    For the calibration error, which is as much too high in the sample as resamples are above the sample: percentiles would
    add the two biases, this takes one from the other. The value itself may lie outside.

    Args:
        value: The metric of the sample.
        samples: `(R,)` value of each resample, NaN where it is not defined.

    Returns:
        The ends, or NaN as in `percentile_interval`.
    """
    low, high = percentile_interval(samples)
    return float(np.maximum(0, 2 * value - high)), float(np.maximum(0, 2 * value - low))


def sign_p_value(differences: Floats) -> float:
    """Two-sided p-value that a bootstrapped difference is zero (Davison & Hinkley 1997, section 4.4): twice the share of
    resamples on the rarer side of zero. Never below 2 / (R + 1).

    Args:
        differences: `(R,)` difference in each resample, NaN where it is not defined.
    """
    defined = differences[np.isfinite(differences)]
    if not len(defined) or 2 * len(defined) < len(differences):
        return np.nan
    rarer = min((defined <= 0).sum(), (defined >= 0).sum())
    return float(min(1.0, 2 * (rarer + 1) / (len(defined) + 1)))

"""95% intervals that cover, of every metric, from one jackknife over patients.

A method for each kind of metric, chosen by simulation (`benchmarks/coverage.py`): percentile and BCa bootstrap intervals of
the AUROC of 20 patients cover 45 to 90% in place of 95%, and are empty where all predictions are right.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import betainc, expit, logit
from scipy.stats import norm
from scipy.stats import t as student

from .weighted import Floats, Integers

LEVEL = 0.95
"""Coverage of the intervals."""

FEWEST_PATIENTS = 5
"""Below this many patients there is no interval."""

MOST_GROUPS = 200
"""More patients than this are left out in groups."""

Z = float(norm.ppf((1 + LEVEL) / 2))

_DRAWN = 2_000_000
"""Dirichlet weights drawn, for all values together: the ends are then off by 1% of the width."""

_CELLS = 4_000_000
"""Weights held at a time: 32 MB."""


class Interval(NamedTuple):
    """The ends of a 95% interval and the method that made it; NaN, NaN and no method where there is none."""

    low: float
    high: float
    method: str


NO_INTERVAL = Interval(np.nan, np.nan, "")


class Jackknife:
    """What becomes of metrics when each patient in turn, with all its rows, is left out.

    Of more than `MOST_GROUPS` patients, groups of them are left out (Shao & Tu 1995, section 2.3). The groups depend on the
    patients only, not on the order or number of their rows, so that runs can be compared group by group.

    Args:
        patients: `(n,)` the patient of each row.
    """

    def __init__(self, patients: "np.ndarray") -> None:
        unique, row = np.unique(patients, return_inverse=True)
        self.count = min(len(unique), MOST_GROUPS)
        self.group: Integers = (row % self.count).astype(np.int64)

    def weights(self) -> Iterator[Floats]:
        """`(r, n)` 0 for the rows of the group left out, else 1; the r add up to the number of groups."""
        at_once = max(1, _CELLS // max(len(self.group), 1))
        for start in range(0, self.count, at_once):
            groups = np.arange(start, min(self.count, start + at_once))
            yield (groups[:, None] != self.group).astype(np.float64)

    def groups_of(self, rows: Integers) -> Integers:
        """The groups that have patients among these rows."""
        return np.unique(self.group[rows])


class Replicates(NamedTuple):
    """A metric with each group of patients left out.

    Attributes:
        values: `(G,)` values, NaN where it is not defined; only of the groups that are part of what is measured.
        value: The value with all patients.
    """

    values: Floats
    value: float

    @property
    def deviations(self) -> Floats:
        """`(G,)` how far each group moves the value; 0 where it is not defined without the group."""
        return np.nan_to_num(self.values - self.value)

    @property
    def defined(self) -> bool:
        """Whether the metric is defined without most of the groups."""
        return bool(np.isfinite(self.value)) and 2 * int(np.isfinite(self.values).sum()) > len(self.values)

    @property
    def variance(self) -> float:
        """The jackknife's variance of the value."""
        groups = len(self.values)
        return float((groups - 1) / groups * (self.deviations**2).sum()) if groups > 1 and self.defined else np.nan

    @property
    def quantile(self) -> float:
        """Student's 97.5% quantile for a variance from so many groups."""
        return float(student.ppf((1 + LEVEL) / 2, len(self.values) - 1))


def mid_p(share: float, n: float) -> tuple[float, float]:
    """The exact interval of a proportion (Clopper & Pearson 1934) with mid-P: what was seen counts half in each tail.

    It covers 94% and more where Wilson's covers 86%, close to the ends, and is less wide than the exact one.

    Args:
        share: The proportion.
        n: Of how many; need not be whole.
    """
    k = share * n

    def at_least(p: float) -> float:  # the probability of k or more, of k itself half
        return 0.5 * float(
            (betainc(k, n - k + 1, p) if share > 0 else 1) + (betainc(k + 1, n - k, p) if share < 1 else 0)
        )

    tail = (1 - LEVEL) / 2
    low = 0.0 if share <= 0 else brentq(lambda p: at_least(p) - tail, 0, 1)
    high = 1.0 if share >= 1 else brentq(lambda p: at_least(p) - 1 + tail, 0, 1)
    return float(low), float(high)


def newcombe_variance(auroc: float, positives: int, negatives: int) -> float:
    """Variance of an AUROC by Newcombe's (2006) method 5: Hanley & McNeil's (1982), with the mean size of the two classes in
    place of each."""
    surplus = (positives + negatives) / 2 - 1
    factor = 1 + surplus * (1 - auroc) / (2 - auroc) + surplus * auroc / (1 + auroc)
    return auroc * (1 - auroc) * factor / (positives * negatives)


def newcombe(auroc: float, positives: int, negatives: int, scale: float = 1.0) -> tuple[float, float]:
    """Newcombe's method 5 interval of an AUROC: the values from which it is less than 1.96 of *their* standard errors away.

    It needs no scores and is never empty, whatever the AUROC.

    Args:
        auroc: The AUROC.
        positives: Patients of the positive class.
        negatives: Patients of the other.
        scale: What the variance is multiplied by.
    """

    def half(value: float) -> float:
        return Z * float(np.sqrt(scale * newcombe_variance(value, positives, negatives)))

    low = 0.0 if auroc <= 0 else brentq(lambda x: auroc - x - half(x), 0, min(auroc, 1 - 1e-12))
    high = 1.0 if auroc >= 1 else brentq(lambda x: x - auroc - half(x), max(auroc, 1e-12), 1)
    return float(low), float(high)


def interval_of_auroc(
    replicates: Replicates, positives: int, negatives: int, inflation: float = 1.0, rows: float = 1.0
) -> Interval:
    """Newcombe's interval of one AUROC, with the variance of the jackknife (which is DeLong's, with patients for rows) in
    its place where that is larger.

    Newcombe's variance is that of exponential scores; scores of very different spread in the two classes have more. Where
    patients have several rows the jackknife's is taken, down to that of as many patients as there are rows.

    Args:
        replicates: The AUROC.
        positives: Patients with positive rows.
        negatives: Patients with negative rows.
        inflation: What the variance is multiplied by.
        rows: Rows per patient.
    """
    if not (np.isfinite(replicates.value) and positives and negatives):
        return NO_INTERVAL
    model = newcombe_variance(replicates.value, positives, negatives)
    own = replicates.variance
    scale = max(1 / rows, own / model) if model > 0 and own > 0 else 1.0
    return Interval(*newcombe(replicates.value, positives, negatives, scale * inflation), "newcombe")


def interval_of_share(replicates: Replicates, rows: int, patients: int, inflation: float = 1.0) -> Interval:
    """The exact interval of a proportion; where patients have several rows, of as many rows as would vary so much.

    Args:
        replicates: The proportion.
        rows: Rows that it is of.
        patients: Their patients.
        inflation: What the variance is multiplied by.
    """
    share = replicates.value
    if not (np.isfinite(share) and patients):
        return NO_INTERVAL
    n = float(patients)
    if rows > patients and replicates.variance > 0:
        n = float(np.clip(share * (1 - share) / replicates.variance, patients, rows))
    return Interval(*mid_p(share, n / inflation), "mid-p")


def interval_of_precision(replicates: Replicates, positives: int, inflation: float = 1.0) -> Interval:
    """The exact interval of an average precision, taken for a share of the positives (Boyd et al. 2013), or of as many fewer
    as would vary so much.

    Args:
        replicates: The average precision.
        positives: Patients with positive rows.
        inflation: What the variance is multiplied by.
    """
    value, variance = replicates.value, replicates.variance
    if not (np.isfinite(value) and positives):
        return NO_INTERVAL
    n = min(float(positives), value * (1 - value) / variance) if variance > 0 and 0 < value < 1 else float(positives)
    return Interval(*mid_p(value, n / inflation), "mid-p")


@lru_cache(4)
def _drawn(groups: int) -> Floats:
    """`(draws, groups + 1)` Dirichlet weights of so many values and, half as heavy, of one more."""
    shape = _DRAWN // (groups + 1), groups + 1
    weights = np.random.default_rng(0).standard_gamma(np.r_[np.ones(groups), 0.5], shape)
    return np.asarray(weights / weights.sum(1, keepdims=True))


def interval_of_mean_loss(replicates: Replicates, worst: float, inflation: float = 1.0) -> Interval:
    """Gaffke's interval of the mean of numbers between 0 and a bound (https://arxiv.org/abs/1905.06208).

    The weights of the Bayesian bootstrap, with one more number at the far end: at the bound for the upper end, at 0 for the
    lower one. So it knows of what a small sample has not seen: a few losses that are much larger than the others. Of 0 and
    1 it is Clopper & Pearson's; here the additional number counts half, as in `mid_p`.

    Args:
        replicates: The mean.
        worst: The bound.
        inflation: What the variance is multiplied by.
    """
    value, groups = replicates.value, len(replicates.values)
    if not (replicates.defined and worst > 0):
        return NO_INTERVAL
    each = value - (groups - 1) * replicates.deviations
    least, most = min(0.0, float(each.min())), max(worst, float(each.max()))  # of censored losses, which weigh more
    weights = _drawn(groups)
    means = weights[:, :-1] @ each
    tail, wider = (1 - LEVEL) / 2, np.sqrt(inflation)
    low, high = np.quantile(means + weights[:, -1] * least, tail), np.quantile(means + weights[:, -1] * most, 1 - tail)
    low, high = value - wider * max(0.0, value - low), value + wider * max(0.0, high - value)
    return Interval(float(max(0.0, low)), float(min(most, high)), "gaffke")


def interval_on_scale(
    replicates: Replicates, scale: str, patients: int, inflation: float = 1.0, extremes: bool = True
) -> Interval:
    """The jackknife's interval with Student's quantile, on a scale that has no ends.

    Args:
        replicates: The metric.
        scale: `logit` for metrics from 0 to 1, `fisher` for -1 to 1, `log` for those above 0, `log1m` for those below 1.
        patients: Patients that the metric rests on.
        inflation: What the variance is multiplied by.
        extremes: Whether a metric of `logit` or `fisher` at the end of its scale, where the jackknife knows no variance,
            gets that of a proportion.
    """
    value, variance = replicates.value, replicates.variance
    if not np.isfinite(value):
        return NO_INTERVAL
    if scale in ("logit", "fisher"):
        lowest = 0.0 if scale == "logit" else -1.0
        share = (value - lowest) / (1 - lowest)
        if share <= 1e-12 or share >= 1 - 1e-12:
            if not (extremes and patients):
                return NO_INTERVAL
            low, high = mid_p(round(share), patients / inflation)
            return Interval((1 - lowest) * low + lowest, (1 - lowest) * high + lowest, "mid-p")
        if not variance > 1e-24:
            return NO_INTERVAL
        half = replicates.quantile * np.sqrt(variance * inflation) / ((1 - lowest) * share * (1 - share))
        low, high = ((1 - lowest) * expit(logit(share) + sign * half) + lowest for sign in (-1, 1))
        return Interval(float(low), float(high), "jackknife")
    distance = value if scale == "log" else 1 - value
    if not (distance > 0 and variance > 1e-24):
        return NO_INTERVAL
    half = replicates.quantile * np.sqrt(variance * inflation) / distance
    near, far = distance * np.exp(-half), distance * np.exp(min(half, 500.0))
    return (
        Interval(float(near), float(far), "jackknife")
        if scale == "log"
        else Interval(float(1 - far), float(1 - near), "jackknife")
    )


def interval_of_mean(
    value: float, intervals: Sequence[Interval], replicates: Sequence[Replicates], *, independent: bool
) -> Interval:
    """The interval of a mean of metrics from the interval of each (Zou & Donner 2008, MOVER).

    Args:
        value: The mean.
        intervals: The interval of each.
        replicates: Each metric, for how they go together.
        independent: They rest on different patients. Else those whose correlation is not known count as one.
    """
    if not intervals or any(not np.isfinite(one.low) for one in intervals):
        return NO_INTERVAL
    if independent:
        together = np.eye(len(intervals))
    else:
        deviations = np.stack([one.deviations for one in replicates])
        spread = np.sqrt((deviations**2).sum(1))
        known = np.outer(spread, spread) > 1e-24
        together = np.ones((len(intervals), len(intervals)))
        np.divide(deviations @ deviations.T, np.outer(spread, spread), out=together, where=known)
    below = np.array([one.value - interval.low for one, interval in zip(replicates, intervals, strict=True)])
    above = np.array([interval.high - one.value for one, interval in zip(replicates, intervals, strict=True)])
    low = value - np.sqrt(max(0.0, below @ together @ below)) / len(intervals)
    high = value + np.sqrt(max(0.0, above @ together @ above)) / len(intervals)
    return Interval(float(low), float(high), "mover")


class Difference(NamedTuple):
    """The interval of a difference, and the two-sided p-value that it is zero; NaN where nothing is known."""

    low: float
    high: float
    p: float


def difference_of(first: Replicates, second: Replicates, inflation: float = 1.0) -> Difference:
    """The paired difference of a metric of two runs, by the jackknife with Student's distribution.

    Args:
        first: The metric of one run.
        second: That of the other, with the same patients left out.
        inflation: What the variance is multiplied by.

    Returns:
        No interval where the runs do not differ for any patient; then p is 1.
    """
    difference = Replicates(first.values - second.values, first.value - second.value)
    if not difference.defined:
        return Difference(np.nan, np.nan, np.nan)
    error = np.sqrt(difference.variance * inflation)
    if not error > 1e-12:
        return Difference(np.nan, np.nan, 1.0 if abs(difference.value) < 1e-12 else np.nan)
    half = difference.quantile * error
    p = 2 * student.sf(abs(difference.value) / error, len(difference.values) - 1)
    return Difference(float(difference.value - half), float(difference.value + half), float(p))

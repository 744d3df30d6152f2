"""Metrics of predicted survival, and Kaplan-Meier curves."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.integrate import trapezoid
from scipy.stats import chi2

from . import censored
from .classification import Score
from .intervals import (
    NO_INTERVAL,
    Interval,
    Replicates,
    Z,
    interval_of_auroc,
    interval_of_mean,
    interval_of_mean_loss,
    interval_on_scale,
)
from .weighted import Booleans, Floats, Integers

GRID = 100
"""Steps over which the Brier score is integrated."""


@dataclass(frozen=True)
class Survival:
    """Rows with a time to event or censoring each.

    Attributes:
        time: `(n,)` float64.
        event: `(n,)` bool: whether the event was seen at that time; censored otherwise.
        risk: `(n,)` float64, higher for earlier events.
        survival: `(n, T)` float64 predicted probability of no event until each of `times`, NaN where it was not predicted
            (folds may have times of their own); T may be 0.
        times: `(T,)` float64, ascending.
    """

    time: Floats
    event: Booleans
    risk: Floats
    survival: Floats
    times: Floats

    def __len__(self) -> int:
        return len(self.time)

    def take(self, rows: Integers) -> "Survival":
        """The same with some of the rows, and the times that were predicted for any of them."""
        survival = self.survival[rows]
        known = ~np.isnan(survival).all(0) if len(rows) else np.zeros(len(self.times), bool)
        return Survival(self.time[rows], self.event[rows], self.risk[rows], survival[:, known], self.times[known])

    def on_grid(self) -> tuple[Floats, Floats]:
        """Predicted survival over equal steps from 0 to the last time that is predicted for all rows and lies within their
        follow-up; the hazard is constant between predicted times.

        Returns:
            `(K,)` times and `(n, K)` survival; K is 0 where there is no such time.
        """
        ends = [
            self.times[row & (self.times < self.time.max())].max(initial=0.0)
            for row in np.unique(~np.isnan(self.survival), axis=0)
        ]
        if not len(self) or not min(ends, default=0.0) > 0:
            return np.empty(0), np.empty((len(self), 0))
        grid = np.linspace(0, min(ends), GRID + 1)
        hazard = np.empty((len(self), len(grid)))
        known = ~np.isnan(self.survival)
        for pattern in np.unique(known, axis=0):
            rows = (known == pattern).all(1)
            times = np.r_[0.0, self.times[pattern]]
            cumulative = -np.log(np.clip(self.survival[np.ix_(rows, pattern)], 1e-12, 1))
            cumulative = np.concatenate([np.zeros((len(cumulative), 1)), cumulative], 1)
            after = np.clip(np.searchsorted(times, grid), 1, len(times) - 1)
            share = (grid - times[after - 1]) / (times[after] - times[after - 1])
            hazard[rows] = cumulative[:, after - 1] * (1 - share) + cumulative[:, after] * share
        return grid, np.exp(-hazard)

    def scores(self) -> dict[str, Score]:
        """Every metric of these rows; what weighs censoring takes it from these rows."""
        values = self.resampled(np.ones((1, len(self))))
        return {name: Score(float(value[0]), len(self)) for name, value in values.items()}

    def resampled(self, weights: Floats) -> dict[str, Floats]:
        """The same metrics of weighted rows, `(R,)`; weights: `(R, n)`."""
        data = self.time, self.event
        result = {
            "c_index": censored.c_index(*data, self.risk, weights),
            "c_index_uno": censored.c_index(*data, self.risk, weights, uno=True),
        }
        if not len(self.times):
            return result
        at = {f"time_auc:{time:g}": censored.time_auc(*data, self.risk, time, weights) for time in self.times}
        defined = [name for name in at if np.isfinite(self._time_auc(name))]
        result["time_auc"] = np.mean([at[name] for name in defined], 0) if defined else np.full(len(weights), np.nan)
        result |= at
        grid, survival = self.on_grid()
        for name, scores in zip(
            ("integrated_brier", "integrated_brier_km"), censored.brier(*data, survival, grid, weights), strict=True
        ):
            result[name] = trapezoid(scores, grid, axis=1) / grid[-1] if len(grid) else np.full(len(weights), np.nan)
        return result

    def _time_auc(self, name: str) -> float:
        time = float(name.partition(":")[2])
        return float(censored.time_auc(self.time, self.event, self.risk, time, np.ones((1, len(self))))[0])

    def interval(
        self, metric: str, replicates: Mapping[str, Replicates], patients: "np.ndarray", inflation: float = 1.0
    ) -> Interval:
        """See `Classes.interval`."""
        if metric == "integrated_brier_km":  # what to hold the other against, no result
            return NO_INTERVAL
        if metric == "time_auc":
            parts = [
                name for name, own in replicates.items() if name.startswith("time_auc:") and np.isfinite(own.value)
            ]
            intervals = [self.interval(name, replicates, patients, inflation) for name in parts]
            of_parts = [replicates[name] for name in parts]
            return interval_of_mean(replicates[metric].value, intervals, of_parts, independent=False)
        if metric == "integrated_brier":
            survival = self.on_grid()[1]
            worst = float((np.maximum(survival, 1 - survival) ** 2).mean(1).max()) if survival.size else 0.0
            return interval_of_mean_loss(replicates[metric], worst, inflation)
        if metric.startswith("time_auc:"):
            time = float(metric.partition(":")[2])
            cases, controls = self.event & (self.time <= time), self.time > time
            of_cases, of_controls = len(np.unique(patients[cases])), len(np.unique(patients[controls]))
            return interval_of_auroc(replicates[metric], of_cases, of_controls, inflation)
        return interval_on_scale(replicates[metric], "logit", len(np.unique(patients[self.event])), inflation)


class KaplanMeier(NamedTuple):
    """A Kaplan-Meier curve.

    Attributes:
        time: `(K,)` where it steps, from 0 on.
        survival: `(K,)` probability of no event until then.
        low: `(K,)` lower end of the 95% interval (log-log transformed).
        high: `(K,)` upper end.
        censored: `(M,)` times of censoring.
    """

    time: Floats
    survival: Floats
    low: Floats
    high: Floats
    censored: Floats


def kaplan_meier(time: Floats, event: Booleans) -> KaplanMeier:
    """The Kaplan-Meier curve of rows with `(n,)` times and events; intervals from Greenwood's variance."""
    moments = censored.Moments.of(time, event, np.ones((1, len(time))))
    survival, at_risk, events = moments.survival()[0], moments.at_risk[0], moments.events[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.sqrt(np.cumsum(events / (at_risk * (at_risk - events)))) / np.abs(np.log(survival))
        low, high = (survival ** np.exp(sign * Z * error) for sign in (1, -1))
    for curve, before_events in ((low, 1.0), (high, 1.0)):
        curve[survival == 1] = before_events
        curve[survival == 0] = np.nan  # nothing is known of it after the last event of all
    return KaplanMeier(
        np.r_[0.0, moments.times], np.r_[1.0, survival], np.r_[1.0, low], np.r_[1.0, high], np.sort(time[~event])
    )


def log_rank(time: Floats, event: Booleans, group: Integers) -> float:
    """p-value of the log-rank test that `(n,)` groups have the same survival; NaN without an event or a second group."""
    names = np.unique(group)
    if not event.any() or len(names) < 2:
        return np.nan
    of_group = (group == names[:, None]).astype(np.float64)
    moments = censored.Moments.of(time, event, of_group)
    at_risk, events = moments.at_risk, moments.events
    all_at_risk, all_events = at_risk.sum(0), events.sum(0)
    used = all_events > 0
    share = at_risk[:, used] / all_at_risk[used]
    surplus = (events[:, used] - all_events[used] * share).sum(1)
    remaining = np.maximum(all_at_risk[used] - 1, 1)
    factor = all_events[used] * (all_at_risk[used] - all_events[used]) / remaining
    covariance = np.diag((share * factor).sum(1)) - (share * factor) @ share.T
    statistic = surplus[1:] @ np.linalg.pinv(covariance[1:, 1:]) @ surplus[1:]
    return float(chi2.sf(statistic, len(names) - 1)) if covariance[0, 0] > 0 else np.nan

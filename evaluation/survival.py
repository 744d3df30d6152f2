"""Metrics of predicted survival, and Kaplan-Meier curves."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from sksurv.compare import compare_survival
from sksurv.metrics import concordance_index_censored, integrated_brier_score
from sksurv.nonparametric import kaplan_meier_estimator
from sksurv.util import Surv

from . import weighted
from .classification import Score
from .weighted import Booleans, Floats, Integers


@dataclass(frozen=True)
class Survival:
    """Rows with a time to event or censoring each.

    Attributes:
        time: `(n,)` float64.
        event: `(n,)` bool: whether the event was seen at that time; censored otherwise.
        risk: `(n,)` float64, higher for earlier events.
        survival: `(n, T)` float64 predicted probability of no event until each of `times`; T may be 0.
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
        """The same with some of the rows."""
        return Survival(self.time[rows], self.event[rows], self.risk[rows], self.survival[rows], self.times)

    def _followed(self) -> Booleans:
        """`(T,)` the times within the follow-up of these rows; the Brier score is integrated over them."""
        return np.asarray((self.times >= self.time.min()) & (self.times < self.time.max()))

    def scores(self) -> dict[str, Score]:
        """Every metric of these rows, by scikit-survival.

        The weights of the integrated Brier score come from the censoring among these rows.
        """
        n = len(self)
        concordance = np.nan
        if weighted.c_index(self.time, self.event, self.risk, np.ones((1, n)))[0] >= 0:  # there is a comparable pair
            concordance = concordance_index_censored(self.event, self.time, self.risk)[0]
        result = {"c_index": Score(float(concordance), n)}
        used = self._followed() if n else np.zeros(len(self.times), bool)
        if len(self.times) > 1:
            value = np.nan
            if used.sum() > 1 and self.event.any():
                outcome = Surv.from_arrays(self.event, self.time)
                value = integrated_brier_score(outcome, outcome, self.survival[:, used], self.times[used])
            result["integrated_brier"] = Score(float(value), n)
        return result

    def resampled(self, weights: Floats) -> dict[str, Floats]:
        """The same metrics of each resample, `(R,)`; weights: `(R, n)`."""
        result = {"c_index": weighted.c_index(self.time, self.event, self.risk, weights)}
        if len(self.times) > 1:
            used = self._followed()
            result["integrated_brier"] = (
                weighted.integrated_brier(self.time, self.event, self.survival[:, used], self.times[used], weights)
                if used.sum() > 1
                else np.full(len(weights), np.nan)
            )
        return result


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
    """The Kaplan-Meier curve of rows with `(n,)` times and events."""
    moments, survival, (low, high) = kaplan_meier_estimator(event, time, conf_type="log-log")
    return KaplanMeier(
        np.r_[0.0, moments], np.r_[1.0, survival], np.r_[1.0, low], np.r_[1.0, high], np.sort(time[~event])
    )


def log_rank(time: Floats, event: Booleans, group: Integers) -> float:
    """p-value of the log-rank test that `(n,)` groups have the same survival; NaN without an event or a second group."""
    if not event.any() or len(np.unique(group)) < 2:
        return np.nan
    return float(compare_survival(Surv.from_arrays(event, time), group)[1])

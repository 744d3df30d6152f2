"""Predictions -> metrics with intervals."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..errors import LongslideError
from ..task import Task, TaskKind
from .bootstrap import basic_interval, percentile_interval
from .scopes import MOST_GROUPS, Scored, score_scopes, select

COLUMNS = ["scope", "level", "metric", "value", "low", "high", "n", "resamples"]
"""Columns of `metrics.csv`."""

PRIMARY_METRIC: dict[TaskKind, str] = {
    "binary": "auroc",
    "multiclass": "auroc",
    "multilabel": "auroc",
    "ordinal": "quadratic_kappa",
    "regression": "r2",
    "survival": "c_index",
}
"""The metric that a task is first judged by."""

LOWER_IS_BETTER = frozenset({"brier", "ece", "log_loss", "mae", "integrated_brier"})


def evaluate(
    predictions: pd.DataFrame,
    task: Task,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    cohort: pd.DataFrame | None = None,
    subgroups: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Every metric of the test predictions, for each fold, pooled, and by subgroups, with 95% intervals.

    Intervals are percentiles over resamples of patients, each with all its slides (for `ece`, which is biased, the basic
    interval). Resamples for which a metric is not defined (one class only, a class not drawn) are left out and counted;
    where they are more than half there is no interval.

    Args:
        predictions: The content of `predictions.csv`; rows of other parts than `test` are not looked at.
        task: What was predicted.
        bootstrap: Number of resamples; 0 for no intervals.
        seed: Their seed.
        cohort: The cohort table, for the subgroups.
        subgroups: Columns of the cohort table; numbers are cut at their quartiles. Default: `site`, if there are several.

    Returns:
        The rows of `metrics.csv`: `scope` (`fold_<k>`, `pooled`, `mean` over the folds, `subgroup:<column>=<value>`),
        `level` (`patient`, `slide`), `metric` (`auroc`; `auroc:<class>` is one class against the rest; plain names are means
        over the classes or labels), `value`, `low` and `high` (empty where not defined), `n` (patients or slides; once for
        each fold that tests them), `resamples` (in which the metric is defined).

    Raises:
        LongslideError: There are no test predictions, or they do not fit the task.
    """
    if subgroups is None:
        sites = 0 if cohort is None or "site" not in cohort else cohort["site"].nunique()
        subgroups = ["site"] if 2 <= sites <= MOST_GROUPS else []
    tables = []
    for level in ("patient", "slide"):
        rows = select(predictions, level)
        if len(rows):
            scored = score_scopes(rows, task, bootstrap=bootstrap, seed=seed, cohort=cohort, subgroups=subgroups)
            tables += [
                _row(scope, level, metric, item) for scope, part in scored.items() for metric, item in part.items()
            ]
    if not tables:
        raise LongslideError("the predictions have no rows of the test part; there is nothing to evaluate")
    return pd.DataFrame(tables, columns=COLUMNS)


def _row(scope: str, level: str, metric: str, scored: Scored) -> tuple[object, ...]:
    if metric.split(":")[0] == "ece":
        low, high = basic_interval(scored.score.value, scored.samples)
    else:
        low, high = percentile_interval(scored.samples)
    return scope, level, metric, scored.score.value, low, high, scored.score.n, int(np.isfinite(scored.samples).sum())

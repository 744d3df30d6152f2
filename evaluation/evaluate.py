"""Predictions -> metrics with intervals."""

from collections.abc import Sequence

import pandas as pd

from ..errors import LongslideError
from ..task import Task, TaskKind
from .scopes import MOST_GROUPS, Scored, score_scopes, select

COLUMNS = ["scope", "level", "metric", "value", "low", "high", "method", "n"]
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

LOWER_IS_BETTER = frozenset({"brier", "ece", "log_loss", "mae", "integrated_brier", "integrated_brier_km"})


def headline_scope(metrics: pd.DataFrame) -> str:
    """The scope to believe first, of a table with a column `scope`: the mean over folds where there are several, since each
    fold has a model and a scale of its own; else all test patients."""
    return "mean" if (metrics["scope"] == "mean").any() else "pooled"


def evaluate(
    predictions: pd.DataFrame,
    task: Task,
    *,
    cohort: pd.DataFrame | None = None,
    subgroups: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Every metric of the test predictions, for the mean over folds, pooled, each fold and by subgroups, with 95% intervals.

    Patients are what varies, each with all its slides. There is no interval of fewer than five patients, and none of `ece`,
    which small samples bias more than they blur. The mean over folds also varies with training (Nadeau & Bengio 2003).

    Args:
        predictions: The content of `predictions.csv`; rows of other parts than `test` are not looked at.
        task: What was predicted.
        cohort: The cohort table, for the subgroups.
        subgroups: Columns of the cohort table; numbers are cut at their quartiles. Default: `site`, if there are several.

    Returns:
        The rows of `metrics.csv`: `scope` (`mean` over the folds, `pooled`, `fold_<k>`, `subgroup:<column>=<value>`),
        `level` (`patient`, `slide`), `metric` (`auroc`; `auroc:<class>` is one class against the rest; plain names are means
        over the classes or labels), `value`, `low` and `high` (empty where there is no interval), `method` (`newcombe`,
        `mid-p`, `gaffke`, `mover`, `jackknife`, see `intervals`; followed by `, nadeau-bengio` where training is part of the
        variance), `n` (patients or slides; once for each fold that tests them).

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
            scored = score_scopes(rows, task, cohort=cohort, subgroups=subgroups)
            tables += [
                _row(scope, level, metric, item) for scope, part in scored.items() for metric, item in part.items()
            ]
    if not tables:
        raise LongslideError("the predictions have no rows of the test part; there is nothing to evaluate")
    return pd.DataFrame(tables, columns=COLUMNS)


def _row(scope: str, level: str, metric: str, scored: Scored) -> tuple[object, ...]:
    return scope, level, metric, scored.score.value, *scored.interval, scored.score.n

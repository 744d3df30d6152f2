"""Paired comparison of runs on the same patients."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from ..errors import LongslideError
from ..prediction_columns import PredictionColumns
from ..task import CLASSIFICATION, Task
from .classification import Classes, Labels
from .delong import delong_difference
from .intervals import FEWEST_PATIENTS, Difference, difference_of
from .outcomes import read_outcomes
from .scopes import score_scopes, select
from .weighted import Floats, Integers

COLUMNS = ["scope", "metric", "run_a", "run_b", "difference", "low", "high", "p", "test", "p_holm", "n"]


def check_same_patients(predictions: Mapping[str, pd.DataFrame], task: Task, level: str) -> None:
    """Make sure that runs were tested on the same patients (or slides) with the same targets.

    Args:
        predictions: Test rows of each run, by its name.
        task: The task they share.
        level: `patient` or `slide`.

    Raises:
        LongslideError: The patients or the targets differ; it says in how many.
    """
    (first, rows), *others = predictions.items()
    columns = PredictionColumns(task).target
    known = rows.drop_duplicates(f"{level}_id").set_index(f"{level}_id")
    for name, other in others:
        theirs = other.drop_duplicates(f"{level}_id").set_index(f"{level}_id")
        only_first, only_other = len(known.index.difference(theirs.index)), len(theirs.index.difference(known.index))
        if only_first or only_other:
            shared = len(known.index.intersection(theirs.index))
            raise LongslideError(
                f"{first} and {name} were not tested on the same {level}s: {only_first} only in the first, {only_other} "
                f"only in the second, {shared} in both; --common-patients compares on those"
            )
        ours, their_targets = known[columns], theirs.loc[known.index, columns]
        if task.kind in CLASSIFICATION:
            same = (ours.astype(str) == their_targets.astype(str)).to_numpy()
        else:
            same = np.isclose(ours.astype(float), their_targets.astype(float), equal_nan=True)
        differ = known.index[np.flatnonzero(~same.all(axis=1))]
        if len(differ):
            raise LongslideError(
                f"{first} and {name} have different targets for {len(differ)} of {len(known)} {level}s, such as "
                f"{differ[0]}; train both on the same table"
            )


def compare_predictions(
    predictions: Mapping[str, pd.DataFrame],
    task: Task,
    *,
    cohort: pd.DataFrame | None = None,
    subgroups: Sequence[str] = (),
    level: str = "patient",
) -> pd.DataFrame:
    """Differences of every metric between all pairs of runs.

    Paired: the same patients are left out of all runs. Interval and p-value are of one method: DeLong's for AUROC of one
    class where each patient is tested once, else the jackknife's with Student's distribution. The difference in the mean
    over folds (scope `mean`), where there is one, is the one to believe: it varies with training too (Nadeau & Bengio
    2003), the pooled one with the patients only. `p_holm` is corrected (Holm 1979) over the pairs of runs, and over the
    values of a subgroup column, for each metric.

    Args:
        predictions: The content of `predictions.csv` of each run, by its name.
        task: The task they share.
        cohort: The cohort table, for the subgroups.
        subgroups: Columns of the cohort table.
        level: `patient` or `slide`; patients are what varies in both cases.

    Returns:
        A row for each scope (`mean`, `pooled`, `subgroup:<column>=<value>`), metric and pair; `difference` is run a minus
        run b.

    Raises:
        LongslideError: The runs were not tested on the same patients.
    """
    rows = {name: select(table, level) for name, table in predictions.items()}
    check_same_patients(rows, task, level)
    scored = {name: score_scopes(part, task, cohort=cohort, subgroups=subgroups) for name, part in rows.items()}
    result = []
    for a, b in combinations(rows, 2):
        for scope in scored[a]:
            if scope.startswith("fold_") or scope not in scored[b]:
                continue
            for metric, first in scored[a][scope].items():
                second = scored[b][scope].get(metric)
                if second is None:
                    continue
                test = "jackknife" if first.inflation == 1 else "nadeau-bengio"
                found = difference_of(first.replicates, second.replicates, first.inflation)
                if metric.split(":")[0] == "auroc" and scope == "pooled":
                    exact = _delong(rows[a], rows[b], task, metric)
                    if exact is not None:
                        found, test = exact, "delong"
                if len(first.replicates.values) < FEWEST_PATIENTS:
                    found = Difference(np.nan, np.nan, np.nan)
                value = first.score.value - second.score.value
                result.append((scope, metric, a, b, value, *found, test, np.nan, first.score.n))
    table = pd.DataFrame(result, columns=COLUMNS)
    family = table["scope"].str.replace(r"=.*$", "", regex=True)
    table["p_holm"] = table.groupby([family, table["metric"]])["p"].transform(lambda p: holm(p.to_numpy()))
    return table


def holm(p: Floats) -> Floats:
    """p-values `(m,)` corrected so that the chance of any false rejection stays at the level (Holm 1979); NaN stays NaN."""
    corrected = np.full(len(p), np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(steps)) if len(order) else []
    return corrected


def _delong(rows_a: pd.DataFrame, rows_b: pd.DataFrame, task: Task, metric: str) -> Difference | None:
    """DeLong's test; None where the metric is not one AUROC, or patients have several rows."""
    if rows_a["patient_id"].duplicated().any() or rows_b["patient_id"].duplicated().any():
        return None
    a, b = _one_against_rest(rows_a, task, metric), _one_against_rest(rows_b, task, metric)
    if a is None or b is None:
        return None
    return delong_difference(a[0] == 1, a[1], b[1])


def _one_against_rest(rows: pd.DataFrame, task: Task, metric: str) -> tuple[Integers, Floats] | None:
    outcomes = read_outcomes(rows, task)
    name = metric.partition(":")[2] or (task.classes[1] if task.kind == "binary" else "")
    if name not in task.classes:
        return None
    index = task.classes.index(name)
    if isinstance(outcomes, Classes):
        return (outcomes.target == index).astype(np.int64), outcomes.probability[:, index]
    assert isinstance(outcomes, Labels)
    _, rows_with_label = outcomes.label(index)
    return rows_with_label.target, rows_with_label.probability[:, 1]

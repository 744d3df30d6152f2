"""The parts of the test predictions that are evaluated apart: folds, all folds pooled, subgroups."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from ..errors import LongslideError
from ..task import Task
from .classification import Score
from .intervals import FEWEST_PATIENTS, NO_INTERVAL, Interval, Jackknife, Replicates
from .outcomes import Outcomes, read_outcomes
from .weighted import Floats, Integers

MOST_GROUPS = 20
"""A subgroup column of text may have this many values; numbers with more than `MOST_NUMBERS` are cut at their quartiles."""
MOST_NUMBERS = 8

_ID = ("slide_id", "patient_id")


@dataclass(frozen=True)
class Scored:
    """A metric of a scope.

    Attributes:
        score: Its value and the rows it rests on.
        interval: Its 95% interval.
        replicates: Its value without each group of patients, the same groups for all runs on the same patients.
        inflation: What the variance between patients is multiplied by, for the share that training has.
    """

    score: Score
    interval: Interval
    replicates: Replicates
    inflation: float = 1.0


def select(predictions: pd.DataFrame, level: str, part: str = "test") -> pd.DataFrame:
    """The rows of one level and part, in the order of patients.

    Args:
        predictions: The content of `predictions.csv`.
        level: `patient` or `slide`.
        part: `test` or `val`.

    Raises:
        LongslideError: A column is missing.
    """
    for column in ("level", "part", "fold", "patient_id"):
        if column not in predictions:
            raise LongslideError(
                f"the predictions have no column {column!r}; they are not those of a training or test run"
            )
    rows = predictions[(predictions["level"] == level) & (predictions["part"] == part)]
    rows = rows.assign(patient_id=rows["patient_id"].astype(str))
    return rows.sort_values(["patient_id", "fold"], kind="stable", ignore_index=True)


def score_scopes(
    rows: pd.DataFrame,
    task: Task,
    *,
    cohort: pd.DataFrame | None = None,
    subgroups: Sequence[str] = (),
) -> dict[str, dict[str, Scored]]:
    """Every metric of every scope, with its interval.

    Args:
        rows: Test predictions of one level, as `select` gives them; not empty.
        task: What was predicted.
        cohort: The cohort table, for the subgroups.
        subgroups: Columns of it.

    Returns:
        scope -> metric -> what it is. Scopes: `mean` (the mean over the folds, if there are several: what a model trained
        like these is worth); `pooled` (all folds together, though each has a model of its own); `fold_<k>`; and
        `subgroup:<column>=<value>`, pooled.
    """
    outcomes = read_outcomes(rows, task)
    patients = rows["patient_id"].to_numpy()
    folds = {f"fold_{fold}": np.flatnonzero(rows["fold"] == fold) for fold in sorted(rows["fold"].unique())}
    members: dict[str, Integers] = dict(folds) if len(folds) > 1 else {}
    members["pooled"] = np.arange(len(rows))
    for column in subgroups:
        members |= {f"subgroup:{column}={value}": index for value, index in _groups(rows, cohort, column).items()}
    parts: dict[str, Outcomes] = {scope: outcomes.take(index) for scope, index in members.items()}
    jackknife = Jackknife(patients)
    values: dict[str, list[dict[str, Floats]]] = {scope: [] for scope in parts}
    for weights in jackknife.weights():
        for scope, part in parts.items():
            values[scope].append(part.resampled(weights[:, members[scope]]))
    scores = {scope: part.scores() for scope, part in parts.items()}
    # Of all groups of patients, also those that a scope has none of: the mean over folds needs them.
    replicates = {
        scope: {metric: np.concatenate([chunk[metric] for chunk in values[scope]]) for metric in scores[scope]}
        for scope in parts
    }
    scored = {}
    if len(folds) > 1:
        means, of_means = _mean([scores[fold] for fold in folds], [replicates[fold] for fold in folds])
        inflation = _inflation(patients, list(folds.values()))
        scored["mean"] = _with_intervals(outcomes, patients, means, of_means, inflation)
    for scope, part in parts.items():
        index = members[scope]
        own = jackknife.groups_of(index)
        of_own = {metric: every[own] for metric, every in replicates[scope].items()}
        scored[scope] = _with_intervals(part, patients[index], scores[scope], of_own)
    return scored if len(folds) > 1 else {next(iter(folds)): scored["pooled"], **scored}


def _with_intervals(
    outcomes: Outcomes,
    patients: "np.ndarray",
    scores: dict[str, Score],
    values: dict[str, Floats],
    inflation: float = 1.0,
) -> dict[str, Scored]:
    replicates = {metric: Replicates(values[metric], score.value) for metric, score in scores.items()}
    result = {}
    for metric, score in scores.items():
        found = NO_INTERVAL
        if len(np.unique(patients)) >= FEWEST_PATIENTS:
            found = outcomes.interval(metric, replicates, patients, inflation)
        if inflation > 1 and found.method:
            found = found._replace(method=f"{found.method}, nadeau-bengio")
        result[metric] = Scored(score, found, replicates[metric], inflation)
    return result


def _mean(folds: list[dict[str, Score]], values: list[dict[str, Floats]]) -> tuple[dict[str, Score], dict[str, Floats]]:
    """The mean over the folds in which a metric is defined, and its replicates."""
    means, replicates = {}, {}
    for metric in dict.fromkeys(metric for fold in folds for metric in fold):
        if metric.split(":")[0] == "ece":
            continue  # grows as the parts get smaller: its mean says more of the number of folds than of the model
        used = [i for i, fold in enumerate(folds) if metric in fold and np.isfinite(fold[metric].value)]
        if used:
            n = sum(folds[i][metric].n for i in used)
            means[metric] = Score(float(np.mean([folds[i][metric].value for i in used])), n)
            replicates[metric] = np.mean([values[i][metric] for i in used], 0)
    return means, replicates


def _inflation(patients: "np.ndarray", folds: Sequence[Integers]) -> float:
    """How much more a mean over folds varies than the patients tested make it, since each training part is another draw too.

    Nadeau & Bengio 2003: the variance of the mean over K folds is (1/K + n_test / n_train) times that between folds, which
    stands K-fold for the variance between patients. 1 where folds test the same patients: nothing is then known of it.
    """
    tested = [np.unique(patients[rows]) for rows in folds]
    total, mean = len(np.unique(patients)), float(np.mean([len(part) for part in tested]))
    if sum(map(len, tested)) > total:
        return 1.0
    return 1 + len(folds) * mean / (total - mean)


def subgroup_of_slide(cohort: pd.DataFrame | None, column: str) -> tuple[pd.Series, list[str]]:
    """The subgroup of each row of a cohort table, and the subgroups in their order.

    Args:
        cohort: The cohort table; numbers may be there as text.
        column: A column of it.

    Returns:
        The names of the subgroups, `missing` where the table says nothing; and those that are not, in their order.

    Raises:
        LongslideError: There is no such column, or it has too many values.
    """
    if cohort is None or column not in cohort or not set(_ID) <= set(cohort):
        known = [] if cohort is None else [name for name in map(str, cohort) if name not in _ID]
        raise LongslideError(
            f"there is no column {column!r} in the cohort table to make subgroups by; it has {', '.join(known) or 'none'}"
        )
    values = cohort[column]
    numbers = pd.to_numeric(values, errors="coerce")
    if numbers.notna().equals(values.notna()) and numbers.nunique() > MOST_NUMBERS:
        edges = sorted(set(numbers.quantile([0, 0.25, 0.5, 0.75, 1])))
        ranges = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
        values = pd.cut(numbers, edges, labels=ranges, include_lowest=True)
        order = ranges
    else:
        order = list(map(str, sorted(values.dropna().unique())))
    if len(order) > MOST_GROUPS:
        raise LongslideError(
            f"column {column!r} has {len(order)} different values, too many for subgroups (at most {MOST_GROUPS})"
        )
    return values.astype(object).where(cohort[column].notna(), "missing").astype(str), order


def _groups(rows: pd.DataFrame, cohort: pd.DataFrame | None, column: str) -> dict[str, Integers]:
    """The subgroups in their order, as text, and the rows of each."""
    named, order = subgroup_of_slide(cohort, column)
    assert cohort is not None
    by_slide = dict(zip(cohort["slide_id"].astype(str), named, strict=True))
    patients = named.groupby(cohort["patient_id"].astype(str))
    by_patient = patients.agg(lambda group: group.iloc[0] if group.nunique() == 1 else "several")
    slides = rows["level"].eq("slide")
    groups = np.asarray(
        [
            by_slide.get(str(slide), "missing") if is_slide else by_patient.get(str(patient), "missing")
            for slide, patient, is_slide in zip(rows["slide_id"], rows["patient_id"], slides, strict=True)
        ],
        dtype=object,
    )
    found = {group: np.flatnonzero(groups == group) for group in dict.fromkeys([*order, "several", "missing"])}
    return {group: members for group, members in found.items() if len(members)}

"""The parts of the test predictions that are evaluated apart: folds, all folds pooled, subgroups."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from ..errors import LongslideError
from ..task import Task
from .bootstrap import resample_weights
from .classification import Score
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
        samples: `(R,)` value in each bootstrap resample, NaN where it is not defined.
    """

    score: Score
    samples: Floats


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
    bootstrap: int,
    seed: int,
    cohort: pd.DataFrame | None = None,
    subgroups: Sequence[str] = (),
) -> dict[str, dict[str, Scored]]:
    """Every metric of every scope, with its bootstrap resamples.

    Each resample draws from all patients; folds and subgroups see the part of it that is theirs.

    Args:
        rows: Test predictions of one level, as `select` gives them; not empty.
        task: What was predicted.
        bootstrap: Number of resamples.
        seed: Their seed.
        cohort: The cohort table, for the subgroups.
        subgroups: Columns of it.

    Returns:
        scope -> metric -> value and resamples. Scopes: `fold_<k>`; `pooled` (all folds together); `mean` (the mean over the
        folds, if there are several: the fair number where models of different folds do not share a scale); and
        `subgroup:<column>=<value>`, pooled.
    """
    outcomes = read_outcomes(rows, task)
    folds = {f"fold_{fold}": np.flatnonzero(rows["fold"] == fold) for fold in sorted(rows["fold"].unique())}
    members: dict[str, Integers] = dict(folds) if len(folds) > 1 else {}
    members["pooled"] = np.arange(len(rows))
    for column in subgroups:
        members |= {f"subgroup:{column}={value}": index for value, index in _groups(rows, cohort, column).items()}
    parts: dict[str, Outcomes] = {scope: outcomes.take(index) for scope, index in members.items()}
    samples: dict[str, list[dict[str, Floats]]] = {scope: [] for scope in parts}
    for weights in resample_weights(rows["patient_id"].to_numpy(), bootstrap, seed):
        for scope, part in parts.items():
            samples[scope].append(part.resampled(weights[:, members[scope]]))
    scored = {
        scope: {
            metric: Scored(
                score, np.concatenate([chunk[metric] for chunk in samples[scope]]) if bootstrap else np.empty(0)
            )
            for metric, score in part.scores().items()
        }
        for scope, part in parts.items()
    }
    if len(folds) > 1:
        scored["mean"] = _mean([scored[fold] for fold in folds])
    else:
        scored = {next(iter(folds)): scored["pooled"], **scored}
    return scored


def _mean(folds: list[dict[str, Scored]]) -> dict[str, Scored]:
    """The mean over the folds in which a metric is defined."""
    result = {}
    for metric in folds[0]:
        if metric.split(":")[0] == "ece":
            continue  # grows as the parts get smaller: its mean says more of the number of folds than of the model
        used = [fold[metric] for fold in folds if metric in fold and np.isfinite(fold[metric].score.value)]
        if used:
            value = float(np.mean([scored.score.value for scored in used]))
            n = sum(scored.score.n for scored in used)
            result[metric] = Scored(Score(value, n), np.mean([scored.samples for scored in used], 0))
    return result


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

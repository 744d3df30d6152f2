"""New splits: which patients train, validate and test in each fold, stratified by label."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import assert_never

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from ...errors import LongslideError
from ...plurals import count
from ...task import CLASSIFICATION
from ..table import listed
from .cohort import Cohort
from .splits import check_splits

_QUANTILES = 4


def make_splits(
    cohort: Cohort,
    *,
    folds: int = 1,
    val_share: float = 0.15,
    test_share: float = 0.2,
    keep_sites_apart: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    """Split the patients of a cohort, stratified by label.

    By class for classification, by quarter of the value for regression, by event and quarter of the time for survival;
    for several labels by iterative stratification (Sechidis et al., 2011, On the stratification of multi-label data).

    Args:
        cohort: The cohort.
        folds: One split into train, val and test; or k of them, in which each patient is in the test part once.
        val_share: Share of the patients that are not in the test part that go to the validation part; 0 for none.
        test_share: Share of the patients in the test part if `folds` is 1; 0 for none. With k folds it is 1/k.
        keep_sites_apart: No site (column `site`) is in two parts of a fold.
        seed: Same seed, same splits.

    Returns:
        One row per slide: `slide_id`, `patient_id`, `fold_0`, `fold_1`, ... with train, val or test.

    Raises:
        LongslideError: A class with fewer patients (or the cohort with fewer sites) than the folds need.
    """
    if folds < 1 or not 0 <= val_share < 1 or not 0 <= test_share < 1:
        raise LongslideError(
            "--data.folds must be at least 1, --data.val_share and --data.test_share from 0 to below 1"
        )
    patients = _Patients(cohort, keep_sites_apart)
    patients.check(max(folds, 1 + (val_share > 0) + (test_share > 0)), folds)
    everyone = np.arange(len(patients.ids))
    rng = np.random.RandomState(seed)  # what scikit-learn takes; its draws are the same everywhere
    result = cohort.rows[["slide_id", "patient_id"]].copy()
    parts_left = 1 + (val_share > 0)
    if folds > 1:
        tests = list(patients.k_fold(everyone, folds, rng))
    else:
        tests = [patients.share(everyone, test_share, rng, parts_left)]
    for fold, test in enumerate(tests):
        parts = np.full(len(everyone), "train", dtype=object)
        parts[test] = "test"
        parts[patients.share(np.setdiff1d(everyone, test), val_share, rng)] = "val"
        result[f"fold_{fold}"] = parts[patients.of_row]
    return result


def make_inner_splits(
    cohort: Cohort, splits: pd.DataFrame, fold: int, *, folds: int, keep_sites_apart: bool = False, seed: int = 0
) -> pd.DataFrame:
    """Divide the training and validation patients of a fold again, as selecting among models asks for.

    Args:
        cohort: The cohort.
        splits: Its splits, as `check_splits` gives them.
        fold: The fold whose test patients have no part in this.
        folds: Inner folds; each patient is in the validation part of one of them.
        keep_sites_apart: No site is in two parts.
        seed: Same seed, same splits.

    Returns:
        One row per slide: `slide_id`, `patient_id`, `fold_0`, ... with train, val, or nothing for what has no part.

    Raises:
        LongslideError: There are fewer patients of a class, or sites, than inner folds.
    """
    chosen = np.flatnonzero(splits[f"fold_{fold}"].isin(["train", "val"]))
    part = replace(
        cohort,
        rows=cohort.rows.iloc[chosen].reset_index(drop=True),
        targets=None if cohort.targets is None else cohort.targets[chosen],
        files=tuple(cohort.files[row] for row in chosen),
    )
    try:
        made = make_splits(part, folds=folds, val_share=0, keep_sites_apart=keep_sites_apart, seed=seed)
    except LongslideError as error:
        raise LongslideError(f"the inner folds of fold {fold}: {error}") from error
    result = cohort.rows[["slide_id", "patient_id"]].copy()
    for column in (f"fold_{inner}" for inner in range(folds)):
        parts = np.full(len(result), "", dtype=object)
        parts[chosen] = made[column].replace({"test": "val"}).to_numpy()
        result[column] = parts
    return check_splits(result, cohort, keep_sites_apart=keep_sites_apart)


class _Patients:
    """The patients of a cohort with what they are stratified and grouped by.

    Attributes:
        ids: Patient ids.
        of_row: `(N,)` number of the patient of each slide.
        several_labels: Whether a patient may have more than one of them.
        labels: `(P, C)` 0/1: classes, labels or strata that a patient has.
        site: `(P,)` number of the site, if sites are kept apart.
    """

    def __init__(self, cohort: Cohort, keep_sites_apart: bool) -> None:
        self.cohort = cohort
        self.of_row, index = pd.factorize(cohort.rows["patient_id"])
        self.ids = list(index)
        self.several_labels = cohort.task is not None and cohort.task.kind == "multilabel"
        self.labels = self._labels()
        self.site = self._sites() if keep_sites_apart else None

    @property
    def stratum(self) -> np.ndarray:
        """`(P,)` number of the combination of labels."""
        return np.asarray(np.unique(self.labels, axis=0, return_inverse=True)[1]).reshape(-1)

    def _labels(self) -> np.ndarray:
        targets, task = self.cohort.targets, self.cohort.task
        if targets is None or task is None:
            return np.zeros((len(self.ids), 1), np.int64)
        match task.kind:
            case "binary" | "multiclass" | "ordinal":
                rows = np.eye(len(task.classes), dtype=np.int64)[targets]
            case "multilabel":
                rows = np.nan_to_num(targets).astype(np.int64)
            case "regression":
                rows = _quarters(targets)
            case "survival":
                time, event = targets.T
                rows = np.zeros((len(targets), 2 * _QUANTILES), np.int64)
                for value in (0, 1):
                    chosen = event == value
                    rows[chosen, value * _QUANTILES : (value + 1) * _QUANTILES] = _quarters(time[chosen])
            case _:
                assert_never(task.kind)
        labels = np.zeros((len(self.ids), rows.shape[1]), np.int64)
        np.maximum.at(labels, self.of_row, rows)
        return labels

    def _sites(self) -> np.ndarray:
        rows = self.cohort.rows
        if "site" not in rows.columns:
            raise LongslideError("the table has no column `site`; add one, or drop --data.keep_sites_apart")
        if rows["site"].isna().any():
            raise LongslideError(
                f"`site` is empty for {listed(list(rows['slide_id'][rows['site'].isna()]))}; fill it in"
            )
        number, _ = pd.factorize(rows["site"])
        first = np.zeros(len(self.ids), np.int64)
        first[self.of_row] = number
        moved = rows["patient_id"][first[self.of_row] != number]
        if len(moved):
            raise LongslideError(f"patient {moved.iloc[0]} has slides from two sites: sites cannot be kept apart")
        return first

    def check(self, parts: int, folds: int) -> None:
        """Refuse a cohort that is too small for its parts.

        Raises:
            LongslideError: As said.
        """
        wanted = f"the {folds} folds" if folds > 1 else "the parts (train, val, test)"
        fewer = "use fewer folds" if folds > 1 else "set --data.val_share or --data.test_share to 0"
        task = self.cohort.task
        if task is not None and task.kind in (*CLASSIFICATION, "multilabel"):
            for name, number in zip(task.classes, self.labels.sum(0).tolist(), strict=True):
                if number < parts:
                    raise LongslideError(
                        f"class {name!r} has {count(int(number), 'patient')}, fewer than {wanted} need "
                        f"({parts}); {fewer}, or "
                        "join it with another class"
                    )
        if task is not None and task.kind == "survival":
            events = int(self.labels[:, _QUANTILES:].any(1).sum())
            if events < parts:
                raise LongslideError(
                    f"{count(events, 'patient has', 'patients have')} an event, fewer than {wanted} need ({parts}); {fewer}"
                )
        if len(self.ids) < parts:
            raise LongslideError(
                f"{count(len(self.ids), 'patient is', 'patients are')} fewer than {wanted} need ({parts}); {fewer}"
            )
        if self.site is not None and self.site.max() + 1 < parts:
            raise LongslideError(
                f"{self.site.max() + 1} sites are fewer than {wanted} need ({parts}); {fewer}, or drop "
                "--data.keep_sites_apart"
            )

    def k_fold(self, chosen: np.ndarray, folds: int, rng: np.random.RandomState) -> Iterator[np.ndarray]:
        """Parts of equal size of the patients `chosen`, as patient numbers."""
        stratum = self.stratum[chosen]
        if self.site is None and (self.several_labels or np.bincount(stratum).max() < folds):
            part = iterative_stratification(self.labels[chosen], np.full(folds, 1 / folds), rng)
            yield from (chosen[part == fold] for fold in range(folds))
            return
        if np.bincount(stratum).max() < folds:  # scikit-learn refuses, and there is nothing to stratify
            stratum = np.zeros_like(stratum)
        splitter = StratifiedKFold if self.site is None else StratifiedGroupKFold
        group = None if self.site is None else self.site[chosen]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The least populated class")  # spread as far as they go
            for _, test in splitter(folds, shuffle=True, random_state=rng).split(chosen, stratum, group):
                yield chosen[test]

    def share(self, chosen: np.ndarray, share: float, rng: np.random.RandomState, parts_left: int = 1) -> np.ndarray:
        """A share of the patients `chosen`, as patient numbers; at least one if the share is above 0.

        Args:
            chosen: The patients.
            share: The share.
            rng: Draws.
            parts_left: Parts that the other patients make up: each of them needs a patient of each class as well.
        """
        if share == 0:
            return chosen[:0]
        picked = self._draw(chosen, share, rng)
        return picked if self.site is not None else self._with_every_class(picked, chosen, parts_left, rng)

    def _draw(self, chosen: np.ndarray, share: float, rng: np.random.RandomState) -> np.ndarray:
        if self.site is not None or self.several_labels:
            most = len(np.unique(self.site[chosen])) if self.site is not None else len(chosen)
            parts = list(self.k_fold(chosen, min(most, max(2, round(1 / share))), rng))
            present = self.labels[chosen].any(0)
            # A class that only one part has cannot do without that part in the rest.
            kept = [self.labels[np.setdiff1d(chosen, part)].any(0)[present].all() for part in parts]
            return parts[kept.index(True) if True in kept else 0]
        # Every so many-th of the patients in the order of their strata: the right number, however small the strata are.
        stratum = self.stratum[chosen]
        ordered = chosen[np.lexsort((rng.permutation(len(chosen)), stratum))]
        several = ordered[np.isin(ordered, chosen[np.bincount(stratum)[stratum] > 1])]
        ordered = several if len(several) else ordered
        size = min(max(round(share * len(chosen)), 1), len(ordered))
        picked: np.ndarray = ordered[((np.arange(size) + rng.uniform()) * len(ordered) / size).astype(np.int64)]
        return picked

    def _with_every_class(
        self, picked: np.ndarray, chosen: np.ndarray, parts_left: int, rng: np.random.RandomState
    ) -> np.ndarray:
        """The patients picked, with some exchanged so that they and each part that is left have one of each class.

        Of a class with fewer patients than parts the shares stay as they were drawn.
        """
        has = self._needed()[chosen]
        picked_mask = np.isin(chosen, picked)
        least = {True: 1, False: parts_left}
        possible = has.sum(0) >= 1 + parts_left

        def spare(side: bool) -> np.ndarray:
            """Patients of a side that it can do without."""
            tight = possible & (has[picked_mask == side].sum(0) <= least[side])
            return np.asarray((picked_mask == side) & ~has[:, tight].any(1))

        for column in np.argsort(has.sum(0), kind="stable"):
            for side in (True, False):
                while possible[column] and has[picked_mask == side, column].sum() < least[side]:
                    incoming = np.flatnonzero(spare(not side) & has[:, column])
                    if not len(incoming):
                        break
                    outgoing = np.flatnonzero(spare(side) & ~has[:, column])
                    picked_mask[rng.choice(incoming)] = side
                    if len(outgoing):
                        picked_mask[rng.choice(outgoing)] = not side
        return np.asarray(chosen[picked_mask])

    def _comparable(self) -> np.ndarray:
        """`(P, 2)` bool: who has an event up to a certain time, and who is known to be later: a c-index needs both.

        The time is the one, of some, that leaves most of the rarer of the two.
        """
        assert self.cohort.targets is not None
        time, event = self.cohort.targets[:, 0], self.cohort.targets[:, 1] > 0
        best = np.zeros((len(self.ids), 2), bool)
        for until in np.quantile(time[event], np.linspace(0, 1, 17), method="lower") if event.any() else ():
            has = np.zeros_like(best)
            np.logical_or.at(has, self.of_row, np.stack([event & (time <= until), time > until], axis=1))
            best = max(best, has, key=lambda one: one.sum(0).min())
        return best

    def _needed(self) -> np.ndarray:
        """`(P, G)` bool: what each part should have a patient with."""
        task = self.cohort.task
        if task is None:
            return np.zeros((len(self.ids), 0), bool)
        labels = self.labels > 0
        match task.kind:
            case "binary" | "multiclass" | "ordinal":
                return labels
            case "multilabel":
                return np.concatenate([labels, ~labels], axis=1)
            case "regression":
                return np.zeros((len(self.ids), 0), bool)
            case "survival":
                return np.concatenate([labels[:, _QUANTILES:].any(1, keepdims=True), self._comparable()], axis=1)
            case _:
                assert_never(task.kind)


def _quarters(values: np.ndarray) -> np.ndarray:
    """`(N, 4)` 0/1: the quarter of the values that each is in."""
    if not len(values):
        return np.zeros((0, _QUANTILES), np.int64)
    edges = np.quantile(values, np.arange(1, _QUANTILES) / _QUANTILES)
    return np.eye(_QUANTILES, dtype=np.int64)[np.searchsorted(edges, values, side="left")]


def iterative_stratification(labels: np.ndarray, shares: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """Spread samples with several labels over parts, the rarest label first (Sechidis et al., 2011).

    Args:
        labels: `(N, C)` 0/1.
        shares: `(K,)` share of the samples that each part gets; sums to 1.
        rng: Breaks ties.

    Returns:
        `(N,)` part of each sample.
    """
    part = np.full(len(labels), -1)
    room = shares * len(labels)
    room_for = shares[:, None] * labels.sum(0)
    while (part < 0).any():
        free = part < 0
        left = labels[free].sum(0)
        if left.any():
            rarest = int(np.where(left > 0, left, left.max() + 1).argmin())
            samples, wish = np.flatnonzero(free & (labels[:, rarest] > 0)), room_for[:, rarest]
        else:
            samples, wish = np.flatnonzero(free), room
        for sample in rng.permutation(samples):
            best = np.flatnonzero(np.isclose(wish, wish.max()))
            best = best[np.isclose(room[best], room[best].max())]
            part[sample] = chosen = rng.choice(best)
            room[chosen] -= 1
            room_for[chosen] -= labels[sample]
    return part

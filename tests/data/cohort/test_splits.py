"""Splits: patients whole, strata even, sites apart, saved and read again, bad ones refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from longslide.data.cohort.cohort import Cohort, read_cohort
from longslide.data.cohort.splits import (
    PARTS,
    check_splits,
    check_validation,
    read_splits,
    write_splits,
)
from longslide.data.cohort.stratification import iterative_stratification, make_splits
from longslide.errors import LongslideError
from longslide.models.classifier.objective import create_objective
from longslide.models.classifier.selection import selection_metric
from longslide.task import Task

from ..refusals import refused

Write = Callable[..., Path]


def in_memory(task: Task | None, targets: Any, patients: list[str] | None = None, **columns: list[str]) -> Cohort:
    targets = None if targets is None else np.asarray(targets)
    n = len(targets) if targets is not None else len(patients or [])
    rows = pd.DataFrame(
        {"slide_id": [f"s{i}" for i in range(n)], "patient_id": patients or [f"p{i}" for i in range(n)]}
    )
    return Cohort(rows.assign(**columns), task, targets, tuple(Path(f"s{i}.h5") for i in range(n)))


def binary(targets: Any, **more: Any) -> Cohort:
    return in_memory(Task("binary", ("label",), ("no", "yes")), np.asarray(targets, np.int64), **more)


def twice(values: Any) -> Any:
    return np.repeat(np.asarray(values), 2, axis=0)


@given(
    st.lists(st.integers(0, 2), min_size=30, max_size=80).filter(lambda labels: min(map(labels.count, range(3))) >= 6),
    st.integers(2, 5),
    st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_every_patient_tests_once_whole_and_classes_are_spread_evenly(labels: list[int], folds: int, seed: int) -> None:
    patients = [f"p{i}" for i in range(len(labels))]
    task = Task("multiclass", ("label",), ("a", "b", "c"))
    cohort = in_memory(task, twice(labels), list(twice(patients)))
    splits = make_splits(cohort, folds=folds, val_share=0.2, seed=seed)
    names = [f"fold_{fold}" for fold in range(folds)]
    assert list(splits.columns) == ["slide_id", "patient_id", *names]
    assert splits[names].isin(PARTS).all(axis=None), "everyone is in a part"
    assert (splits.groupby("patient_id")[names].nunique() == 1).all(axis=None), "patients are whole"
    assert ((splits[names] == "test").sum(axis=1) == 1).all(), "everyone is tested once"
    for name in names:
        for part, share in {"test": 1 / folds, "val": (1 - 1 / folds) * 0.2}.items():
            for value in range(3):
                got = (splits[name].eq(part) & (twice(labels) == value)).sum() / 2
                assert abs(got - labels.count(value) * share) < 2, (name, part, value)
    check_splits(splits, cohort)


def test_one_fold_is_a_split_with_the_shares_asked_for() -> None:
    splits = make_splits(binary([0, 1] * 100), val_share=0.25, test_share=0.2)
    assert splits["fold_0"].value_counts().to_dict() == {"train": 120, "test": 40, "val": 40}
    splits = make_splits(binary([0, 1] * 100), val_share=0, test_share=0)
    assert set(splits["fold_0"]) == {"train"}


@pytest.mark.parametrize("seed", range(30))
def test_six_positives_of_sixty_are_in_every_part_of_five_folds(seed: int) -> None:
    targets = np.arange(60) < 6
    splits = make_splits(binary(targets), folds=5, seed=seed)
    for fold in range(5):
        parts = splits[f"fold_{fold}"]
        assert [int((parts == part).sum()) for part in PARTS] == [41, 7, 12]
        assert all(targets[(parts == part).to_numpy()].any() for part in PARTS)
    check_validation(check_splits(splits, binary(targets)), binary(targets), None)


@given(st.integers(3, 9), st.integers(20, 80), st.sampled_from([0.05, 0.15, 0.5]), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_a_class_with_a_patient_for_each_part_is_in_each(rare: int, common: int, test_share: float, seed: int) -> None:
    targets = np.arange(rare + common) < rare
    parts = make_splits(binary(targets), test_share=test_share, seed=seed)["fold_0"]
    assert all(targets[(parts == part).to_numpy()].any() for part in PARTS)


@pytest.mark.parametrize("seed", range(20))
def test_of_few_patients_too_each_part_has_two_times_to_compare(seed: int) -> None:
    rng = np.random.default_rng(seed)
    survival = np.stack([rng.exponential(10, 20), rng.random(20) < 0.6], 1).astype(np.float32)
    cohort = in_memory(Task("survival", ("time", "event"), times=(5.0,)), survival)
    check_validation(make_splits(cohort, seed=seed), cohort)
    folds = make_splits(cohort, folds=3, seed=seed)
    check_validation(folds, cohort)


@pytest.mark.parametrize("seed", range(20))
def test_rare_events_and_rare_labels_are_in_every_part_too(seed: int) -> None:
    event = np.arange(40) < 4
    survival = np.stack([np.random.default_rng(seed).exponential(10, 40), event], 1).astype(np.float32)
    parts = make_splits(in_memory(Task("survival", ("time", "event"), times=(5.0,)), survival), seed=seed)["fold_0"]
    assert all(event[(parts == part).to_numpy()].any() for part in PARTS)
    labels = np.stack([event, np.arange(40) % 2], 1).astype(np.float32)
    parts = make_splits(in_memory(Task("multilabel", ("a", "b"), ("a", "b")), labels), seed=seed)["fold_0"]
    assert all(event[(parts == part).to_numpy()].any() for part in PARTS)


def test_the_seed_decides_and_nothing_else() -> None:
    cohort = binary([0, 1] * 20)
    pd.testing.assert_frame_equal(make_splits(cohort, folds=3, seed=1), make_splits(cohort, folds=3, seed=1))
    assert not make_splits(cohort, folds=3, seed=1).equals(make_splits(cohort, folds=3, seed=2))


def test_a_patient_with_both_labels_counts_for_both() -> None:
    cohort = binary([0, 1] * 10 + [0] * 20, patients=[f"p{i // 2}" for i in range(20)] + [f"q{i}" for i in range(20)])
    splits = make_splits(cohort, folds=5)
    per_fold = [(splits[f"fold_{k}"].eq("test") & (cohort.targets == 1)).sum() for k in range(5)]
    assert per_fold == [2] * 5


def test_regression_is_stratified_by_quarter() -> None:
    values = np.random.default_rng(0).lognormal(size=80).astype(np.float32)
    splits = make_splits(in_memory(Task("regression", ("y",)), values), folds=4)
    quarter = pd.qcut(values, 4, labels=False)
    for fold in range(4):
        assert np.bincount(quarter[splits[f"fold_{fold}"] == "test"]).tolist() == [5, 5, 5, 5]


def test_survival_is_stratified_by_event_and_time() -> None:
    rng = np.random.default_rng(0)
    targets = np.stack([rng.exponential(100, 120), rng.random(120) < 0.4], axis=1).astype(np.float32)
    splits = make_splits(in_memory(Task("survival", ("t", "e"), times=(50, 100)), targets), folds=3)
    shares = [targets[splits[f"fold_{fold}"] == "test", 1].mean() for fold in range(3)]
    medians = [np.median(targets[splits[f"fold_{fold}"] == "test", 0]) for fold in range(3)]
    assert np.ptp(shares) < 0.05
    assert max(medians) / min(medians) < 1.3


def test_several_labels_are_spread_evenly_the_rare_ones_too() -> None:
    rng = np.random.default_rng(0)
    targets = (rng.random((100, 5)) < [0.5, 0.3, 0.2, 0.1, 0.05]).astype(np.float32)
    targets[:10, 4], targets[20:30, 0] = 0, np.nan
    targets[50:55, 4] = 1
    task = Task("multilabel", tuple("abcde"), tuple("abcde"))
    splits = make_splits(in_memory(task, targets), folds=5)
    for label in range(5):
        positives = [int(np.nansum(targets[splits[f"fold_{fold}"] == "test", label])) for fold in range(5)]
        assert max(positives) - min(positives) <= 2
        assert min(positives) >= 1
    check_splits(splits, in_memory(task, targets))


def test_iterative_stratification_keeps_the_shares() -> None:
    labels = (np.random.default_rng(1).random((200, 3)) < 0.3).astype(np.int64)
    part = iterative_stratification(labels, np.array([0.7, 0.3]), np.random.RandomState(0))
    assert abs((part == 1).mean() - 0.3) < 0.02
    np.testing.assert_allclose(labels[part == 1].sum(0) / labels.sum(0), 0.3, atol=0.03)


@pytest.mark.parametrize("patients", [9, 13, 20, 40])
def test_small_cohorts_get_the_parts_they_were_asked_for(patients: int) -> None:
    rng = np.random.default_rng(patients)
    survival = np.stack([rng.exponential(100, patients), np.arange(patients) % 2], axis=1).astype(np.float32)
    values = rng.normal(size=patients).astype(np.float32)
    labels = (np.stack([np.arange(patients) % 2, np.arange(patients) % 3 == 0], axis=1)).astype(np.float32)
    for cohort in (
        in_memory(Task("survival", ("t", "e"), times=(50,)), survival),
        in_memory(Task("regression", ("y",)), values),
        in_memory(Task("multilabel", ("a", "b"), ("a", "b")), labels),
        binary(np.arange(patients) % 2),
    ):
        for folds in (1, 3):
            splits = check_splits(make_splits(cohort, folds=folds, val_share=0.2, test_share=0.2), cohort)
            counts = splits["fold_0"].value_counts()
            assert abs(counts["test"] - patients * (0.2 if folds == 1 else 1 / 3)) < 2
            assert abs(counts["val"] - 0.2 * (patients - counts["test"])) < 2


def test_sites_are_kept_apart() -> None:
    sites = [f"site {i % 9}" for i in range(90)]
    cohort = binary(np.random.default_rng(0).integers(0, 2, 90), site=sites)
    splits = make_splits(cohort, folds=3, keep_sites_apart=True)
    for fold in range(3):
        assert (splits[f"fold_{fold}"].groupby(sites).nunique() == 1).all()
        assert set(splits[f"fold_{fold}"]) == set(PARTS)
    check_splits(splits, cohort, keep_sites_apart=True)
    mixed = make_splits(cohort, folds=3)
    assert "site site" in refused(check_splits, mixed, cohort, keep_sites_apart=True)


def test_without_labels_patients_are_split_all_the_same() -> None:
    splits = make_splits(in_memory(None, None, [f"p{i // 2}" for i in range(40)]), val_share=0.1, test_share=0)
    assert splits.groupby("patient_id")["fold_0"].nunique().eq(1).all()
    assert (splits["fold_0"] == "val").sum() == 4


def test_what_cannot_be_split_is_refused() -> None:
    assert "class 'yes' has 3 patients, fewer than the 5 folds need (5)" in refused(
        make_splits, binary([1] * 3 + [0] * 30), folds=5
    )
    one_split = refused(make_splits, binary([1] * 2 + [0] * 30))
    assert "class 'yes' has 2 patients, fewer than the parts" in one_split
    assert "set --data.val_share or --data.test_share to 0" in one_split
    assert "no column `site`" in refused(make_splits, binary([0, 1] * 10), keep_sites_apart=True)
    two = binary([0, 1] * 10, site=["a", "b"] * 10)
    assert "2 sites are fewer than" in refused(make_splits, two, folds=3, keep_sites_apart=True)
    moved = binary([0, 1] * 10, patients=[f"p{i // 2}" for i in range(20)], site=["a", "b"] * 10)
    assert "patient p0 has slides from two sites" in refused(make_splits, moved, folds=2, keep_sites_apart=True)
    survival = Task("survival", ("t", "e"), times=(5,))
    rare = in_memory(survival, np.stack([np.arange(1, 31), np.arange(30) < 2], axis=1).astype(np.float32))
    assert "2 patients have an event, fewer than the 5 folds need (5)" in refused(make_splits, rare, folds=5)
    assert "--data.folds must be at least 1" in refused(make_splits, binary([0, 1]), folds=0)


def test_saved_splits_are_read_again(tmp_path: Path) -> None:
    cohort = binary([0, 1] * 20)
    splits = make_splits(cohort, folds=3)
    write_splits(tmp_path / "deep" / "splits.csv", splits)
    read, notes = read_splits(tmp_path / "deep" / "splits.csv", cohort)
    assert notes == []
    pd.testing.assert_frame_equal(check_splits(read, cohort), splits, check_dtype=False)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["splits.csv"]


def test_slides_that_saved_splits_do_not_know_are_not_used_and_said(tmp_path: Path) -> None:
    write_splits(tmp_path / "s.csv", make_splits(binary([0, 1] * 10)))
    cohort = binary([0, 1] * 11)
    splits, notes = read_splits(tmp_path / "s.csv", cohort)
    assert "2 slides are not in" in notes[0]
    assert list(check_splits(splits, cohort)["fold_0"][-2:]) == ["", ""]


def test_splits_of_other_tools_are_read(tmp_path: Path, rows: Write) -> None:
    cohort = binary([0, 1] * 3)
    for fold in range(2):
        for part, slides in {"train": [0, 1, 2, 3], "val": [4], "test": [5]}.items():
            rows([{"slide_id": f"s{(i + fold) % 6}.svs", "label": 0} for i in slides], f"{part}_{fold}.csv")
    splits, _ = read_splits(tmp_path, cohort)
    assert list(splits["fold_0"]) == ["train"] * 4 + ["val", "test"]
    assert list(splits["fold_1"]) == ["test", "train", "train", "train", "train", "val"]
    by_patient = rows([{"patient_id": f"p{i}", "split": "Training" if i < 4 else "Test"} for i in range(6)])
    splits = check_splits(read_splits(by_patient, cohort)[0], cohort)
    assert list(splits["fold_0"]) == ["train"] * 4 + ["test"] * 2


def test_fold_columns_of_the_table_are_its_splits(tmp_path: Path, slide: Write, rows: Write) -> None:
    parts = ["train", "train", "val", "test"]
    for name in "abcd":
        slide(name)
    table = [
        {"slide_id": s, "label": i % 2, "fold_10": p, "fold_2": p}
        for i, (s, p) in enumerate(zip("abcd", parts, strict=True))
    ]
    cohort = read_cohort(rows(table), tmp_path / "features", task="binary")
    assert cohort.given_splits is not None
    assert list(cohort.given_splits.columns) == ["slide_id", "patient_id", "fold_2", "fold_10"]
    assert list(cohort.given_splits["fold_2"]) == parts


def test_bad_splits_are_refused(tmp_path: Path, rows: Write) -> None:
    cohort = binary([0, 1, 0, 1], patients=["p", "p", "q", "r"])
    ids = cohort.rows[["slide_id", "patient_id"]]

    def check(*parts: str) -> str:
        return refused(check_splits, ids.assign(fold_0=parts), cohort)

    assert "patient p is in test and train; move all" in check("train", "test", "train", "train")
    assert "fold_0 has 'learn'; it must be train, val, test" in check("learn", "learn", "train", "train")
    assert "no slides to train on" in check("val", "val", "test", "test")
    assert "no slide of class 'yes' is in the training part" in check("test", "test", "train", "test")
    alike = rows([{"slide_id": f"s{i}", "x": 1} for i in range(4)], "a.csv")
    assert "no column fold_0" in refused(read_splits, alike, cohort)
    strange = rows([{"slide_id": f"t{i}", "fold_0": "train"} for i in range(4)], "b.csv")
    assert "none of the cohort's slides is in it" in refused(read_splits, strange, cohort)
    double = rows([{"slide_id": "s0.svs", "fold_0": part} for part in ("train", "test")], "c.csv")
    assert "s0 is there with different parts" in refused(read_splits, double, cohort)
    rows([{"slide_id": "s0"}], "folder/train_0.csv")
    rows([{"slide_id": "s0"}], "folder/test_0.csv")
    assert "s0 is also in t" in refused(read_splits, tmp_path / "folder", cohort)


@pytest.mark.parametrize(
    ("task", "targets", "said"),
    [
        (Task("binary", ("label",), ("no", "yes")), [1, 1], "has only slides of class 'yes'"),
        (Task("multiclass", ("label",), ("a", "b", "c")), [2], "has only slides of class 'c'"),
        (Task("ordinal", ("label",), ("low", "high")), [0, 0], "has only slides of class 'low'"),
        (
            Task("multilabel", ("x", "y"), ("x", "y")),
            [[0, 1], [np.nan, 1]],
            "has only slides with, or only slides without, each label",
        ),
        (Task("regression", ("age",)), [3.5, 3.5], "has only slides with age 3.5"),
        (Task("survival", ("t", "e"), times=(5,)), [[3.0, 0.0], [9.0, 1.0]], "has no event with a later time"),
    ],
)
def test_a_validation_part_that_can_select_no_model_is_refused(task: Task, targets: Any, said: str) -> None:
    cohort = in_memory(task, targets)
    splits = cohort.rows.assign(fold_0="train", fold_1="val")
    message = refused(check_validation, splits, cohort)
    assert message.startswith(f"fold_1: the validation part {said}")
    assert "--data.val_share" in message
    assert "--monitor val_loss" in message
    assert message == refused(check_validation, splits, cohort, 1)
    check_validation(splits, cohort, 0)


@given(st.sampled_from(["binary", "multiclass", "multilabel", "survival"]), st.integers(1, 4), st.integers(0, 2**16))
@settings(max_examples=150, deadline=None)
def test_it_is_refused_exactly_where_the_metric_is_not_defined(kind: Any, slides: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = tuple("ab" if kind == "binary" else "abc")
    task = Task(kind, names) if kind == "survival" else Task(kind, names, names)
    if kind == "multilabel":
        targets = rng.choice(np.array([0, 1, np.nan], np.float32), (slides, 3))
    elif kind == "survival":
        targets = np.stack([rng.integers(1, 4, slides), rng.integers(0, 2, slides)], 1).astype(np.float32)
    else:
        targets = rng.integers(0, len(names), slides)
    outputs = torch.from_numpy(rng.normal(size=(slides, task.outputs)))
    metric = selection_metric(task, create_objective(task).predict(outputs), torch.from_numpy(targets))
    cohort = in_memory(task, targets)
    refused = False
    try:
        check_validation(cohort.rows.assign(fold_0="val"), cohort)
    except LongslideError:
        refused = True
    assert refused == np.isnan(metric), (targets, metric)

"""Paired comparison: the same patients, the same resamples."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from longslide.errors import LongslideError
from longslide.evaluation import compare_predictions
from longslide.evaluation.comparison import holm
from longslide.task import Task
from scipy.stats import binom

Make = Callable[..., pd.DataFrame]
BINARY = Task("binary", ("status",), ("healthy", "tumour"))


def difference(table: pd.DataFrame, metric: str, scope: str = "pooled") -> pd.Series:
    chosen = table[(table["metric"] == metric) & (table["scope"] == scope)]
    assert len(chosen) == 1
    return chosen.iloc[0]


def test_a_better_run_is_better_and_a_run_does_not_differ_from_itself(binary_predictions: Make) -> None:
    good, bad = binary_predictions(300, 2.0, noise_seed=1), binary_predictions(300, 0.3, noise_seed=2)
    table = compare_predictions({"good": good, "bad": bad}, BINARY)
    auroc = difference(table, "auroc")
    assert auroc["low"] > 0.1
    assert auroc["test"] == "delong"
    assert auroc["p"] < 1e-6
    assert difference(table, "brier")["high"] < 0, "the difference is run a minus run b"
    assert difference(table, "brier")["p"] < 1e-6
    same = compare_predictions({"a": good, "b": good.sample(frac=1, random_state=0)}, BINARY)
    assert (same["difference"].abs() < 1e-12).all()
    assert (same["p"] == 1).all()
    assert same["low"].isna().all(), "no interval of no width"


def test_the_interval_of_the_difference_is_paired(binary_predictions: Make) -> None:
    first = binary_predictions(200, 1.0)
    second = first.copy()
    second["probability_tumour"] = np.clip(first["probability_tumour"] ** 1.02, 0, 1)  # all but the same
    second["probability_healthy"] = 1 - second["probability_tumour"]
    row = difference(compare_predictions({"a": first, "b": second}, BINARY), "brier")
    assert 0 < row["high"] - row["low"] < 0.01, "unpaired it would be as wide as that of a Brier score"


@pytest.mark.slow
def test_intervals_and_p_values_are_right_when_two_runs_are_equally_good(binary_predictions: Make) -> None:
    runs, covered, rejected = 100, 0, 0
    for seed in range(runs):
        pair = {name: binary_predictions(120, 1.0, seed=seed, noise_seed=i) for i, name in enumerate("ab")}
        row = difference(compare_predictions(pair, BINARY), "brier")
        covered += row["low"] <= 0 <= row["high"]
        rejected += row["p"] < 0.05
    assert binom.ppf(0.001, runs, 0.92) <= covered <= binom.ppf(0.999, runs, 0.97)
    assert binom.ppf(0.001, runs, 0.03) <= rejected <= binom.ppf(0.999, runs, 0.07)


def test_pairs_are_corrected_for_their_number(binary_predictions: Make) -> None:
    runs = {name: binary_predictions(150, 0.5 + i, noise_seed=i) for i, name in enumerate("abc")}
    table = compare_predictions(runs, BINARY)
    rows = table[(table["metric"] == "auroc") & (table["scope"] == "pooled")]
    assert list(zip(rows["run_a"], rows["run_b"], strict=True)) == [("a", "b"), ("a", "c"), ("b", "c")]
    np.testing.assert_allclose(rows["p_holm"], holm(rows["p"].to_numpy()))
    assert rows["p_holm"].min() == pytest.approx(3 * rows["p"].min())


def test_holm_is_the_published_procedure() -> None:
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.5, np.nan, 0.6])), [1, np.nan, 1])
    random = np.random.default_rng(0)
    any_rejected = np.mean([(holm(random.random(5)) < 0.05).any() for _ in range(4000)])
    assert any_rejected < binom.ppf(0.999, 4000, 0.05) / 4000


def test_an_interval_without_zero_is_a_p_value_below_five_percent(binary_predictions: Make) -> None:
    tables = [
        compare_predictions(
            {name: binary_predictions(60, 1.0 + i, noise_seed=i + seed, folds=2) for i, name in enumerate("ab")}, BINARY
        )
        for seed in range(5)
    ]
    table = pd.concat(tables)
    assert set(table["test"]) == {"delong", "jackknife", "nadeau-bengio"}
    known = table.dropna(subset=["low", "p"])
    excludes = (known["low"] > 0) | (known["high"] < 0)
    assert ((known["p"] < 0.05) == excludes).all()
    assert 0 < excludes.sum() < len(known)


def test_subgroups_and_folds_are_compared_too(binary_predictions: Make) -> None:
    runs = {name: binary_predictions(120, 1.0, noise_seed=i, folds=3) for i, name in enumerate("ab")}
    ids = runs["a"]["patient_id"]
    cohort = pd.DataFrame({"slide_id": ids, "patient_id": ids, "site": np.where(np.arange(120) < 50, "x", "y")})
    table = compare_predictions(runs, BINARY, cohort=cohort, subgroups=["site"])
    assert list(dict.fromkeys(table["scope"])) == ["mean", "pooled", "subgroup:site=x", "subgroup:site=y"]
    assert difference(table, "auroc", "subgroup:site=x")["n"] == 50
    both = table[table["scope"].str.startswith("subgroup") & (table["metric"] == "auroc")]
    assert both["p_holm"].min() == pytest.approx(min(1, 2 * both["p"].min())), "corrected over the sites"


def test_other_patients_or_other_targets_are_refused(binary_predictions: Make) -> None:
    first = binary_predictions(60, 1.0)
    with pytest.raises(
        LongslideError, match=r"longnet and abmil .* 20 only in the first, 0 only in the second, 40 in both"
    ):
        compare_predictions({"longnet": first, "abmil": first.iloc[20:]}, BINARY)
    changed = first.assign(target=np.where(first.index < 3, "tumour", first["target"]))
    differ = int((changed["target"] != first["target"]).sum())
    assert differ
    with pytest.raises(LongslideError, match=f"different targets for {differ} of 60 patients, such as p000"):
        compare_predictions({"longnet": first, "abmil": changed}, BINARY)


def test_a_patient_tested_in_several_folds_is_not_counted_as_independent(binary_predictions: Make) -> None:
    one = {name: binary_predictions(80, 1.0, noise_seed=i) for i, name in enumerate("ab")}
    many = {name: pd.concat([table.assign(fold=k) for k in range(4)]) for name, table in one.items()}
    once = difference(compare_predictions(one, BINARY), "auroc")
    often = difference(compare_predictions(many, BINARY), "auroc")
    assert (often["low"], often["high"]) == pytest.approx((once["low"], once["high"]), abs=0.01)
    assert (once["test"], often["test"]) == ("delong", "jackknife"), "DeLong's test asks for independent rows"

"""Metrics with intervals, from predictions as they lie in a run folder."""

import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from longslide.errors import LongslideError
from longslide.evaluation import evaluate
from longslide.evaluation.evaluate import PRIMARY_METRIC
from longslide.task import Task
from scipy.stats import binom, norm
from sklearn.metrics import roc_auc_score
from sksurv.metrics import concordance_index_censored, integrated_brier_score
from sksurv.util import Surv

Make = Callable[..., pd.DataFrame]
BINARY = Task("binary", ("status",), ("healthy", "tumour"))


def only(metrics: pd.DataFrame, metric: str, scope: str = "pooled", level: str = "patient") -> pd.Series:
    chosen = metrics[(metrics["metric"] == metric) & (metrics["scope"] == scope) & (metrics["level"] == level)]
    assert len(chosen) == 1, f"{len(chosen)} rows of {metric}, {scope}, {level}"
    return chosen.iloc[0]


def test_every_fold_the_pool_and_the_mean_have_every_metric_with_an_interval(binary_predictions: Make) -> None:
    predictions = binary_predictions(90, 1.5, folds=3, slides=2)
    metrics = evaluate(predictions, BINARY, bootstrap=200)
    names = [
        "auroc",
        "auprc",
        "balanced_accuracy",
        "sensitivity",
        "specificity",
        "f1",
        "quadratic_kappa",
        "brier",
        "ece",
    ]
    for level in ("patient", "slide"):
        for scope in ("fold_0", "fold_1", "fold_2", "pooled"):
            for name in names:
                row = only(metrics, name, scope, level)
                assert 0 <= row["low"] <= row["high"]
                assert row["n"] == (30 if scope != "pooled" else 90) * (2 if level == "slide" else 1)
        assert only(metrics, "auroc", "mean", level)["value"] == pytest.approx(
            np.mean([only(metrics, "auroc", f"fold_{k}", level)["value"] for k in range(3)])
        )
    row = only(metrics, "auroc")
    patients = predictions[predictions["level"] == "patient"]
    assert row["value"] == roc_auc_score(patients["target"] == "tumour", patients["probability_tumour"])
    assert row["low"] < row["value"] < row["high"]


@pytest.mark.slow
def test_the_interval_covers_the_true_auroc_as_often_as_it_says(binary_predictions: Make) -> None:
    runs, truth, covered = 250, norm.cdf(1.2 / np.sqrt(2)), 0
    for seed in range(runs):
        row = only(evaluate(binary_predictions(100, 1.2, seed=seed), BINARY, bootstrap=300, seed=seed), "auroc")
        covered += row["low"] <= truth <= row["high"]
    # Binomial noise around 95%, and 2 points for a percentile interval of 100 patients.
    assert binom.ppf(0.001, runs, 0.93) <= covered <= binom.ppf(0.999, runs, 0.97)


def test_copies_of_a_slide_do_not_make_an_interval_narrower(binary_predictions: Make) -> None:
    metrics = evaluate(binary_predictions(120, 1.0, slides=4), BINARY, bootstrap=500)
    patient, slide = only(metrics, "auroc"), only(metrics, "auroc", level="slide")
    assert slide["n"] == 4 * patient["n"]
    assert slide["value"] == pytest.approx(patient["value"])
    assert (slide["low"], slide["high"]) == pytest.approx((patient["low"], patient["high"]))


@pytest.mark.slow
def test_permuted_labels_are_at_chance_with_an_interval_that_covers_it(binary_predictions: Make) -> None:
    predictions = binary_predictions(150, 2.0, folds=5)
    assert only(evaluate(predictions, BINARY, bootstrap=200), "auroc")["low"] > 0.8
    random, permutations, covered = np.random.default_rng(0), 40, 0
    for _ in range(permutations):
        predictions["target"] = random.permutation(predictions["target"])
        row = only(evaluate(predictions, BINARY, bootstrap=200), "auroc")
        covered += row["low"] <= 0.5 <= row["high"]
    assert covered >= binom.ppf(0.001, permutations, 0.93)


def test_resamples_without_a_class_are_left_out_and_counted(binary_predictions: Make) -> None:
    predictions = binary_predictions(12, 1.0)
    predictions["target"] = ["tumour"] * 2 + ["healthy"] * 10
    row = only(evaluate(predictions, BINARY, bootstrap=2000), "auroc")
    missed = (10 / 12) ** 12  # both positives missed
    assert row["resamples"] == pytest.approx(2000 * (1 - missed), abs=4 * np.sqrt(2000 * missed))
    assert np.isfinite([row["low"], row["high"]]).all()
    predictions["target"] = "healthy"
    row = only(evaluate(predictions, BINARY, bootstrap=50), "auroc")
    assert np.isnan([row["value"], row["low"], row["high"]]).all()
    assert row["resamples"] == 0
    assert np.isfinite(only(evaluate(predictions, BINARY, bootstrap=50), "brier")["value"])


def test_validation_predictions_change_nothing(binary_predictions: Make) -> None:
    predictions = binary_predictions(60, 1.0)
    with_validation = pd.concat([predictions, binary_predictions(60, -3.0, seed=1).assign(part="val")])
    pd.testing.assert_frame_equal(
        evaluate(predictions, BINARY, bootstrap=20), evaluate(with_validation, BINARY, bootstrap=20)
    )


def test_the_same_seed_gives_the_same_intervals_in_any_order_of_rows(binary_predictions: Make) -> None:
    predictions = binary_predictions(60, 1.0, folds=2)
    shuffled = predictions.sample(frac=1, random_state=0)
    first, second = evaluate(predictions, BINARY, bootstrap=50), evaluate(shuffled, BINARY, bootstrap=50)
    pd.testing.assert_frame_equal(first, second)
    assert not first.equals(evaluate(predictions, BINARY, bootstrap=50, seed=1))


def test_subgroups_are_by_columns_of_the_cohort(binary_predictions: Make) -> None:
    predictions = binary_predictions(100, 1.5, slides=2)
    slides = predictions.loc[predictions["level"] == "slide", ["slide_id", "patient_id"]]
    number = slides["patient_id"].str[1:].astype(int)
    cohort = slides.assign(
        site=np.where(number < 40, "Bergen", "Turin"),
        age=30 + number / 2,
        scanner=np.where(slides["slide_id"].str.endswith("-0"), "old", "new"),
        stage=np.where(number < 10, None, "II"),
    )
    columns = ["site", "age", "scanner", "stage"]
    metrics = evaluate(predictions, BINARY, bootstrap=20, cohort=cohort, subgroups=columns)
    assert only(metrics, "auroc", "subgroup:site=Bergen")["n"] == 40
    assert only(metrics, "auroc", "subgroup:site=Turin", "slide")["n"] == 120
    assert only(metrics, "brier", "subgroup:stage=missing")["n"] == 10
    ages = metrics[metrics["scope"].str.startswith("subgroup:age=") & (metrics["metric"] == "brier")]
    ages = ages[ages["level"] == "patient"]
    assert ages["n"].tolist() == [25, 25, 25, 25]
    assert ages["scope"].iloc[0] == "subgroup:age=30 to 42.375"
    assert only(metrics, "auroc", "subgroup:scanner=several")["n"] == 100, "patients with slides of both scanners"
    assert only(metrics, "auroc", "subgroup:scanner=old", "slide")["n"] == 100
    scopes = set(evaluate(predictions, BINARY, bootstrap=20, cohort=cohort)["scope"])
    assert scopes == {"fold_0", "pooled", "subgroup:site=Bergen", "subgroup:site=Turin"}, "by site if nothing is said"
    assert "fold_0" in set(evaluate(predictions, BINARY, bootstrap=20, cohort=cohort.assign(site="x"))["scope"])
    with pytest.raises(LongslideError, match=r"no column 'sex'.*site, age, scanner, stage"):
        evaluate(predictions, BINARY, bootstrap=20, cohort=cohort, subgroups=["sex"])
    with pytest.raises(LongslideError, match="200 different values"):
        evaluate(predictions, BINARY, bootstrap=20, cohort=cohort.assign(x=slides["slide_id"]), subgroups=["x"])


def test_several_classes_have_one_against_the_rest_and_macro(binary_predictions: Make) -> None:
    random = np.random.default_rng(0)
    classes = ("1", "2", "3")
    probability = random.dirichlet(np.ones(3), 60)
    target = random.integers(0, 3, 60)
    frame = binary_predictions(60, 1.0)[["level", "fold", "part", "patient_id", "slide_id"]]
    # Class names that look like numbers come back from a CSV file as numbers.
    frame = frame.assign(target=target + 1, prediction=probability.argmax(1) + 1)
    for index, name in enumerate(classes):
        frame[f"probability_{name}"] = probability[:, index]
    metrics = evaluate(frame, Task("ordinal", ("grade",), classes), bootstrap=20)
    assert only(metrics, "auroc")["value"] == pytest.approx(roc_auc_score(target, probability, multi_class="ovr"))
    assert only(metrics, "auroc:2")["value"] == pytest.approx(roc_auc_score(target == 1, probability[:, 1]))
    assert only(metrics, "mae")["value"] == np.abs(target - probability.argmax(1)).mean()
    assert "mae" not in set(evaluate(frame, Task("multiclass", ("grade",), classes), bootstrap=0)["metric"])


def test_missing_labels_are_left_out_label_by_label(binary_predictions: Make) -> None:
    random = np.random.default_rng(0)
    frame = binary_predictions(80, 1.0)[["level", "fold", "part", "patient_id", "slide_id"]]
    labels = ("egfr", "kras", "never")
    for name in labels:
        frame[f"target_{name}"] = random.integers(0, 2, 80).astype(float)
        frame[f"probability_{name}"] = random.random(80)
        frame[f"prediction_{name}"] = (frame[f"probability_{name}"] > 0.5).astype(int)
    frame.loc[:29, "target_kras"] = np.nan
    frame["target_never"] = np.nan
    frame["target_kras"] = frame["target_kras"].astype("Int64")  # as it is before it goes to a file
    metrics = evaluate(frame, Task("multilabel", labels, labels), bootstrap=50)
    assert only(metrics, "auroc:egfr")["n"] == 80
    kras = only(metrics, "auroc:kras")
    assert kras["n"] == 50
    known = frame.iloc[30:]
    assert kras["value"] == roc_auc_score(known["target_kras"].astype(int), known["probability_kras"])
    assert only(metrics, "auroc")["value"] == pytest.approx((kras["value"] + only(metrics, "auroc:egfr")["value"]) / 2)
    assert "auroc:never" not in set(metrics["metric"])


def test_survival_is_that_of_scikit_survival(binary_predictions: Make) -> None:
    random = np.random.default_rng(0)
    n, times = 150, [2.0, 5.0, 8.0]
    risk = random.normal(size=n)
    true, censored = random.exponential(8 * np.exp(-risk)), random.exponential(15, n)
    frame = binary_predictions(n, 1.0)[["level", "fold", "part", "patient_id", "slide_id"]]
    frame = frame.assign(time=np.minimum(true, censored), event=(true <= censored).astype(int), risk=risk)
    for t in times:
        frame[f"survival_{t:g}"] = np.exp(-t / 8 * np.exp(risk))
    metrics = evaluate(frame, Task("survival", ("time", "event"), times=tuple(times)), bootstrap=200)
    event = frame["event"] == 1
    row = only(metrics, "c_index")
    assert row["value"] == concordance_index_censored(event, frame["time"], risk)[0]
    assert row["low"] < row["value"] < row["high"]
    assert row["low"] > 0.5
    outcome = Surv.from_arrays(event, frame["time"])
    row = only(metrics, "integrated_brier")
    assert row["value"] == integrated_brier_score(outcome, outcome, frame.filter(like="survival_"), times)
    assert row["low"] < row["value"] < row["high"] < 0.25
    censored_only = evaluate(frame.assign(event=0), Task("survival", ("time", "event")), bootstrap=20)
    assert np.isnan(only(censored_only, "c_index")["value"])


def test_every_task_has_its_primary_metric(binary_predictions: Make) -> None:
    frame = binary_predictions(40, 1.0).assign(target=np.arange(40.0), prediction=np.arange(40.0) % 7)
    metrics = evaluate(frame, Task("regression", ("score",)), bootstrap=20)
    assert set(metrics["metric"]) == {"r2", "mae", "spearman"}
    assert PRIMARY_METRIC["regression"] in set(metrics["metric"])
    assert PRIMARY_METRIC["binary"] == "auroc"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.drop(columns="probability_tumour"), "no column 'probability_tumour'"),
        (lambda frame: frame.drop(columns="part"), "no column 'part'"),
        (lambda frame: frame.assign(part="val"), "no rows of the test part"),
        (lambda frame: frame.assign(target="Tumour"), "'Tumour', which is none of the classes healthy, tumour"),
        (lambda frame: frame.assign(probability_tumour=np.nan), "not a finite number in 40 of 40 rows"),
        (lambda frame: frame.assign(probability_tumour=0.9), "do not sum to 1"),
        (lambda frame: frame.assign(probability_tumour=1.5), "outside 0 to 1"),
    ],
)
def test_predictions_that_cannot_be_evaluated_say_why(binary_predictions: Make, change, message: str) -> None:
    with pytest.raises(LongslideError, match=message):
        evaluate(change(binary_predictions(40, 1.0)), BINARY, bootstrap=5)


def test_a_thousand_resamples_of_a_thousand_patients_take_seconds(binary_predictions: Make) -> None:
    predictions = binary_predictions(1000, 1.0, folds=5, slides=2)
    started = time.process_time()
    evaluate(predictions, BINARY)
    assert time.process_time() - started < 10

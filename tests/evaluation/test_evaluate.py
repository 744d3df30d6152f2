"""Metrics with intervals, from predictions as they lie in a run folder."""

import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from longslide.errors import LongslideError
from longslide.evaluation import evaluate
from longslide.evaluation.censored import brier
from longslide.evaluation.classification import Classes
from longslide.evaluation.evaluate import PRIMARY_METRIC
from longslide.evaluation.intervals import Jackknife, Replicates
from longslide.task import Task
from scipy.special import expit
from scipy.stats import binom, norm
from sklearn.metrics import roc_auc_score

Make = Callable[..., pd.DataFrame]
BINARY = Task("binary", ("status",), ("healthy", "tumour"))


def only(metrics: pd.DataFrame, metric: str, scope: str = "pooled", level: str = "patient") -> pd.Series:
    chosen = metrics[(metrics["metric"] == metric) & (metrics["scope"] == scope) & (metrics["level"] == level)]
    assert len(chosen) == 1, f"{len(chosen)} rows of {metric}, {scope}, {level}"
    return chosen.iloc[0]


def test_every_fold_the_pool_and_the_mean_have_every_metric_with_an_interval(binary_predictions: Make) -> None:
    predictions = binary_predictions(90, 1.5, folds=3, slides=2)
    metrics = evaluate(predictions, BINARY)
    methods = {
        "auroc": "newcombe",
        "auprc": "mid-p",
        "balanced_accuracy": "mover",
        "sensitivity": "mid-p",
        "specificity": "mid-p",
        "f1": "jackknife",
        "brier": "gaffke",
        "log_loss": "gaffke",
    }
    for level in ("patient", "slide"):
        for scope in ("fold_0", "fold_1", "fold_2", "pooled"):
            for name, method in methods.items():
                row = only(metrics, name, scope, level)
                assert 0 <= row["low"] < row["value"] < row["high"]
                assert row["method"] == method
                assert row["n"] == (30 if scope != "pooled" else 90) * (2 if level == "slide" else 1)
            assert np.isnan(only(metrics, "ece", scope, level)["low"])
        assert only(metrics, "auroc", "mean", level)["value"] == pytest.approx(
            np.mean([only(metrics, "auroc", f"fold_{k}", level)["value"] for k in range(3)])
        )
    assert "quadratic_kappa" not in set(metrics["metric"]), "of ordered classes only"
    row = only(metrics, "auroc")
    patients = predictions[predictions["level"] == "patient"]
    assert row["value"] == pytest.approx(
        roc_auc_score(patients["target"] == "tumour", patients["probability_tumour"]), abs=1e-12
    )


@pytest.mark.parametrize("positives", [10, 15])
def test_the_interval_of_20_patients_covers_a_high_auroc_and_is_never_empty(positives: int) -> None:
    random, runs, truth, covered = np.random.default_rng(positives), 400, 0.95, 0
    target = np.arange(20) < positives
    for _ in range(runs):
        score = random.normal(size=20) + norm.ppf(truth) * np.sqrt(2) * target
        rows = Classes(
            target.astype(int), target.astype(int), np.stack([1 - expit(score), expit(score)], 1), ("a", "b")
        )
        replicates = {
            "auroc": Replicates(
                np.concatenate([rows.resampled(w)["auroc"] for w in Jackknife(np.arange(20)).weights()]),
                rows.scores()["auroc"].value,
            )
        }
        low, high, _ = rows.interval("auroc", replicates, np.arange(20))
        covered += low <= truth <= high
        assert high - low > 0.02
    # Binomial noise around 95%, and 2 points below it; a percentile bootstrap covers 45 to 75% here.
    assert covered >= binom.ppf(0.001, runs, 0.93)


def test_perfect_predictions_have_an_interval_that_says_how_few_they_are(binary_predictions: Make) -> None:
    widths = []
    for n in (10, 40, 160):
        predictions = binary_predictions(n, 1.0)
        positive = np.arange(n) % 2 == 0
        name = np.where(positive, "tumour", "healthy")
        predictions = predictions.assign(
            target=name,
            prediction=name,
            probability_tumour=0.2 + 0.6 * positive,
            probability_healthy=0.8 - 0.6 * positive,
        )
        metrics = evaluate(predictions, BINARY)
        for metric in ("auroc", "auprc", "balanced_accuracy", "sensitivity", "specificity", "f1"):
            row = only(metrics, metric)
            assert row["value"] == row["high"] == 1, metric
            assert row["low"] < 1, metric
        widths.append(1 - only(metrics, "auroc")["low"])
    assert widths[0] > 2 * widths[1] > 4 * widths[2]


def test_fewer_than_five_patients_have_no_interval(binary_predictions: Make) -> None:
    metrics = evaluate(binary_predictions(4, 1.0, slides=3), BINARY)
    assert metrics["low"].isna().all()
    assert (metrics["method"] == "").all()
    assert np.isfinite(only(metrics, "brier")["value"])
    assert np.isfinite(only(evaluate(binary_predictions(5, 1.0), BINARY), "brier")["low"])


def test_copies_of_a_slide_do_not_make_an_interval_narrower(binary_predictions: Make) -> None:
    metrics = evaluate(binary_predictions(120, 1.0, slides=4), BINARY)
    for metric in ("auroc", "auprc", "balanced_accuracy", "sensitivity", "f1", "brier"):
        patient, slide = only(metrics, metric), only(metrics, metric, level="slide")
        assert slide["n"] == 4 * patient["n"]
        assert slide["value"] == pytest.approx(patient["value"])
        assert (slide["low"], slide["high"]) == pytest.approx((patient["low"], patient["high"]))


def test_the_mean_over_folds_varies_with_training_too(binary_predictions: Make) -> None:
    metrics = evaluate(binary_predictions(200, 1.0, folds=5), BINARY)
    for metric in ("auroc", "sensitivity", "brier"):
        mean, pooled = only(metrics, metric, "mean"), only(metrics, metric)
        assert mean["method"] == f"{pooled['method']}, nadeau-bengio"
        # 1 + K n_test / n_train = 2.25 times the variance.
        assert (mean["high"] - mean["low"]) / (pooled["high"] - pooled["low"]) == pytest.approx(1.5, rel=0.1)


def test_folds_that_test_the_same_patients_say_nothing_of_training(binary_predictions: Make) -> None:
    predictions = binary_predictions(60, 1.0)
    both = pd.concat([predictions, predictions.assign(fold=1)])
    metrics = evaluate(both, BINARY)
    once = only(evaluate(predictions, BINARY), "auroc")
    for scope in ("mean", "pooled"):
        row = only(metrics, "auroc", scope)
        assert row["method"] == "newcombe"
        assert (row["low"], row["high"]) == pytest.approx((once["low"], once["high"]))


@pytest.mark.slow
def test_permuted_labels_are_at_chance_with_an_interval_that_covers_it(binary_predictions: Make) -> None:
    predictions = binary_predictions(150, 2.0, folds=5)
    assert only(evaluate(predictions, BINARY), "auroc")["low"] > 0.8
    random, permutations, covered = np.random.default_rng(0), 40, 0
    for _ in range(permutations):
        predictions["target"] = random.permutation(predictions["target"])
        row = only(evaluate(predictions, BINARY), "auroc")
        covered += row["low"] <= 0.5 <= row["high"]
    assert covered >= binom.ppf(0.001, permutations, 0.93)


def test_without_a_second_class_what_needs_two_is_not_defined(binary_predictions: Make) -> None:
    predictions = binary_predictions(12, 1.0).assign(target="healthy")
    metrics = evaluate(predictions, BINARY)
    assert only(metrics, "auroc")[["value", "low", "high"]].isna().all()
    assert np.isfinite(only(metrics, "brier")["low"])
    assert np.isfinite(only(metrics, "specificity")["low"])


def test_validation_predictions_change_nothing(binary_predictions: Make) -> None:
    predictions = binary_predictions(60, 1.0)
    with_validation = pd.concat([predictions, binary_predictions(60, -3.0, seed=1).assign(part="val")])
    pd.testing.assert_frame_equal(evaluate(predictions, BINARY), evaluate(with_validation, BINARY))


def test_intervals_are_the_same_in_any_order_of_rows(binary_predictions: Make) -> None:
    predictions = binary_predictions(300, 1.0, folds=2)
    shuffled = predictions.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(evaluate(predictions, BINARY), evaluate(shuffled, BINARY))


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
    metrics = evaluate(predictions, BINARY, cohort=cohort, subgroups=columns)
    assert only(metrics, "auroc", "subgroup:site=Bergen")["n"] == 40
    assert only(metrics, "auroc", "subgroup:site=Turin", "slide")["n"] == 120
    assert only(metrics, "brier", "subgroup:stage=missing")["n"] == 10
    ages = metrics[metrics["scope"].str.startswith("subgroup:age=") & (metrics["metric"] == "brier")]
    ages = ages[ages["level"] == "patient"]
    assert ages["n"].tolist() == [25, 25, 25, 25]
    assert ages["scope"].iloc[0] == "subgroup:age=30 to 42.375"
    assert only(metrics, "auroc", "subgroup:scanner=several")["n"] == 100, "patients with slides of both scanners"
    assert only(metrics, "auroc", "subgroup:scanner=old", "slide")["n"] == 100
    scopes = set(evaluate(predictions, BINARY, cohort=cohort)["scope"])
    assert scopes == {"fold_0", "pooled", "subgroup:site=Bergen", "subgroup:site=Turin"}, "by site if nothing is said"
    assert "fold_0" in set(evaluate(predictions, BINARY, cohort=cohort.assign(site="x"))["scope"])
    with pytest.raises(LongslideError, match=r"no column 'sex'.*site, age, scanner, stage"):
        evaluate(predictions, BINARY, cohort=cohort, subgroups=["sex"])
    with pytest.raises(LongslideError, match="200 different values"):
        evaluate(predictions, BINARY, cohort=cohort.assign(x=slides["slide_id"]), subgroups=["x"])


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
    metrics = evaluate(frame, Task("ordinal", ("grade",), classes))
    assert only(metrics, "auroc")["value"] == pytest.approx(roc_auc_score(target, probability, multi_class="ovr"))
    assert only(metrics, "auroc:2")["value"] == pytest.approx(roc_auc_score(target == 1, probability[:, 1]))
    assert only(metrics, "mae")["value"] == pytest.approx(np.abs(target - probability.argmax(1)).mean())
    assert "mae" not in set(evaluate(frame, Task("multiclass", ("grade",), classes))["metric"])


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
    metrics = evaluate(frame, Task("multilabel", labels, labels))
    assert only(metrics, "auroc:egfr")["n"] == 80
    kras = only(metrics, "auroc:kras")
    assert kras["n"] == 50
    known = frame.iloc[30:]
    assert kras["value"] == pytest.approx(roc_auc_score(known["target_kras"].astype(int), known["probability_kras"]))
    assert only(metrics, "auroc")["value"] == pytest.approx((kras["value"] + only(metrics, "auroc:egfr")["value"]) / 2)
    assert "auroc:never" not in set(metrics["metric"])


def survival_predictions(binary_predictions: Make, n: int, folds: int = 1) -> pd.DataFrame:
    random = np.random.default_rng(0)
    risk = random.normal(size=n)
    true, censored = random.exponential(8 * np.exp(-risk)), random.exponential(15, n)
    frame = binary_predictions(n, 1.0, folds=folds)[["level", "fold", "part", "patient_id", "slide_id"]]
    frame = frame.assign(time=np.minimum(true, censored), event=(true <= censored).astype(int), risk=risk)
    for t in (2.0, 5.0, 8.0):
        frame[f"survival_{t:g}"] = np.exp(-t / 8 * np.exp(risk))
    return frame


SURVIVAL = Task("survival", ("time", "event"))


def test_survival_has_concordance_time_dependent_auc_and_brier_scores(binary_predictions: Make) -> None:
    frame = survival_predictions(binary_predictions, 150)
    metrics = evaluate(frame, SURVIVAL)
    for name in ("c_index", "c_index_uno", "time_auc", "time_auc:2", "time_auc:5", "time_auc:8"):
        row = only(metrics, name)
        assert 0.5 < row["low"] < row["value"] < row["high"] < 1, name
    row, reference = only(metrics, "integrated_brier"), only(metrics, "integrated_brier_km")
    assert row["low"] < row["value"] < row["high"] < reference["value"], "better than one curve for all"
    assert reference["method"] == ""
    censored_only = evaluate(frame.assign(event=0), SURVIVAL)
    assert np.isnan(only(censored_only, "c_index")["value"])
    assert np.isnan(only(censored_only, "integrated_brier")["value"])


def test_a_true_model_of_yearly_times_is_not_penalised_for_ties_with_censoring(binary_predictions: Make) -> None:
    # Weighing events by G(T) in place of G(T-) adds up to 18% with few distinct times.
    random, n = np.random.default_rng(1), 20_000
    risk = random.normal(size=n)
    life, loss = np.ceil(random.exponential(4 * np.exp(-risk))), np.ceil(random.exponential(5, n))
    times = np.array([1.0, 2.0, 3.0, 4.0])
    survival = np.exp(-times / 4 * np.exp(risk)[:, None])
    truth = np.mean(((life[:, None] > times) - survival) ** 2, 0)
    scores, _ = brier(np.minimum(life, loss), life <= loss, survival, times, np.ones((1, n)))
    assert scores[0] == pytest.approx(truth, rel=0.02)


def test_folds_may_predict_survival_at_times_of_their_own(binary_predictions: Make) -> None:
    frame = survival_predictions(binary_predictions, 120, folds=2)
    exact = evaluate(frame, SURVIVAL)
    own = frame.copy()
    # The hazard of these predictions is constant, so that other times of the second fold say the same.
    own.loc[own["fold"] == 1, "survival_3"] = np.exp(-3 / 8 * np.exp(own["risk"]))
    own.loc[own["fold"] == 1, "survival_5"] = np.nan
    metrics = evaluate(own, SURVIVAL)
    for scope in ("pooled", "mean", "fold_1"):
        value = only(metrics, "integrated_brier", scope)["value"]
        assert value == pytest.approx(only(exact, "integrated_brier", scope)["value"], rel=1e-6)
    assert only(metrics, "time_auc:3", "fold_1")["value"] > 0.5
    assert metrics[(metrics["metric"] == "time_auc:3") & (metrics["scope"] == "fold_0")].empty


def test_every_task_has_its_primary_metric(binary_predictions: Make) -> None:
    frame = binary_predictions(40, 1.0).assign(target=np.arange(40.0), prediction=np.arange(40.0) % 7)
    metrics = evaluate(frame, Task("regression", ("score",)))
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
        evaluate(change(binary_predictions(40, 1.0)), BINARY)


def test_intervals_of_a_thousand_patients_take_seconds(binary_predictions: Make) -> None:
    predictions = binary_predictions(1000, 1.0, folds=5, slides=2)
    started = time.process_time()
    evaluate(predictions, BINARY)
    assert time.process_time() - started < 10

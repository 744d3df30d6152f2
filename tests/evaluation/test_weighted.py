"""A weight of 2 is a row that is there twice: every weighted metric is the library's metric of the resample written out."""

import numpy as np
import pytest
from longslide.evaluation import weighted
from longslide.evaluation.bootstrap import resample_weights
from longslide.evaluation.classification import CALIBRATION_BINS, Classes, Labels
from longslide.evaluation.regression import Values
from longslide.evaluation.survival import Survival
from sklearn import metrics

RESAMPLES = 12


def binary(random: np.random.Generator, n: int) -> Classes:
    score = random.integers(0, 12, n) / 11  # many ties, 0 and 1 among them
    return Classes(
        random.integers(0, 2, n), (score > 0.4).astype(np.int64), np.stack([1 - score, score], 1), ("healthy", "tumour")
    )


def multiclass(random: np.random.Generator, n: int) -> Classes:
    probability = random.dirichlet(np.ones(4), n).round(1) + 0.01
    probability /= probability.sum(1, keepdims=True)
    target = random.integers(0, 3, n)  # the fourth class never occurs
    return Classes(target, probability.argmax(1), probability, ("a", "b", "c", "d"), ordinal=True)


def multilabel(random: np.random.Generator, n: int) -> Labels:
    target = random.integers(0, 2, (n, 3)).astype(float)
    target[random.random((n, 3)) < 0.3] = np.nan
    probability = random.random((n, 3)).round(1)
    return Labels(target, (probability > 0.5).astype(float), probability, ("egfr", "kras", "alk"))


def regression(random: np.random.Generator, n: int) -> Values:
    target = random.normal(1000, 1, n).round(1)
    return Values(target, target + random.normal(0, 1, n).round(1))


def survival(random: np.random.Generator, n: int) -> Survival:
    time = random.exponential(10, n).round(0) + 1  # ties of events and censorings
    risk = random.normal(size=n).round(1)
    times = np.array([2.0, 4.0, 7.0, 500.0])  # nobody is followed that long
    return Survival(time, random.random(n) < 0.6, risk, np.exp(-times / 10 * np.exp(risk)[:, None]), times)


@pytest.mark.parametrize("make", [binary, multiclass, multilabel, regression, survival])
@pytest.mark.parametrize("n", [12, 41, 150])
@pytest.mark.filterwarnings("error")
def test_the_metrics_of_a_resample_are_those_of_its_rows_written_out(make, n: int) -> None:
    outcomes = make(np.random.default_rng(n), n)
    (weights,) = resample_weights(np.arange(n), RESAMPLES, seed=3)
    fast = outcomes.resampled(weights)
    assert set(fast) == set(outcomes.scores())
    compared = 0
    for r in range(RESAMPLES):
        slow = outcomes.take(np.repeat(np.arange(n), weights[r].astype(int))).scores()
        for name, values in fast.items():
            # A resample without a class or label that the data have is not defined; the written-out rows do not know of it.
            if np.isfinite(values[r]):
                assert values[r] == pytest.approx(slow[name].value, rel=1e-9, abs=1e-9), name
                compared += 1
            elif ":" not in name and not isinstance(outcomes, Values | Survival):
                assert n == 12 or np.isnan(slow[name].value), name
    assert compared > 0.5 * RESAMPLES * len(fast)


@pytest.mark.parametrize("make", [binary, multiclass, multilabel, regression, survival])
def test_unit_weights_give_the_point_values(make) -> None:
    outcomes = make(np.random.default_rng(5), 80)
    fast = outcomes.resampled(np.ones((1, 80)))
    for name, score in outcomes.scores().items():
        assert fast[name][0] == pytest.approx(score.value, rel=1e-9, abs=1e-9, nan_ok=True), name


def test_a_resample_of_one_class_has_no_auroc() -> None:
    outcomes = binary(np.random.default_rng(0), 30)
    values = outcomes.resampled((outcomes.target == 1).astype(float)[None])
    assert all(np.isnan(values[name][0]) for name in ("auroc", "auprc", "balanced_accuracy", "specificity"))
    assert np.isfinite(values["log_loss"][0])


def test_a_patient_comes_with_all_slides() -> None:
    patients = np.array(["b", "a", "b", "c", "b"])
    (weights,) = resample_weights(patients, 50, seed=0)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 0] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all(), "three patients drawn each time"


def test_the_draws_depend_on_the_patients_and_the_seed_only() -> None:
    (first,) = resample_weights(np.array(["a", "b", "c", "d"]), 20, seed=1)
    (other,) = resample_weights(np.array(["c", "a", "d", "b"]), 20, seed=1)
    assert (first[:, [2, 0, 3, 1]] == other).all()
    (third,) = resample_weights(np.array(["a", "b", "c", "d"]), 20, seed=2)
    assert (first != third).any()


def test_many_rows_are_drawn_in_several_portions() -> None:
    portions = list(resample_weights(np.arange(50_000), 200, seed=0))
    assert len(portions) > 1
    assert sum(map(len, portions)) == 200
    assert all((portion.sum(1) == 50_000).all() for portion in portions)


def test_the_calibration_error_is_that_of_torchmetrics() -> None:
    import torch
    from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

    random = np.random.default_rng(0)
    rows = binary(random, 400)
    smooth = random.random(400)  # off the edges of the bins, where float32 decides
    rows = Classes(rows.target, rows.prediction, np.stack([1 - smooth, smooth], 1), rows.names)
    theirs = binary_calibration_error(
        torch.tensor(rows.probability[:, 1]), torch.tensor(rows.target), n_bins=CALIBRATION_BINS
    )
    assert rows.scores()["ece"].value == pytest.approx(theirs.item(), abs=1e-5)

    probability = random.dirichlet(np.ones(4), 400)
    rows = Classes(random.integers(0, 4, 400), probability.argmax(1), probability, ("a", "b", "c", "d"))
    theirs = multiclass_calibration_error(
        torch.tensor(probability), torch.tensor(rows.target), num_classes=4, n_bins=CALIBRATION_BINS
    )
    assert rows.scores()["ece"].value == pytest.approx(theirs.item(), abs=1e-5)


def test_brier_score_and_balanced_accuracy_are_those_of_scikit_learn() -> None:
    rows = binary(np.random.default_rng(1), 90)
    scores = rows.scores()
    assert scores["brier"].value == pytest.approx(metrics.brier_score_loss(rows.target, rows.probability[:, 1]))
    assert scores["balanced_accuracy"].value == pytest.approx(
        metrics.balanced_accuracy_score(rows.target, rows.prediction)
    )


def test_the_concordance_of_many_rows_is_counted_in_blocks() -> None:
    outcomes = survival(np.random.default_rng(2), 2500)
    fast = weighted.c_index(outcomes.time, outcomes.event, outcomes.risk, np.ones((1, 2500)))
    assert fast[0] == pytest.approx(outcomes.scores()["c_index"].value, rel=1e-9)

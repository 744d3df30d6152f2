"""Temperature and threshold, as fitted on validation predictions."""

from collections.abc import Callable

import numpy as np
import pytest
from longslide.errors import LongslideError
from longslide.evaluation.calibration import (
    FEWEST_CALIBRATED,
    TEMPERATURES,
    Calibration,
    best_threshold,
    calibration_curve,
    fit_calibration,
)
from scipy.special import softmax


def tempered(logits: np.ndarray) -> Callable[[Calibration], np.ndarray]:
    return lambda calibration: softmax(logits / calibration.temperature, 1)


def temperature_of(logits: np.ndarray, target: np.ndarray, patients: int) -> float:
    found = fit_calibration(tempered(logits), target, patients)
    assert found is not None
    assert found.intercept == 0
    return found.temperature


def shifted(log_odds: np.ndarray) -> Callable[[Calibration], np.ndarray]:
    def probability(by: Calibration) -> np.ndarray:
        return softmax(np.stack([np.zeros(len(log_odds)), log_odds / by.temperature + by.intercept], 1), 1)

    return probability


@pytest.mark.parametrize("true", [0.6, 1.0, 3.0])
def test_the_temperature_that_made_the_logits_too_sure_is_found(true: float) -> None:
    random = np.random.default_rng(0)
    honest = random.normal(size=(6000, 3)) * 2
    target = np.array([random.choice(3, p=p) for p in softmax(honest, 1)])
    assert temperature_of(honest * true, target, 6000) == pytest.approx(true, rel=0.1)


def test_few_validation_patients_have_no_temperature() -> None:
    target = np.arange(120) % 2
    assert fit_calibration(tempered(np.eye(2)[target]), target, FEWEST_CALIBRATED - 1) is None
    assert fit_calibration(tempered(np.eye(2)[target]), target, FEWEST_CALIBRATED) is not None


def test_perfect_separation_gives_a_temperature_within_its_bounds() -> None:
    target = np.arange(60) % 2
    for scale in (0.01, 1.0, 100.0):
        temperature = temperature_of(scale * np.eye(2)[target], target, 60)
        assert TEMPERATURES[0] <= temperature <= TEMPERATURES[1]


def test_the_temperature_is_closer_to_1_the_fewer_patients_there_are() -> None:
    random = np.random.default_rng(1)
    logits = random.normal(size=(4000, 2))
    target = np.array([random.choice(2, p=p) for p in softmax(logits / 4, 1)])
    few, many = (temperature_of(logits[:n], target[:n], n) for n in (50, 4000))
    assert 1 < few < many


def test_no_validation_rows_is_an_error() -> None:
    with pytest.raises(LongslideError, match="no validation outputs"):
        fit_calibration(tempered(np.empty((0, 2))), np.empty(0, np.int64), 0)


def test_the_threshold_maximises_sensitivity_plus_specificity() -> None:
    random = np.random.default_rng(3)
    for _ in range(20):
        target = random.random(40) < 0.4
        probability = np.clip(0.3 * target + random.random(40), 0, 1).round(2)
        threshold = best_threshold(target, probability)

        def youden(at: float, target: np.ndarray = target, probability: np.ndarray = probability) -> float:
            called = probability >= at
            return float(called[target].mean() + (~called)[~target].mean())

        assert youden(threshold) == pytest.approx(max(youden(at) for at in np.r_[probability, 1.1]))
        assert threshold not in probability


def test_the_threshold_without_a_second_class_is_a_half() -> None:
    assert best_threshold(np.ones(5, bool), np.linspace(0, 1, 5)) == 0.5


def test_the_calibration_curve_counts_every_row_once() -> None:
    confidence = np.array([0.0, 0.05, 0.55, 0.99, 1.0])
    curve = calibration_curve(confidence, np.array([0, 1, 1, 1, 0]))
    assert [item.n for item in curve] == [2, 1, 2]
    assert curve[2].observed == 0.5


@pytest.mark.parametrize("patients", [3, 5, 10, 20, 60])
@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_calibration_never_worsens_the_log_loss_of_other_patients_by_more_than_a_hair(
    patients: int, sharpness: float
) -> None:
    """`sharpness` is how many times too sure the model is."""
    random = np.random.default_rng([patients, int(10 * sharpness)])
    honest = random.normal(size=(4000, 2)) * 1.5
    target = np.array([random.choice(2, p=p) for p in softmax(honest, 1)])
    logits = honest * sharpness

    def log_loss(temperature: float) -> float:
        return float(-np.log(softmax(logits / temperature, 1)[np.arange(4000), target]).mean())

    worse = []
    for _ in range(40):
        chosen = random.choice(4000, patients, replace=False)
        found = fit_calibration(tempered(logits[chosen]), target[chosen], patients) or Calibration(1.0)
        worse.append(log_loss(found.temperature) - log_loss(1.0))
        assert (tempered(logits)(found).argmax(1) == logits.argmax(1)).all()
    assert np.mean(worse) < 0.005
    assert max(worse) < 0.05
    if patients < FEWEST_CALIBRATED:
        assert max(worse) == 0.0


@pytest.mark.parametrize(("prevalence", "most"), [(0.1, 0.24), (0.3, 0.39), (0.5, 0.43)])
def test_an_intercept_mends_what_balanced_class_weights_do_to_probabilities(prevalence: float, most: float) -> None:
    """Fitted on 60 patients; of others. A temperature alone comes to 0.41 at each prevalence, nothing at all to 0.43."""
    random = np.random.default_rng(7)
    losses: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(40):
        target = (random.random(4060) < prevalence).astype(np.int64)
        log_odds = 1.5 * (1.8 * (random.normal(size=4060) + 1.8 * target) - 1.62)  # as if the classes were as frequent
        for intercept, kept in losses.items():
            found = fit_calibration(shifted(log_odds[:60]), target[:60], 60, intercept=intercept)
            assert found is not None
            kept.append(float(-np.log(shifted(log_odds[60:])(found)[np.arange(4000), target[60:]]).mean()))
    assert np.mean(losses[True]) < most
    assert np.mean(losses[True]) < np.mean(losses[False]) + 0.005


def test_there_is_no_intercept_where_it_does_not_help() -> None:
    random = np.random.default_rng(3)
    log_odds = 2 * random.normal(size=80)
    target = (random.random(80) < 1 / (1 + np.exp(-log_odds))).astype(np.int64)
    found = fit_calibration(shifted(log_odds), target, 80, intercept=True)
    assert found is not None
    assert found.intercept == 0.0

"""Temperature and threshold, as fitted on validation predictions."""

import numpy as np
import pytest
from longslide.errors import LongslideError
from longslide.evaluation.calibration import TEMPERATURES, best_threshold, calibration_curve, fit_temperature
from scipy.special import expit, softmax


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_logits_too_sure_is_found(true: float) -> None:
    random = np.random.default_rng(0)
    honest = random.normal(size=(6000, 3)) * 2
    target = np.array([random.choice(3, p=p) for p in softmax(honest, 1)])
    assert fit_temperature(honest * true, target) == pytest.approx(true, rel=0.1)


def test_a_binary_logit_is_a_pair_of_logits() -> None:
    random = np.random.default_rng(1)
    logit = random.normal(size=300)
    target = (random.random(300) < expit(logit / 2)).astype(np.int64)
    one = fit_temperature(logit[:, None], target)
    assert one == pytest.approx(fit_temperature(logit, target))
    assert one == pytest.approx(fit_temperature(np.stack([-logit, logit], 1) / 2, target), rel=1e-4)
    assert one == pytest.approx(2, rel=0.5)


def test_perfect_separation_gives_a_bounded_temperature() -> None:
    target = np.array([0, 0, 1, 1])
    temperature = fit_temperature(np.array([-1.0, -2.0, 1.0, 2.0]), target)
    assert TEMPERATURES[0] <= temperature <= TEMPERATURES[0] * 1.1


def test_no_validation_rows_is_an_error() -> None:
    with pytest.raises(LongslideError, match="no validation logits"):
        fit_temperature(np.empty((0, 2)), np.empty(0, np.int64))


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

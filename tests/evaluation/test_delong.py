"""DeLong's variance against the formula written out, its test against a known truth; against pROC: `test_reference`."""

import numpy as np
import pytest
from longslide.evaluation.delong import delong, delong_difference
from scipy.stats import binom, kstest
from sklearn.metrics import roc_auc_score


def naive_delong(target: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DeLong et al. 1988, equations 2 to 6, all m * n pairs at a time: AUROCs and covariance."""
    pair = scores[:, target][:, :, None] - scores[:, ~target][:, None, :]
    psi = (pair > 0) + 0.5 * (pair == 0)  # (K, m, n)
    auroc, v10, v01 = psi.mean((1, 2)), psi.mean(2), psi.mean(1)
    m, n = v10.shape[1], v01.shape[1]
    s10 = (v10 - auroc[:, None]) @ (v10 - auroc[:, None]).T / (m - 1)
    s01 = (v01 - auroc[:, None]) @ (v01 - auroc[:, None]).T / (n - 1)
    return auroc, s10 / m + s01 / n


@pytest.mark.parametrize("seed", range(5))
def test_the_fast_variance_is_the_structural_components_written_out(seed: int) -> None:
    random = np.random.default_rng(seed)
    target = random.random(57) < 0.3
    scores = (random.normal(size=(3, 57)) + target).round(1)  # ties within and between the classes
    auroc, covariance = delong(target, scores)
    expected_auroc, expected_covariance = naive_delong(target, scores)
    np.testing.assert_allclose(auroc, expected_auroc, rtol=1e-12)
    np.testing.assert_allclose(covariance, expected_covariance, rtol=1e-10)
    assert auroc[0] == pytest.approx(roc_auc_score(target, scores[0]))


def test_p_values_of_equally_good_scores_are_uniform() -> None:
    random = np.random.default_rng(1)
    values = []
    for _ in range(500):
        target = random.random(120) < 0.5
        shared = random.normal(size=120) + target
        a, b = shared + random.normal(size=(2, 120))
        values.append(delong_difference(target, a, b).p)
    assert kstest(values, "uniform").pvalue > 0.001
    assert np.mean(np.array(values) < 0.05) < binom.ppf(0.999, 500, 0.06) / 500


def test_a_better_score_is_found_and_the_same_score_is_not() -> None:
    random = np.random.default_rng(2)
    target = random.random(200) < 0.5
    good, bad = 2 * target + random.normal(size=200), random.normal(size=200)
    assert delong_difference(target, good, bad).p < 1e-6
    assert delong_difference(target, good, good).p == 1
    assert delong_difference(target, good, np.exp(good)).p == 1, "the ranks are the same"


def test_what_cannot_be_known_is_nan() -> None:
    target = np.arange(20) < 8
    assert np.isnan(delong(np.zeros(20, bool), np.arange(20.0)[None])[0]).all(), "one class"
    low, high, p = delong_difference(target, target.astype(float), 2.0 * target)
    assert np.isnan([low, high]).all(), "an interval of no width would say that nothing else is possible"
    assert p == 1
    assert np.isnan(delong_difference(np.arange(20) < 1, np.arange(20.0), -np.arange(20.0))).all(), "a single positive"

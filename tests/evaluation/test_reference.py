"""Our numbers against those of R; `reference/README.md` says how they were made."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from longslide.evaluation import censored, weighted
from longslide.evaluation.delong import delong, delong_difference
from longslide.evaluation.intervals import Jackknife, Replicates, interval_of_mean_loss, mid_p, newcombe
from longslide.evaluation.regression import Values
from longslide.evaluation.survival import Survival, kaplan_meier, log_rank

REFERENCE = Path(__file__).parent / "reference"
EXPECTED = pd.read_csv(REFERENCE / "expected.csv").set_index("name")["value"]


def close(name: str, rel: float = 1e-9) -> object:
    return pytest.approx(EXPECTED[name], rel=rel, abs=1e-9)


def intervals_named(method: str) -> list[str]:
    return [name.removesuffix("_low") for name in EXPECTED.index if name.startswith(method) and name.endswith("_low")]


@pytest.fixture(scope="module")
def outcomes() -> Survival:
    table = pd.read_csv(REFERENCE / "survival.csv")
    survival = table.filter(like="survival_").to_numpy()
    return Survival(
        table["time"].to_numpy(float),
        table["event"].to_numpy() == 1,
        table["risk"].to_numpy(),
        survival,
        np.array([2.0, 4.0, 8.0]),
    )


def test_auroc_and_delongs_test_are_those_of_proc() -> None:
    table = pd.read_csv(REFERENCE / "binary.csv")
    target, scores = table["target"].to_numpy() == 1, table[["score_a", "score_b"]].to_numpy().T
    (a, b), covariance = delong(target, scores)
    assert a == close("auroc_a")
    assert b == close("auroc_b")
    assert weighted.auroc_and_auprc(target, scores[0], np.ones((1, len(table))))[0][0] == close("auroc_a")
    assert covariance[0, 0] == close("auroc_a_variance")
    assert covariance[0, 1] == close("auroc_covariance")
    low, high, p = delong_difference(target, *scores)
    assert (low, high, p) == (
        close("auroc_difference_low"),
        close("auroc_difference_high"),
        close("auroc_difference_p"),
    )


@pytest.mark.parametrize("name", intervals_named("newcombe"))
def test_newcombes_interval_is_its_formula_solved_by_r(name: str) -> None:
    auroc, positives, negatives = map(float, name.split("_")[1:])
    low, high = newcombe(auroc, int(positives), int(negatives))
    assert low == close(f"{name}_low", rel=1e-6)
    assert high == close(f"{name}_high", rel=1e-6)


@pytest.mark.parametrize("name", intervals_named("mid-p"))
def test_the_interval_of_a_proportion_is_that_of_binomial_probabilities_in_r(name: str) -> None:
    of, n = map(int, name.split("_")[1:])
    assert mid_p(of / n, n) == (close(f"{name}_low"), close(f"{name}_high"))


@pytest.mark.parametrize("losses", [[0.01] * 18 + [0.2, 0.6], np.linspace(0, 1, 50).tolist()])
def test_the_interval_of_a_mean_loss_is_that_drawn_by_r(losses: list[float]) -> None:
    (weights,) = Jackknife(np.arange(len(losses))).weights()
    replicates = Replicates(weighted.mean(np.array(losses), weights), float(np.mean(losses)))
    low, high, _ = interval_of_mean_loss(replicates, 1.0)
    assert (low, high) == pytest.approx(
        (EXPECTED[f"gaffke_{len(losses)}_low"], EXPECTED[f"gaffke_{len(losses)}_high"]), abs=0.02 * (high - low)
    )


def test_agreement_of_ordered_classes_is_that_of_psych() -> None:
    table = pd.read_csv(REFERENCE / "ordinal.csv")
    ones, classes = np.ones((1, len(table))), table.to_numpy()
    matrix = weighted.confusion(classes[:, 0], classes[:, 1], 4, ones)
    assert weighted.quadratic_kappa(matrix)[0] == close("quadratic_kappa")
    assert Values(*classes.T.astype(float)).scores()["spearman"].value == close("spearman")


def test_concordance_is_that_of_survival(outcomes: Survival) -> None:
    scores = outcomes.scores()
    assert scores["c_index"].value == close("c_index")
    assert scores["c_index_uno"].value == close("c_index_uno")


def test_the_log_rank_test_is_that_of_survival(outcomes: Survival) -> None:
    group = pd.read_csv(REFERENCE / "survival.csv")["group"].to_numpy()
    assert log_rank(outcomes.time, outcomes.event, (outcomes.risk > 0).astype(int)) == close("log_rank_2")
    assert log_rank(outcomes.time, outcomes.event, group) == close("log_rank_3")


def test_kaplan_meiers_curve_and_its_interval_are_those_of_survival(outcomes: Survival) -> None:
    curve = kaplan_meier(outcomes.time, outcomes.event)
    for time in (1, 3, 7, 12):
        (at,) = np.flatnonzero(curve.time == time)
        assert curve.survival[at] == close(f"km_{time}")
        assert curve.low[at] == close(f"km_{time}_low")
        assert curve.high[at] == close(f"km_{time}_high")


def test_the_brier_score_weighs_events_by_censoring_before_them_as_risk_regression_does(outcomes: Survival) -> None:
    data = outcomes.time, outcomes.event, outcomes.survival, outcomes.times
    scores, reference = censored.brier(*data, np.ones((1, len(outcomes))))
    for index, time in enumerate((2, 4, 8)):
        assert scores[0, index] == close(f"brier_{time}")
        assert reference[0, index] == close(f"brier_km_{time}")


def test_the_integrated_brier_score_is_that_of_pec_over_the_same_grid(outcomes: Survival) -> None:
    scores = outcomes.scores()
    assert scores["integrated_brier"].value == close("integrated_brier")
    assert scores["integrated_brier_km"].value == close("integrated_brier_km")


def test_the_time_dependent_auc_is_that_of_risk_regression(outcomes: Survival) -> None:
    scores = outcomes.scores()
    for time in (2, 4, 8):
        assert scores[f"time_auc:{time}"].value == close(f"time_auc_{time}")

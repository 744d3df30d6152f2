"""A weight of 2 is a row that is there twice: every weighted metric is a library's metric of the rows written out."""

import numpy as np
import pytest
from longslide.evaluation import censored
from longslide.evaluation.classification import CALIBRATION_BINS, Classes, Labels
from longslide.evaluation.intervals import MOST_GROUPS, Jackknife
from longslide.evaluation.regression import Values
from longslide.evaluation.survival import Survival
from scipy.stats import spearmanr
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


def library_scores(outcomes: Classes | Labels | Values | Survival) -> dict[str, float]:
    """Every metric of rows by scikit-learn, scipy and scikit-survival; those that are not defined are left out."""
    if isinstance(outcomes, Values):
        target, prediction = outcomes.target, outcomes.prediction
        values = {"mae": metrics.mean_absolute_error(target, prediction)}
        if len(np.unique(target)) > 1:
            values["r2"] = metrics.r2_score(target, prediction)
            if len(np.unique(prediction)) > 1:
                values["spearman"] = spearmanr(target, prediction).statistic
        return values
    if isinstance(outcomes, Labels):
        values = {}
        for index, name in enumerate(outcomes.names):
            of_label = library_scores(outcomes.label(index)[1])
            values |= {f"{metric}:{name}": value for metric, value in of_label.items()}
        for metric in {name.partition(":")[0] for name in values}:
            each = [values.get(f"{metric}:{name}", np.nan) for name in outcomes.names]
            values[metric] = float(np.mean(each))  # only compared where it is defined for all labels
        return values
    if isinstance(outcomes, Survival):
        return written_out_survival(outcomes)
    target, prediction, probability = outcomes.target, outcomes.prediction, outcomes.probability
    classes, present = np.arange(len(outcomes.names)), np.unique(target)
    values = {"log_loss": metrics.log_loss(target, probability, labels=classes)}
    ranking = {"auroc": metrics.roc_auc_score, "auprc": metrics.average_precision_score}
    sensitivity = metrics.recall_score(target, prediction, labels=classes, average=None, zero_division=np.nan)
    if len(classes) == 2:
        values["brier"] = metrics.brier_score_loss(target, probability[:, 1])
        values |= {"specificity": sensitivity[0], "sensitivity": sensitivity[1]}
        values["f1"] = metrics.f1_score(target, prediction, zero_division=np.nan)
        if len(present) == 2:
            values |= {name: score(target, probability[:, 1]) for name, score in ranking.items()}
    else:
        values["brier"] = float(((probability - np.eye(len(classes))[target]) ** 2).sum(1).mean())
        values |= {f"sensitivity:{name}": sensitivity[c] for c, name in enumerate(outcomes.names)}
        values["f1"] = metrics.f1_score(target, prediction, labels=present, average="macro")
        for name, score in ranking.items():
            each = [score(target == c, probability[:, c]) for c in present]
            values |= {f"{name}:{outcomes.names[c]}": value for c, value in zip(present, each, strict=True)}
            values[name] = float(np.mean(each))
    if len(present) > 1:
        values["balanced_accuracy"] = float(np.nanmean(sensitivity))
    if outcomes.ordinal:
        values["mae"] = metrics.mean_absolute_error(target, prediction)
        values["quadratic_kappa"] = metrics.cohen_kappa_score(target, prediction, labels=classes, weights="quadratic")
    return values


def written_out_survival(rows: Survival) -> dict[str, float]:
    """Pair by pair and row by row. (scikit-survival weighs events by G(T) in place of G(T-), unlike Graf et al. 1999.)"""
    time, event, risk = rows.time, rows.event, rows.risk

    def uncensored(t: float, *, before: bool) -> float:
        moments = [m for m in np.unique(time[~event]) if (m < t if before else m <= t)]
        # At one time events come first: who has an event then is no longer at risk to be censored.
        at_risk = [(time > m).sum() + ((time == m) & ~event).sum() for m in moments]
        return float(np.prod([1 - ((time == m) & ~event).sum() / n for m, n in zip(moments, at_risk, strict=True)]))

    weight = np.array([1 / g if (g := uncensored(t, before=True)) > 0 else 0.0 for t in time])
    pairs = [
        (i, j)
        for i in np.flatnonzero(event)
        for j in range(len(time))
        if time[i] < time[j] or (time[i] == time[j] and not event[j])
    ]
    won = [0.5 if risk[i] == risk[j] else float(risk[i] > risk[j]) for i, j in pairs]
    values = {}
    if pairs:
        values["c_index"] = float(np.mean(won))
        values["c_index_uno"] = float(np.average(won, weights=[weight[i] ** 2 for i, _ in pairs]))
    for t in rows.times:
        cases, controls = np.flatnonzero(event & (time <= t)), np.flatnonzero(time > t)
        if len(cases) and len(controls):
            above = [[(risk[i] > risk[j]) + 0.5 * (risk[i] == risk[j]) for j in controls] for i in cases]
            values[f"time_auc:{t:g}"] = float(np.average(np.mean(above, 1), weights=weight[cases]))
    return values


def test_the_concordance_index_is_that_of_scikit_survival() -> None:
    concordance = pytest.importorskip("sksurv.metrics").concordance_index_censored
    for seed in range(20):
        rows = survival(np.random.default_rng(seed), 90)
        assert rows.scores()["c_index"].value == pytest.approx(concordance(rows.event, rows.time, rows.risk)[0])


@pytest.mark.parametrize("make", [binary, multiclass, multilabel, regression, survival])
@pytest.mark.parametrize("n", [12, 41, 150])
def test_the_metrics_of_weighted_rows_are_those_of_the_libraries_for_the_rows_written_out(make, n: int) -> None:
    random = np.random.default_rng(n)
    outcomes = make(random, n)
    weights = random.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float)
    fast, compared = outcomes.resampled(weights), 0
    for r in range(RESAMPLES):
        rows = outcomes.take(np.repeat(np.arange(n), weights[r].astype(int)))
        for name, value in library_scores(rows).items():
            # Weights that leave out a class or label that the rows have: not defined, whatever the others give.
            if np.isfinite(fast[name][r]):
                assert fast[name][r] == pytest.approx(value, rel=1e-9, abs=1e-9), name
                compared += 1
            else:
                assert n == 12 or not np.isfinite(value), name
    assert compared > 0.5 * RESAMPLES * len(library_scores(outcomes))


@pytest.mark.parametrize("make", [binary, multiclass, multilabel, regression, survival])
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_scores_are_those_of_the_libraries(make, seed: int) -> None:
    outcomes = make(np.random.default_rng(seed), 80)
    scores, theirs = outcomes.scores(), library_scores(outcomes)
    for name, value in theirs.items():
        assert scores[name].value == pytest.approx(value, rel=1e-9, abs=1e-9, nan_ok=True), name
    assert len(theirs) > 0.4 * len(scores)


def test_rows_of_one_class_have_no_auroc() -> None:
    outcomes = binary(np.random.default_rng(0), 30)
    values = outcomes.resampled((outcomes.target == 1).astype(float)[None])
    assert all(np.isnan(values[name][0]) for name in ("auroc", "auprc", "balanced_accuracy", "specificity"))
    assert np.isfinite(values["log_loss"][0])


def test_a_patient_is_left_out_with_all_slides() -> None:
    (weights,) = Jackknife(np.array(["b", "a", "b", "c", "b"])).weights()
    assert weights.tolist() == [[1, 0, 1, 1, 1], [0, 1, 0, 1, 0], [1, 1, 1, 0, 1]]


def test_of_many_patients_groups_are_left_out_in_several_portions() -> None:
    patients = np.repeat(np.arange(25_000), 2)
    portions = list(Jackknife(patients).weights())
    assert len(portions) > 1
    weights = np.concatenate(portions)
    assert len(weights) == MOST_GROUPS
    assert ((weights == 0).sum(0) == 1).all(), "each row is left out once"
    assert (weights[:, ::2] == weights[:, 1::2]).all()


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


def test_the_concordance_of_many_rows_is_counted_in_blocks() -> None:
    rows = survival(np.random.default_rng(2), 2500)
    time, event, risk = rows.time, rows.event, rows.risk
    pair = event[:, None] & ((time[:, None] < time) | ((time[:, None] == time) & ~event))
    won = np.where(risk[:, None] == risk, 0.5, risk[:, None] > risk)
    value = censored.c_index(time, event, risk, np.ones((1, 2500)))[0]
    assert value == pytest.approx(won[pair].mean(), rel=1e-9)

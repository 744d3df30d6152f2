"""The losses against formulas written out by hand, and against other packages."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from longslide.errors import LongslideError
from longslide.models.classifier.classifier import SlideClassifier, TrainingFacts
from longslide.models.classifier.objective import (
    Binary,
    Cox,
    DiscreteHazards,
    Multilabel,
    Objective,
    Ordinal,
    Regression,
    create_objective,
    partial_likelihood,
    survival_at,
)
from longslide.models.classifier.options import ClassifierOptions
from longslide.models.classifier.selection import class_of, selection_metric
from longslide.task import Task
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

BINARY = Task("binary", ("y",), ("no", "yes"))
GRADES = Task("ordinal", ("y",), ("low", "middle", "high"))


def loss(objective: Objective, outputs: Tensor, target: Tensor) -> Tensor:
    total, weight = objective(outputs, target)
    return total / weight


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_binary_is_binary_cross_entropy_and_balances_classes_as_torch_weighs_them() -> None:
    outputs, target = randn(6, 1), torch.tensor([0, 1, 1, 0, 1, 1])
    expected = binary_cross_entropy_with_logits(outputs[:, 0], target.double())
    torch.testing.assert_close(loss(create_objective(BINARY), outputs, target), expected)
    each = cross_entropy(torch.cat([0 * outputs, outputs], 1), target, reduction="none")
    weighted = (each * torch.tensor([2.0, 0.5]).double()[target]).mean()
    torch.testing.assert_close(loss(create_objective(BINARY, [2.0, 0.5]), outputs, target), weighted)


def test_class_weights_count_where_a_bag_is_a_step_of_its_own() -> None:
    outputs = randn(1, 1)
    plain, weighted = create_objective(BINARY), create_objective(BINARY, [0.6, 3.0])
    for target, weight in ((0, 0.6), (1, 3.0)):
        of = torch.tensor([target])
        torch.testing.assert_close(loss(weighted, outputs, of), weight * loss(plain, outputs, of))


def test_of_weights_that_are_given_only_the_ratio_matters() -> None:
    balanced = (0.625, 2.5)  # 80 and 20 of 100 bags
    for choice in ([1.0, 4.0], [10.0, 40.0]):
        given = SlideClassifier(
            TrainingFacts(BINARY, 8, balanced), ClassifierOptions(aggregator="mean", class_weights=choice)
        )
        torch.testing.assert_close(given.objective.class_weights, torch.tensor(balanced))


def test_the_threshold_of_the_loss_is_the_share_of_positives_in_it() -> None:
    facts = TrainingFacts(BINARY, 8, (0.625, 2.5))  # 80 and 20 of 100 bags
    several = TrainingFacts(Task("multilabel", ("a", "b"), ("a", "b")), 8, (4.0, 0.25))  # 20 and 80 of 100
    for weights, binary, labels in (
        ("none", 0.2, (0.2, 0.8)),
        ("balanced", 0.5, (0.5, 0.5)),
        ([1, 3], 3 / 7, (0.2, 12 / 13)),
    ):
        options = ClassifierOptions(aggregator="mean", class_weights=weights)
        assert SlideClassifier(facts, options).loss_thresholds(facts.balanced_weights) == {
            BINARY.classes[1]: pytest.approx(binary)
        }
        of_labels = SlideClassifier(several, options).loss_thresholds(several.balanced_weights)
        assert tuple(of_labels.values()) == pytest.approx(labels)


def test_a_temperature_divides_the_logit() -> None:
    outputs = randn(5, 1)
    probability = create_objective(BINARY).predict(outputs, 2.0)["probability"]
    torch.testing.assert_close(probability[:, 1], (outputs[:, 0] / 2).sigmoid())


def test_missing_labels_have_no_part_in_the_loss_and_bags_weigh_the_same() -> None:
    nan = torch.nan
    outputs = randn(3, 2).requires_grad_()
    target = torch.tensor([[1.0, nan], [nan, nan], [0.0, 1.0]])
    value = loss(Multilabel(2), outputs, target)
    first = binary_cross_entropy_with_logits(outputs[0, 0], torch.tensor(1.0).double())
    third = binary_cross_entropy_with_logits(outputs[2], torch.tensor([0.0, 1.0]).double())
    torch.testing.assert_close(value, (first + third) / 2)
    (gradient,) = torch.autograd.grad(value, outputs)
    assert gradient.isfinite().all()
    assert not gradient[1].any()
    assert not gradient[0, 1]


def test_ordinal_probabilities_are_those_of_the_chain_of_thresholds() -> None:
    outputs, objective = randn(4, 2), Ordinal(3, None)
    above_low, above_middle = outputs.sigmoid().T
    expected = torch.stack([1 - above_low, above_low * (1 - above_middle), above_low * above_middle], 1)
    probability = objective.predict(outputs)["probability"]
    torch.testing.assert_close(probability, expected)
    target = torch.tensor([0, 2, 1, 1])
    torch.testing.assert_close(loss(objective, outputs, target), -expected[range(4), target].log().mean())


def test_the_ordinal_class_is_the_highest_that_is_reached_with_more_than_half() -> None:
    probability = torch.tensor([[0.45, 0.1, 0.45], [0.6, 0.2, 0.2], [0.1, 0.3, 0.6]])
    assert class_of(GRADES, probability).tolist() == [1, 0, 2]


def test_regression_trains_on_standardised_targets_and_predicts_in_their_units() -> None:
    objective, outputs, target = Regression(10.0, 4.0), randn(3, 1), torch.tensor([10.0, 14.0, 2.0])
    expected = (outputs[:, 0] - torch.tensor([0.0, 1.0, -2.0])).square().mean()
    torch.testing.assert_close(loss(objective, outputs, target), expected)
    torch.testing.assert_close(objective.predict(torch.tensor([[1.0]]))["value"], torch.tensor([14.0]))


def test_the_partial_likelihood_is_breslows_written_out() -> None:
    risk = randn(7)
    time = torch.tensor([2.0, 1.0, 2.0, 5.0, 3.0, 3.0, 9.0])
    event = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    expected = sum(torch.logsumexp(risk[time >= time[i]], 0) - risk[i] for i in range(7) if event[i])
    torch.testing.assert_close(partial_likelihood(risk, time, event), expected)


@pytest.mark.parametrize("ties", ["breslow", "efron"])
def test_the_partial_likelihood_and_the_baseline_are_those_of_r(ties: str) -> None:
    reference = Path(__file__).parents[2] / "evaluation" / "reference"
    expected = pd.read_csv(reference / "expected.csv").set_index("name")["value"]
    table = pd.read_csv(reference / "survival.csv")
    risk, target = torch.tensor(table["risk"]), torch.tensor(table[["time", "event"]].to_numpy(float))
    value = float(partial_likelihood(risk, *target.unbind(1), ties))
    assert -value == pytest.approx(expected[f"partial_likelihood_{ties}"], rel=1e-9)
    objective = Cox((2.0, 4.0, 8.0), ties).double()
    objective.fit_baseline(risk[:, None], target)
    assert objective.baseline.tolist() == pytest.approx([expected[f"baseline_{ties}_{t}"] for t in (2, 4, 8)], rel=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 5.0])
def test_a_temperature_changes_no_decision(temperature: float) -> None:
    outputs = 3 * randn(500, 2)
    for objective, task in ((Ordinal(3, None), GRADES), (Binary(2, None), None)):
        raw = outputs if task else outputs[:, :1]
        before, after = (objective.predict(raw, t)["probability"] for t in (None, temperature))
        torch.testing.assert_close(after.sum(1), torch.ones_like(after.sum(1)))
        assert ((before - after).abs().amax() > 0.01).item()
        decide = (lambda p: class_of(GRADES, p)) if task else (lambda p: p[:, 1] > 0.5)
        assert (decide(before) == decide(after)).all()
    same = Ordinal(3, None).predict(outputs, 1.0)["probability"]
    torch.testing.assert_close(same, Ordinal(3, None).predict(outputs)["probability"])


def test_cox_finds_the_coefficients_that_scikit_survival_finds() -> None:
    cox = pytest.importorskip("sksurv.linear_model", reason="scikit-survival has no wheels for this Python")

    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 2))
    time = np.ceil(10 * rng.exponential(np.exp(-x @ [1.0, -0.5])))  # whole numbers, so that there are ties
    event = rng.random(80) < 0.7
    structured = np.array(list(zip(event, time, strict=True)), dtype=[("event", bool), ("time", float)])
    reference = cox.CoxPHSurvivalAnalysis(ties="breslow").fit(x, structured)

    target = torch.tensor(np.stack([time, event], 1))
    objective = Cox((5.0, 20.0)).double()
    beta = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([beta], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        objective.start_group()
        value = loss(objective, torch.tensor(x) @ beta, target)
        value.backward()
        return value

    optimiser.step(closure)
    np.testing.assert_allclose(beta.detach().numpy()[:, 0], reference.coef_, atol=1e-5)
    objective.fit_baseline(torch.tensor(x) @ beta.detach(), target)
    survival = objective.predict(torch.tensor(x) @ beta.detach())["survival"]
    expected = np.stack([f([5.0, 20.0]) for f in reference.predict_survival_function(x)])
    np.testing.assert_allclose(survival.numpy(), expected, atol=1e-4)


def test_the_accumulated_batches_of_cox_have_the_loss_of_the_whole_group() -> None:
    outputs = randn(9, 1)
    target = torch.stack([randn(9, seed=1).exp(), torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1, 0]).double()], 1)
    objective = Cox((1.0,))
    parts = [objective(outputs[i : i + 3], target[i : i + 3]) for i in (0, 3, 6)]
    objective.start_group()
    total, events = objective(outputs, target)
    torch.testing.assert_close(sum(part[0] for part in parts), total)
    assert sum(float(part[1]) for part in parts) == events


def test_a_bag_learns_from_those_before_it_in_the_group_even_one_at_a_time() -> None:
    target = torch.tensor([[1.0, 1.0], [2.0, 1.0]])
    outputs = torch.zeros(2, 1, requires_grad=True)
    objective = Cox((1.0,))
    objective(outputs[:1], target[:1])
    value, _ = objective(outputs[1:], target[1:])
    (gradient,) = torch.autograd.grad(value, outputs)
    assert gradient[1] == pytest.approx(0.5), "it outlived the first one, so its risk must fall"


def test_discrete_hazards_are_the_likelihood_written_out() -> None:
    objective = DiscreteHazards((1.0, 2.0, 4.0))
    outputs = randn(5, 3)
    hazard = outputs.sigmoid()
    target = torch.tensor([[0.5, 1.0], [2.0, 1.0], [1.4, 0.0], [1.6, 0.0], [7.0, 1.0]])
    likelihood = torch.stack(
        [
            hazard[0, 0],  # an event in the first interval
            (1 - hazard[1, 0]) * (1 - hazard[1, 1]) * hazard[1, 2],  # an end belongs to the next interval
            1 - hazard[2, 0],  # censored before the middle of the second
            (1 - hazard[3, 0]) * (1 - hazard[3, 1]),  # censored after it
            (1 - hazard[4]).prod(),  # an event after the last
        ]
    )
    torch.testing.assert_close(loss(objective, outputs, target), -likelihood.log().mean())
    predictions = objective.predict(outputs)
    torch.testing.assert_close(predictions["survival"], (1 - hazard).cumprod(1))
    certain = objective.predict(torch.tensor([[20.0, 0, 0], [-20.0, -20, -20]]))["risk"]
    assert certain[0] > certain[1]


@pytest.mark.parametrize(
    ("task", "target"),
    [
        (BINARY, torch.tensor([0, 1, 1, 0])),
        (GRADES, torch.tensor([0, 1, 2, 1])),
        (Task("multiclass", ("y",), ("a", "b", "c")), torch.tensor([2, 1, 0, 1])),
        (Task("multilabel", ("a", "b"), ("a", "b")), torch.tensor([[1.0, torch.nan], [0, 1], [1, 1], [0, 0]])),
        (Task("regression", ("y",)), torch.tensor([1.0, -1, 2, 0])),
        (
            Task("survival", ("t", "e"), times=(1.0, 2.0), discrete_time=True),
            torch.tensor([[1.0, 1], [0.3, 0], [2, 1], [5, 0]]),
        ),
        (Task("survival", ("t", "e"), times=(1.0, 2.0)), torch.tensor([[1.0, 1], [0.3, 0], [2, 1], [5, 0]])),
    ],
    ids=lambda value: value.kind if isinstance(value, Task) else "",
)
def test_gradients_of_every_loss_are_right_and_every_task_has_its_metric(task: Task, target: Tensor) -> None:
    objective = create_objective(task).eval()
    outputs = randn(4, task.outputs).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: objective.double()(x, target)[0], outputs)
    if isinstance(objective, Cox):
        objective.fit_baseline(outputs.detach(), target.double())
    predictions = objective.predict(outputs.detach())
    assert math.isfinite(selection_metric(task, predictions, target))
    if "probability" in predictions and task.kind != "multilabel":
        torch.testing.assert_close(predictions["probability"].sum(1), torch.ones(4, dtype=torch.float64))
        assert torch.allclose(objective.logits(outputs.detach()).softmax(1), predictions["probability"])


def test_a_metric_without_two_classes_is_undefined() -> None:
    probability = torch.tensor([[0.3, 0.7], [0.6, 0.4]])
    assert math.isnan(selection_metric(BINARY, {"probability": probability}, torch.tensor([1, 1])))


def test_class_weights_must_be_one_a_class() -> None:
    with pytest.raises(LongslideError, match="3 class weights for a binary task with 2"):
        create_objective(BINARY, [1.0, 2.0, 3.0])


def test_survival_at_other_times_has_a_constant_hazard_between_those_known() -> None:
    rate = torch.tensor([[0.1], [0.5]]).double()
    known, wanted = torch.tensor([1.0, 4.0]).double(), torch.tensor([0.5, 1.0, 3.0, 6.0]).double()
    found = survival_at((-rate * known).exp(), (1.0, 4.0), (0.5, 1.0, 3.0, 6.0))
    torch.testing.assert_close(found, (-rate * wanted).exp())

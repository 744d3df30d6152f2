"""The outputs of the validation bags, and the metric by which a model is selected."""

import math
from typing import assert_never

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.functional.regression import r2_score, spearman_corrcoef
from torchmetrics.utilities import dim_zero_cat

from ...task import Task

SELECTION_METRIC: dict[str, str] = {
    "binary": "AUROC",
    "multiclass": "mean AUROC over the classes",
    "multilabel": "mean AUROC over the labels",
    "ordinal": "Spearman's correlation of expected and true grade",
    "regression": "R2",
    "survival": "C-index",
}
"""What `val_metric` is, by kind of task."""


class BagOutputs(Metric):
    """Outputs and targets of the bags of all devices, each bag once, however often a sampler repeats it."""

    full_state_update = False
    outputs: list[Tensor]
    target: list[Tensor]
    index: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("outputs", "target", "index"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, outputs: Tensor, target: Tensor, index: Tensor) -> None:
        """Add bags: raw outputs `(B, n_outputs)`, targets, and `(B,)` rows of the dataset."""
        self.tails = outputs.shape[1:], target.shape[1:]
        self.outputs.append(outputs.detach())
        self.target.append(target)
        self.index.append(index)

    def gathered(self) -> tuple[Tensor, Tensor]:
        """Outputs and targets, by row."""
        outputs, target, index = self.compute()
        # torchmetrics makes a tensor of one element a scalar: one bag is a batch of one here.
        return outputs.reshape(index.numel(), *self.tails[0]), target.reshape(index.numel(), *self.tails[1])

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, targets and rows, by row."""
        outputs, target, index = (dim_zero_cat(state) for state in (self.outputs, self.target, self.index))
        order = index.argsort(stable=True)
        first = torch.ones_like(order, dtype=torch.bool)
        first[1:] = index[order][1:] != index[order][:-1]
        order = order[first]
        return outputs[order], target[order], index[order]


def selection_metric(task: Task, predictions: dict[str, Tensor], target: Tensor) -> float:
    """What `val_metric` is, higher being better.

    See `SELECTION_METRIC`. All but R2 see the order of the bags only, and none sees decisions: a kappa stays at 0 until the
    first bag crosses a threshold, and so selects the first epoch of a small run.

    Args:
        task: The task.
        predictions: What the task's objective predicts.
        target: The targets, as the task has them.

    Returns:
        The metric; NaN where it is not defined, as an AUROC is with one class.
    """
    match task.kind:
        case "binary":
            return _auroc(predictions["probability"][:, 1], target)
        case "multiclass":
            one_hot = torch.nn.functional.one_hot(target, len(task.classes))
            return _mean_auroc(predictions["probability"], one_hot)
        case "multilabel":
            return _mean_auroc(predictions["probability"], target)
        case "ordinal":
            return _rank_correlation(predictions["probability"], target)
        case "regression":
            return float(r2_score(predictions["value"], target)) if len(target) > 1 else math.nan
        case "survival":
            return _c_index(predictions["risk"].double(), *target.double().unbind(1))
        case _:
            assert_never(task.kind)


def _mean_auroc(probability: Tensor, target: Tensor) -> float:
    each = [_auroc(p, t) for p, t in zip(probability.T, target.T, strict=True)]
    defined = [value for value in each if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def _rank_correlation(probability: Tensor, target: Tensor) -> float:
    grades = torch.arange(probability.shape[1], dtype=probability.dtype, device=probability.device)
    expected, target = probability @ grades, target.to(probability.dtype)
    if len(target) < 2 or target.min() == target.max():
        return math.nan
    return 0.0 if expected.min() == expected.max() else float(spearman_corrcoef(expected, target))


def class_of(task: Task, probability: Tensor, thresholds: dict[str, float] | None = None) -> Tensor:
    """What the probabilities come to.

    Args:
        task: A classification or multilabel task.
        probability: `(B, C)`.
        thresholds: For `binary`, by the name of the second class; for `multilabel`, by label; 0.5 where there is none.

    Returns:
        `(B,)` int64 class: the most probable one; for `ordinal` the highest class that is reached with a probability of more
        than half, as in CORN. For `multilabel` `(B, C)` int64, 0 or 1.
    """
    thresholds = thresholds or {}
    match task.kind:
        case "binary":
            return (probability[:, 1] >= thresholds.get(task.classes[1], 0.5)).long()
        case "multilabel":
            limits = probability.new_tensor([thresholds.get(name, 0.5) for name in task.classes])
            return (probability >= limits).long()
        case "ordinal":
            above = 1 - probability.cumsum(1)[:, :-1]
            return (above > 0.5).sum(1)
        case "multiclass":
            return probability.argmax(1)
        case "regression" | "survival":
            raise ValueError(f"a {task.kind} task has no classes to decide between")
        case _:
            assert_never(task.kind)


def _c_index(risk: Tensor, time: Tensor, event: Tensor) -> float:
    """Harrell's: of the pairs whose earlier time is an event, the share in which it had the higher risk."""
    seen = event[:, None] > 0
    comparable = seen & ((time[:, None] < time) | ((time[:, None] == time) & (event == 0)))
    difference = risk[:, None] - risk
    won = (difference > 0).double() + 0.5 * (difference == 0)
    return float((won * comparable).sum() / comparable.sum()) if comparable.any() else math.nan


def _auroc(probability: Tensor, target: Tensor) -> float:
    known = ~target.isnan() if target.is_floating_point() else torch.ones_like(target, dtype=torch.bool)
    target = target[known].long()
    if target.min() == target.max() if len(target) else True:
        return math.nan
    return float(binary_auroc(probability[known], target, validate_args=False))

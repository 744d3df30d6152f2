"""What each kind of task trains on, and what it predicts from the raw outputs of a model."""

from collections.abc import Sequence
from typing import Literal, assert_never

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, logsigmoid

from ...errors import LongslideError
from ...task import Task

Ties = Literal["breslow", "efron"]


class Objective(nn.Module):
    """The loss of a task and the predictions of its outputs.

    The loss of a batch is the sum over its bags and the sum of their weights, not a mean: batches that are accumulated, or
    that several processes share, can then be divided by the weight of them all, so that bags weigh the same wherever they
    are.
    """

    def forward(self, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch.

        Args:
            outputs: `(B, n_outputs)` raw outputs, floating.
            target: The targets, as the task has them: `(B,)` int64 class; `(B, C)` float with NaN for missing labels; `(B,)`
                float value; `(B, 2)` float (time, event).

        Returns:
            The weighted sum of the losses, and the sum of the weights: two scalars. The loss is their quotient.
        """
        raise NotImplementedError

    def predict(self, outputs: Tensor, temperature: float | None = None, intercept: float = 0.0) -> dict[str, Tensor]:
        """Predictions of raw outputs `(B, n_outputs)`.

        Args:
            outputs: The raw outputs.
            temperature: What the logits of a classification are divided by, from validation; None for 1.
            intercept: What is added then, for `binary`.

        Returns:
            `probability` `(B, C)` for classifications; `value` `(B,)` for regression; `risk` `(B,)`, higher for earlier
            events, and `survival` `(B, n_times)` for survival.
        """
        raise NotImplementedError

    def logits(self, outputs: Tensor, temperature: float | None = None, intercept: float = 0.0) -> Tensor:
        """`(B, C)` numbers whose softmax over the classes is the probability, calibrated so that no decision changes."""
        raise NotImplementedError


class _Classification(Objective):
    """One class per bag, out of several.

    The sum of the weights that comes with the loss is the number of bags, not that of their weights: divided by its own
    weight, a bag that is a step of its own would weigh the same whatever its class.

    Args:
        class_weights: `(C,)` weight of the bags of each class, 1 on average over the training bags; None for 1.
        classes: C.
    """

    class_weights: Tensor

    def __init__(self, classes: int, class_weights: Sequence[float] | None) -> None:
        super().__init__()
        weights = torch.ones(classes) if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights)

    def forward(self, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """See `Objective.forward`."""
        weights = self.class_weights.to(outputs.dtype)[target]
        return (weights * self._losses(outputs, target)).sum(), weights.new_full((), float(len(target)))

    def _losses(self, outputs: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(self.logits(outputs), target, reduction="none")

    def predict(self, outputs: Tensor, temperature: float | None = None, intercept: float = 0.0) -> dict[str, Tensor]:
        """See `Objective.predict`."""
        return {"probability": self.logits(outputs, temperature, intercept).softmax(1)}


class Multiclass(_Classification):
    """Cross-entropy over one logit per class."""

    def logits(self, outputs: Tensor, temperature: float | None = None, intercept: float = 0.0) -> Tensor:
        """See `Objective.logits`."""
        return outputs / (temperature or 1.0)


class Binary(_Classification):
    """Cross-entropy of one logit, that of the second class against the first."""

    def logits(self, outputs: Tensor, temperature: float | None = None, intercept: float = 0.0) -> Tensor:
        """See `Objective.logits`."""
        log_odds = outputs / (temperature or 1.0) + intercept
        return torch.cat([torch.zeros_like(log_odds), log_odds], dim=1)


class Ordinal(_Classification):
    """Ordered classes by conditional thresholds, as in CORN (https://arxiv.org/abs/2111.08851).

    Output k is the logit of "above class k, given not below it", so the probabilities are consistent by construction. The
    loss is the negative log-likelihood of the class: CORN's binary cross-entropies, added up for each bag, with bags rather
    than thresholds weighing the same.
    """

    def logits(self, outputs: Tensor, temperature: float | None = None, intercept: float = 0.0) -> Tensor:
        """See `Objective.logits`: the log-probabilities of the classes.

        The temperature divides the log-odds of "above class k", so that the class reached with more than half stays.
        """
        nothing = torch.zeros_like(outputs[:, :1])
        if temperature is not None:
            above = logsigmoid(outputs).cumsum(1)
            below = torch.log(-torch.expm1(above.clamp(max=-torch.finfo(above.dtype).tiny)))
            above = ((above - below) / temperature).sigmoid()
            above = torch.cat([torch.ones_like(nothing), above, nothing], dim=1)
            return (above[:, :-1] - above[:, 1:]).clamp(min=torch.finfo(above.dtype).tiny).log()
        reached = torch.cat([nothing, logsigmoid(outputs).cumsum(1)], dim=1)
        return reached + torch.cat([logsigmoid(-outputs), nothing], dim=1)


class Multilabel(Objective):
    """Binary cross-entropy of each label; a bag's loss is the mean over the labels that it has.

    Args:
        labels: Number of labels C.
        positive_weights: `(C,)` weight of the positives of each label against its negatives; None for 1.
    """

    positive_weights: Tensor

    def __init__(self, labels: int, positive_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = (
            torch.ones(labels) if positive_weights is None else torch.tensor(positive_weights, dtype=torch.float32)
        )
        self.register_buffer("positive_weights", weights)

    def forward(self, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """See `Objective.forward`; a bag without any label has no weight."""
        known = ~target.isnan()
        target = torch.where(known, target, 0.0).to(outputs.dtype)
        positive_weights = self.positive_weights.to(outputs.dtype)
        losses = binary_cross_entropy_with_logits(outputs, target, reduction="none", pos_weight=positive_weights)
        per_bag = (losses * known).sum(1) / known.sum(1).clamp(min=1)
        return per_bag.sum(), known.any(1).to(outputs.dtype).sum()

    def predict(self, outputs: Tensor, temperature: float | None = None, intercept: float = 0.0) -> dict[str, Tensor]:
        """See `Objective.predict`: the probability of each label."""
        return {"probability": (outputs / (temperature or 1.0)).sigmoid()}

    def logits(self, outputs: Tensor, temperature: float | None = None, intercept: float = 0.0) -> Tensor:
        """`(B, C)`: here the sigmoid of each is the probability of its label."""
        return outputs / (temperature or 1.0)


class Regression(Objective):
    """Squared error of the target, standardised by the training bags' mean and standard deviation.

    Args:
        mean: Mean of the training targets.
        std: Their standard deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """See `Objective.forward`."""
        standardised = (target.to(outputs.dtype) - self.mean) / self.std
        return (outputs[:, 0] - standardised).square().sum(), outputs.new_full((), float(len(outputs)))

    def predict(self, outputs: Tensor, temperature: float | None = None, intercept: float = 0.0) -> dict[str, Tensor]:
        """See `Objective.predict`: in the units of the table."""
        return {"value": outputs[:, 0] * self.std + self.mean}


class Cox(Objective):
    """Cox's partial likelihood, ties by Efron's or Breslow's method; the output is the log-risk.

    An event is compared with the bags that are still at risk at its time, so bags must be seen together: those at risk are
    the bags of the batch and, in training, those of the earlier batches whose gradients are accumulated with it
    (`start_group` forgets them). The outputs of the earlier ones are constants: a bag learns from its comparison with those
    beside and before it. With one bag per batch and no accumulation there is nothing to learn. Devices do not see one
    another's bags. The loss is a mean over events.

    Args:
        times: `(n_times,)` times at which survival is predicted, in the units of the table.
        ties: `efron`, closer to the exact likelihood where many times are equal, or `breslow`.

    Attributes:
        baseline: `(n_times,)` cumulative baseline hazard at these times; NaN until `fit_baseline`.
    """

    baseline: Tensor

    def __init__(self, times: Sequence[float], ties: Ties = "breslow") -> None:
        super().__init__()
        self.times = tuple(times)
        self.ties: Ties = ties
        self.register_buffer("baseline", torch.full((len(self.times),), torch.nan))
        self._seen: list[tuple[Tensor, Tensor]] = []

    def start_group(self) -> None:
        """Forget the bags seen: their gradients are spent."""
        self._seen = []

    def forward(self, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """See `Objective.forward`; the weights are the events."""
        risk, together = outputs, target
        earlier: Tensor | float = 0.0
        if self.training:
            if self._seen:
                before = [torch.cat(parts) for parts in zip(*self._seen, strict=True)]
                earlier = partial_likelihood(before[0][:, 0], before[1][:, 0], before[1][:, 1], self.ties)
                risk, together = torch.cat([before[0], outputs]), torch.cat([before[1], target])
            self._seen.append((outputs.detach(), target))
        # With the sum over the earlier bags taken off, the losses of a group's batches add up to that of the group.
        loss = partial_likelihood(risk[:, 0], together[:, 0], together[:, 1], self.ties) - earlier
        return loss, target[:, 1].to(outputs.dtype).sum()

    def predict(self, outputs: Tensor, temperature: float | None = None, intercept: float = 0.0) -> dict[str, Tensor]:
        """See `Objective.predict`."""
        risk = outputs[:, 0]
        return {"risk": risk, "survival": (-self.baseline * risk.exp()[:, None]).exp()}

    def fit_baseline(self, outputs: Tensor, target: Tensor) -> None:
        """The cumulative baseline hazard, ties as in the loss, from outputs `(B, 1)` and targets `(B, 2)`."""
        time, event = target.unbind(1)
        steps = event / _at_risk(outputs[:, 0], time, event, self.ties).exp()
        self.baseline = torch.stack([steps[time <= t].sum() for t in self.times]).to(self.baseline)


def partial_likelihood(risk: Tensor, time: Tensor, event: Tensor, ties: Ties = "breslow") -> Tensor:
    """The negative log partial likelihood of Cox's model: a sum over the events.

    Args:
        risk: `(B,)` log-risks.
        time: `(B,)` time of the event or of censoring.
        event: `(B,)` 1 for an event, 0 for censoring.
        ties: How events of one time are compared: `breslow` with all at risk then, `efron` (1977) with those and a growing
            share less of one another.
    """
    return (event.to(risk.dtype) * (_at_risk(risk, time, event, ties) - risk)).sum()


def _at_risk(risk: Tensor, time: Tensor, event: Tensor, ties: Ties) -> Tensor:
    """`(B,)` log of the sum of risks that each row, if it is an event, is compared with."""
    order = time.argsort(descending=True, stable=True)
    sorted_time = time[order]
    cumulative = risk[order].logcumsumexp(0)
    # Bags of one time are all at risk at that time: the sum that ends with the last of them.
    last = torch.searchsorted(-sorted_time.contiguous(), -time.contiguous(), right=True) - 1
    at_risk = cumulative[last]
    if ties == "breslow":
        return at_risk
    events = (event > 0).nonzero()[:, 0]
    together = time[events][:, None] == time[events]
    number = torch.tril(together, -1).sum(1)  # 0, 1, ... among the events of one time
    share = number.to(risk.dtype) / together.sum(1)
    tied = risk[events].expand(len(events), -1).masked_fill(~together, -torch.inf).logsumexp(1)
    # log(exp(at_risk) - share * exp(tied)), whose share is below 1
    less = torch.log1p(-share * (tied - at_risk[events]).exp())
    return at_risk.index_add(0, events, less.to(at_risk.dtype))


class DiscreteHazards(Objective):
    """Hazards of time intervals, as in nnet-survival (https://doi.org/10.7717/peerj.6257).

    Output k is the logit of the hazard: an event in interval k, given none before. A censored bag survives the intervals of
    which it lived through at least half. The loss is the negative log-likelihood, a sum over bags: any batch size will do.

    Args:
        times: Right ends of the intervals, ascending, in the units of the table; the first begins at 0.
    """

    ends: Tensor

    def __init__(self, times: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("ends", torch.tensor(times, dtype=torch.float32))

    def forward(self, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """See `Objective.forward`."""
        time, event = target[:, :1], target[:, 1:] > 0
        begins = torch.cat([self.ends.new_zeros(1), self.ends[:-1]])
        survived = torch.where(event, time >= self.ends, time >= (begins + self.ends) / 2)
        failed = event & (time >= begins) & (time < self.ends)
        likelihood = logsigmoid(-outputs) * survived + logsigmoid(outputs) * failed
        return -likelihood.sum(), outputs.new_full((), float(len(outputs)))

    def predict(self, outputs: Tensor, temperature: float | None = None, intercept: float = 0.0) -> dict[str, Tensor]:
        """See `Objective.predict`; the risk is minus the mean survival time up to the last interval's end."""
        survival = logsigmoid(-outputs).cumsum(1).exp()
        lengths = self.ends.diff(prepend=self.ends.new_zeros(1))
        return {"risk": -(survival * lengths).sum(1), "survival": survival}


def survival_at(survival: Tensor, times: Sequence[float], wanted: Sequence[float]) -> Tensor:
    """Survival at other times, the hazard being constant between those known and, after the last, what it was before.

    Args:
        survival: `(B, n_times)` at `times`.
        times: Ascending, above 0.
        wanted: Times.

    Returns:
        `(B, n_wanted)`.
    """
    if tuple(times) == tuple(wanted):
        return survival
    known = survival.new_tensor([0.0, *times])
    at = survival.new_tensor(list(wanted))
    cumulative = -survival.clamp(min=1e-12).log()
    cumulative = torch.cat([torch.zeros_like(cumulative[:, :1]), cumulative], dim=1)
    after = torch.searchsorted(known, at).clamp(1, len(times))
    share = (at - known[after - 1]) / (known[after] - known[after - 1])
    return (-(cumulative[:, after - 1] + share * (cumulative[:, after] - cumulative[:, after - 1]))).exp()


def create_objective(
    task: Task,
    class_weights: Sequence[float] | None = None,
    target_mean: float = 0.0,
    target_std: float = 1.0,
    cox_ties: Ties = "breslow",
) -> Objective:
    """The objective of a task.

    Args:
        task: The task.
        class_weights: For classes, `(C,)` weight of each class's bags; for labels, of each label's positives.
        target_mean: Mean of the training targets of a regression.
        target_std: Their standard deviation.
        cox_ties: How Cox's likelihood takes events of one time.

    Raises:
        LongslideError: Class weights for a task without classes, or not one a class.
    """
    if class_weights is not None and len(class_weights) != len(task.classes):
        raise LongslideError(
            f"{len(class_weights)} class weights for a {task.kind} task with {len(task.classes)} classes; give one a class"
        )
    match task.kind:
        case "binary":
            return Binary(len(task.classes), class_weights)
        case "multiclass":
            return Multiclass(len(task.classes), class_weights)
        case "ordinal":
            return Ordinal(len(task.classes), class_weights)
        case "multilabel":
            return Multilabel(len(task.classes), class_weights)
        case "regression":
            return Regression(target_mean, target_std)
        case "survival":
            return DiscreteHazards(task.times) if task.discrete_time else Cox(task.times, cox_ties)
        case _:
            assert_never(task.kind)

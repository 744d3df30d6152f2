"""Training in which every bag weighs the same, whatever batch, accumulation or device it falls to."""

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torchmetrics import Metric

from ..later import Later
from ..slide_encoder.encoder import SlideEncoder
from ..slide_encoder.published import PublishedSlideEncoder

TINY = 1e-12


class MeanLoss(Metric):
    """The quotient of two sums. torchmetrics' own mean looks for NaN, for which it waits for the GPU."""

    full_state_update = False
    mean_value: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("mean_value", "weight"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, weight: Tensor) -> None:
        """Add a sum of losses, and that of their weights."""
        self.mean_value += loss
        self.weight += weight

    def compute(self) -> Tensor:
        """The mean."""
        return self.mean_value / self.weight


class BagWeightedModule(LightningModule):
    """A module whose `training_step` returns what `weighted_loss` does: the sum of the losses of a batch.

    Batches under a token budget have different numbers of bags. So the gradients of sums are accumulated, and divided by the
    weight of all that was accumulated, on all devices, before the optimiser's step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.train_loss = MeanLoss()
        self.train_loss.persistent(True)  # so that an epoch that is resumed in the middle reports all its bags
        self.later = Later()
        self._group_weight: Tensor | None = None
        self._logged = False

    def weighted_loss(self, loss: Tensor, weight: Tensor) -> Tensor:
        """Take note of the weight of a batch, and log its loss as `train_loss`.

        Args:
            loss: Sum of the weighted losses, a scalar.
            weight: Sum of the weights, a scalar.

        Returns:
            The sum of the losses.
        """
        weight = weight.detach()
        self._group_weight = weight if self._group_weight is None else self._group_weight + weight
        self.train_loss.update(loss.detach(), weight)
        if (
            not self._logged
        ):  # once an epoch: Lightning asks the metric at its end, and each call takes as long as a layer
            self.log("train_loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
            self._logged = True
        return loss

    def on_fit_start(self) -> None:
        """Grid cells are looked at later too."""
        self._logged = False
        self._look_at_cells(self.later)

    def on_fit_end(self) -> None:
        """At once again."""
        self._look_at_cells(None)

    def _look_at_cells(self, later: Later | None) -> None:
        for module in self.modules():
            if isinstance(module, SlideEncoder | PublishedSlideEncoder):
                module.later = later

    def on_train_epoch_start(self) -> None:
        """Nothing is accumulated over the end of an epoch."""
        self.train_loss.reset()  # not called where a resumed run goes on within an epoch
        self.start_group()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the gradient that of the mean over all bags."""
        weight = torch.zeros((), device=self.device) if self._group_weight is None else self._group_weight.float()
        total = self.trainer.strategy.reduce(weight, reduce_op="sum")
        assert isinstance(total, Tensor)
        # Lightning divided each loss by the number of batches, DDP the gradients by the number of devices.
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / total.clamp(min=TINY)
        torch._foreach_mul_([p.grad for p in self.parameters() if p.grad is not None], scale)
        self.start_group()

    def start_group(self) -> None:
        """Begin to accumulate anew."""
        self._group_weight = None

    def on_train_epoch_end(self) -> None:
        """Nothing is left to be looked at before the next epoch."""
        self._logged = False
        self.later.look(wait=True)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint holds under `longslide`: all that inference needs beside the weights, in plain types."""
        raise NotImplementedError

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the description; a model that a loss has spoilt is not saved."""
        self.later.look(wait=True)
        checkpoint["longslide"] = self.describe()

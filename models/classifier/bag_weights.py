"""Training in which every bag weighs the same, whatever batch, accumulation or device it falls to."""

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric


class BagWeightedModule(LightningModule):
    """A module whose `training_step` returns what `weighted_loss` does: the sum of the losses of a batch.

    Batches under a token budget have different numbers of bags. So the gradients of sums are accumulated, and divided by the
    weight of all that was accumulated, on all devices, before the optimiser's step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.train_loss = MeanMetric()
        self.train_loss.persistent(True)  # so that an epoch that is resumed in the middle reports all its bags
        self._group_weight = 0.0

    def weighted_loss(self, loss: Tensor, weight: Tensor) -> Tensor:
        """Take note of the weight of a batch, and log its loss as `train_loss`.

        Args:
            loss: Sum of the weighted losses, a scalar.
            weight: Sum of the weights, a scalar.

        Returns:
            The sum of the losses.
        """
        self._group_weight += float(weight)
        if weight > 0:
            self.train_loss.update(loss.detach() / weight, weight)
        self.log("train_loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def on_train_epoch_start(self) -> None:
        """Nothing is accumulated over the end of an epoch."""
        self.train_loss.reset()  # not called where a resumed run goes on within an epoch
        self.start_group()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the gradient that of the mean over all bags."""
        total = self.trainer.strategy.reduce(
            torch.tensor(self._group_weight, device=self.device, dtype=torch.float32), reduce_op="sum"
        )
        # Lightning divided each loss by the number of batches, DDP the gradients by the number of devices.
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / max(float(total), 1e-12)
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        self.start_group()

    def start_group(self) -> None:
        """Begin to accumulate anew."""
        self._group_weight = 0.0

    def describe(self) -> dict[str, Any]:
        """What a checkpoint holds under `longslide`: all that inference needs beside the weights, in plain types."""
        raise NotImplementedError

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the description."""
        checkpoint["longslide"] = self.describe()

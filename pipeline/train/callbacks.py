"""What a training run does beside training: random numbers that a resume repeats, and its history as a table."""

import math
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pandas as pd
import torch
from lightning import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from ...data.table import csv_of_frame, read_table, typed
from ...data.whole_file import write_whole
from ...errors import LongslideError
from ..batch.progress import duration
from ..log_file import event

HISTORY_COLUMNS = ["fold", "epoch", "step", "train_loss", "val_loss", "val_metric", "learning_rate"]


class StepSeed(Callback):
    """Seeds torch before every training batch by the seed, the epoch, the batch and the rank.

    Dropout is then a function of these alone: a run that was interrupted draws what it would have drawn, whatever else has
    asked for random numbers in between.

    Args:
        seed: The seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed torch, on all devices."""
        key = [self.seed, trainer.current_epoch, batch_idx, trainer.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


class History(Callback):
    """Writes `history.csv`, one row per epoch; a resumed run goes on after the epochs that its checkpoint knows.

    Args:
        path: The file.
        fold: The fold that is trained.
        name: What the training is called.
    """

    def __init__(self, path: Path, fold: int, name: str) -> None:
        self.path, self.fold, self.name = path, fold, name

    def on_train_start(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """Drop the rows of epochs that will be trained again."""
        if trainer.is_global_zero and self.path.is_file():
            rows = self._rows()
            rows = rows[(rows["fold"] != self.fold) | (rows["epoch"] < trainer.current_epoch)]
            if len(rows):
                self._write(rows)
            else:
                self.path.unlink()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """Add the row of the epoch."""
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        row: dict[str, Any] = {"fold": self.fold, "epoch": trainer.current_epoch, "step": trainer.global_step}
        for name in ("train_loss", "val_loss", "val_metric"):
            row[name] = float(metrics[name]) if name in metrics else None
        # The head is in the last group: with layer-wise decay the others have less.
        row["learning_rate"] = trainer.optimizers[0].param_groups[-1]["lr"]
        known = {name: value for name, value in row.items() if value is not None}
        values = ", ".join(f"{name} {value:.4g}" for name, value in known.items() if name not in ("fold", "epoch"))
        event("epoch", f"{self.name}, epoch {row['epoch']}: {values}", known)
        new = pd.DataFrame([row], columns=HISTORY_COLUMNS)
        self._write(pd.concat([self._rows(), new], ignore_index=True) if self.path.is_file() else new)

    def _rows(self) -> pd.DataFrame:
        return typed(read_table(self.path, ("", "nan")))

    def _write(self, rows: pd.DataFrame) -> None:
        write_whole(self.path, csv_of_frame(rows), "--run")


class EpochLines(Callback):
    """Says in a line how training goes, where no progress bar can be drawn: for an epoch each, at most one a second.

    Args:
        name: What is trained.
        metric: What `val_metric` is.
    """

    def __init__(self, name: str, metric: str) -> None:
        self.name = name
        self._words = {"val_metric": f"val_metric ({metric})"}
        self._line = ""
        self._began = self._said = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began, self._first_step = time.monotonic(), trainer.global_step

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """Say how the epoch was."""
        now, metrics = time.monotonic(), trainer.callback_metrics
        values = [
            f"{self._words.get(name, name)} {float(metrics[name]):.3g}" for name in HISTORY_COLUMNS if name in metrics
        ]
        best = next(callback for callback in trainer.callbacks if isinstance(callback, BestCheckpoint))  # type: ignore[attr-defined]
        if best.monitor is not None and best.monitor in metrics:
            # Its own turn comes after this one.
            scores = [float(metrics[best.monitor])]
            scores += [] if best.best_model_score is None else [float(best.best_model_score)]
            values.append(f"best {best.monitor} {(max if best.mode == 'max' else min)(scores):.3g}")
        rate = (trainer.global_step - self._first_step) / max(now - self._began, 1e-9)
        values.append(f"{rate:.3g} steps/s")
        left = trainer.estimated_stepping_batches - trainer.global_step
        if 0 < left < math.inf and rate:
            values.append(f"at most {duration(left / rate)} left")
        last = f"/{trainer.max_epochs - 1}" if trainer.max_epochs is not None and trainer.max_epochs > 0 else ""
        # From 0, as Lightning's bar, `history.csv` and checkpoints count, and as folds do.
        self._line = f"{self.name}, epoch {trainer.current_epoch}{last}: {', '.join(values)}"
        if not trainer.is_global_zero:
            self._line = ""
        elif now - self._said >= 1:
            self._say(now)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """Say how the last epoch was."""
        self._say(time.monotonic())

    def _say(self, now: float) -> None:
        if self._line:
            print(self._line, file=sys.stderr, flush=True)
        self._line, self._said = "", now


class BestCheckpoint(ModelCheckpoint):
    """`best.ckpt`; of models that are equally good by the metric, the one with the lower `val_loss`.

    On a small validation part many epochs have the same AUROC: the first of them is hardly trained.

    Args:
        monitor: What it is best by; None keeps the last one.
        **options: Options of `ModelCheckpoint`.
    """

    def __init__(self, monitor: str | None, **options: Any) -> None:
        super().__init__(filename="best", monitor=monitor, **options)
        self.best_loss = math.inf

    def check_monitor_top_k(self, trainer: lightning.Trainer, current: torch.Tensor | None = None) -> bool:
        """Whether the model is better than the best so far."""
        loss = float(trainer.callback_metrics.get("val_loss", math.inf))
        better = super().check_monitor_top_k(trainer, current)
        tied = current is not None and self.best_model_score is not None and bool(current == self.best_model_score)
        if better or (tied and loss < self.best_loss):
            self.best_loss = loss
            return True
        return False

    def state_dict(self) -> dict[str, Any]:
        """The state, for a resume."""
        return super().state_dict() | {"best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state."""
        self.best_loss = state_dict["best_loss"]
        super().load_state_dict(state_dict)


class DefinedMetric(Callback):
    """Stops a run that selects by a metric which is not a number, though the validation part as a whole defines it.

    Args:
        monitor: The metric it selects by.
    """

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """Look at the metric.

        Raises:
            LongslideError: It is NaN.
        """
        value = trainer.callback_metrics.get(self.monitor)
        if value is not None and bool(value.isnan()):
            raise LongslideError(
                f"{self.monitor} is not a number: drop --trainer.limit_val_batches, which may leave one class only, or "
                "lower --model.optimiser.learning_rate"
            )

"""Defaults train: an aggregator with nothing set learns what there is to learn from a small cohort."""

from copy import deepcopy

import lightning
import pytest
import torch
from longslide.models.classifier.classifier import SlideClassifier, TrainingFacts
from longslide.models.classifier.options import ClassifierOptions
from longslide.task import Task
from sklearn.metrics import cohen_kappa_score
from torch import Tensor
from torch.utils.data import DataLoader

DIM, TILES = 64, 60
SHIFTED = (0, 3, 6, 12)
"""Tiles of a bag that are shifted along one direction, by grade."""


def graded_bags(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, TILES, DIM, generator=generator)
    for i in range(count):
        features[i, : SHIFTED[i % 4]] += 0.5
    return {
        "tile_features": features.flatten(0, 1),
        "grid_cells": torch.stack([torch.arange(TILES) % 8, torch.arange(TILES) // 8], 1).repeat(count, 1),
        "cu_seqlens": TILES * torch.arange(count + 1, dtype=torch.int32),
        "index": torch.arange(count),
        "target": torch.arange(count) % 4,
    }


def bags_of(batch: dict[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
    tiles = (chosen[:, None] * TILES + torch.arange(TILES)).flatten()
    return {
        "tile_features": batch["tile_features"][tiles],
        "grid_cells": batch["grid_cells"][tiles],
        "cu_seqlens": TILES * torch.arange(len(chosen) + 1, dtype=torch.int32),
        "index": chosen,
        "target": batch["target"][chosen],
    }


class Best(lightning.Callback):
    """The weights of the epoch with the lowest validation loss, as `fit` keeps them."""

    loss = float("inf")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if (loss := float(trainer.callback_metrics["val_loss"])) < self.loss:
            self.loss, self.weights = loss, deepcopy(pl_module.state_dict())


def kappa(aggregator: str, seed: int) -> float:
    """Quadratic kappa of grades after training on 120 bags with nothing set."""
    train, val, test = (graded_bags(count, 10 * seed + part) for part, count in enumerate((120, 40, 400)))
    torch.manual_seed(seed)
    task = Task("ordinal", ("grade",), ("0", "1", "2", "3"))
    model = SlideClassifier(TrainingFacts(task, DIM), ClassifierOptions(aggregator))
    best = Best()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=14,
        gradient_clip_val=1.0,
        callbacks=[best],
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    steps = DataLoader(
        torch.arange(120), batch_size=8, shuffle=True, collate_fn=lambda rows: bags_of(train, torch.stack(rows))
    )
    trainer.fit(model, steps, DataLoader([val], batch_size=None))
    model.load_state_dict(best.weights)
    model.eval()
    with torch.no_grad():
        grades = model.predict(model.outputs_of(test))["prediction"]
    return float(cohen_kappa_score(test["target"], grades, weights="quadratic"))


@pytest.mark.slow
def test_attention_learns_grades_rather_than_the_bags_by_heart() -> None:
    # Less dropout and a lower learning rate give 0.75: the bags are known by heart before the grades are learnt.
    assert (kappa("abmil", 0) + kappa("abmil", 1)) / 2 > 0.78

"""Training on a GPU: no step waits for it, and its batches are those of the host."""

import math
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from longslide.bag_lengths import lengths_of
from longslide.data.cohort.augmentation import Augmentation
from longslide.data.cohort.datamodule import BagDataModule
from longslide.data.cohort.options import DataOptions
from longslide.data.features.feature_file import write_features
from longslide.data.features.features import Features
from longslide.errors import LongslideError
from longslide.models.aggregators.registry import AggregatorChoice
from longslide.models.aggregators.slide_encoder import use_cuda_graphs
from longslide.models.classifier.classifier import SlideClassifier
from longslide.models.classifier.options import ClassifierOptions
from longslide.pipeline.train.callbacks import StepSeed
from longslide.pipeline.train.training import facts_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SMALL = {"layers": 2, "width": 64, "heads": 4, "ffn_width": 128, "dilated_ratios": (1, 2, 4)}
AGGREGATORS = {
    "longnet": AggregatorChoice("longnet", SMALL | {"dropout": 0.1, "drop_path": 0.1}),
    "abmil": AggregatorChoice("abmil"),
    "transmil": AggregatorChoice("transmil", {"landmarks": 16}),
    "mean": AggregatorChoice("mean"),
}


def write_cohort(folder: Path, coords: np.ndarray | None = None) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = ["slide_id,patient_id,label,split"]
    for number in range(24):
        place = np.arange(60 + 3 * number)
        cells = np.stack([place % 8, place // 8], 1) if coords is None or number else coords
        features = rng.normal(size=(len(cells), 32)).astype(np.float16)
        write_features(folder / f"s{number}.h5", Features(f"s{number}", features, 512 * cells, step_level0=512))
        rows.append(f"s{number},p{number},{number % 2},train")
    (folder / "cohort.csv").write_text("\n".join(rows))


def opened(folder: Path, **options: Any) -> BagDataModule:
    return BagDataModule(DataOptions(folder, folder / "cohort.csv", "binary", "label", **options))


class Strict(lightning.Callback):
    """From the second epoch on whatever makes the host wait for the GPU is an error."""

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("error" if trainer.current_epoch else "default")

    def on_train_batch_end(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


def train(data: BagDataModule, aggregator: AggregatorChoice, *callbacks: Any, **options: Any) -> SlideClassifier:
    lightning.seed_everything(0, verbose=False)
    model = SlideClassifier(facts_of(data), ClassifierOptions(aggregator))
    use_cuda_graphs(model)
    quiet: dict[str, Any] = {
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
    }  # fmt: skip
    settings = {
        "accelerator": "gpu",
        "devices": 1,
        "precision": "bf16-mixed",
        "gradient_clip_val": 1.0,
        "max_epochs": 3,
    }
    trainer = lightning.Trainer(callbacks=[StepSeed(0), *callbacks], **quiet, **(settings | options))
    try:
        trainer.fit(model, datamodule=data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return model


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_no_step_waits_for_the_gpu(aggregator: str, tmp_path: Path) -> None:
    write_cohort(tmp_path / "c")
    model = train(opened(tmp_path / "c"), AGGREGATORS[aggregator], Strict())
    assert float(model.trainer.callback_metrics["train_loss"]) > 0


@pytest.mark.parametrize("precision", ["32", "16-mixed", "bf16-mixed"])
def test_gradients_are_clipped_in_every_precision_though_adamw_is_fused(precision: str, tmp_path: Path) -> None:
    write_cohort(tmp_path / "c")

    norms: list[float] = []

    class Norms(lightning.Callback):
        def on_before_zero_grad(self, trainer: Any, module: Any, optimiser: Any) -> None:
            assert optimiser.param_groups[0]["fused"]
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            if grads:
                norms.append(float(torch.nn.utils.get_total_norm(grads)))

    train(opened(tmp_path / "c"), AGGREGATORS["abmil"], Norms(), precision=precision, gradient_clip_val=1e-3)
    finite = [norm for norm in norms if math.isfinite(norm)]  # the first scales of float16 may be too large
    assert finite
    assert max(finite) <= 1.01e-3


@pytest.mark.parametrize(
    "options", [{"cache_gb": 0}, {"workers": 0}, {"workers": 3, "augment": Augmentation(0.2, True)}]
)
def test_batches_on_a_gpu_are_those_on_the_host(options: dict[str, Any], tmp_path: Path) -> None:
    write_cohort(tmp_path / "c")
    data = opened(tmp_path / "c", **options)
    data.setup()
    on_gpu = data.in_order("train", torch.device("cuda", 0))
    for _ in range(2):
        for wanted, found in zip(data.in_order("train"), on_gpu, strict=True):
            assert all(value.is_cuda for value in found.values())
            assert all(torch.equal(found[name].cpu(), wanted[name]) for name in wanted)
            assert lengths_of(found["cu_seqlens"]) == wanted["cu_seqlens"].diff().tolist()


def test_features_kept_and_features_read_anew_train_the_same_model(tmp_path: Path) -> None:
    write_cohort(tmp_path / "c")
    states = [
        train(opened(tmp_path / "c", **more), AGGREGATORS["longnet"]).state_dict() for more in ({}, {"cache_gb": 0})
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    write_cohort(tmp_path / "c")

    class Spoil(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            with torch.no_grad():
                module.head.weight.fill_(torch.nan)

    with pytest.raises(LongslideError, match="the loss is nan at step 1"):
        train(opened(tmp_path / "c"), AGGREGATORS["abmil"], Spoil())


def test_two_tiles_in_one_cell_end_the_run(tmp_path: Path) -> None:
    write_cohort(tmp_path / "c", coords=np.array([[1, 1], [1, 1], [2, 1]]))
    with pytest.raises(LongslideError, match="two tiles in one grid cell"):
        train(opened(tmp_path / "c"), AGGREGATORS["longnet"])

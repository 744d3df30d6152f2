"""Fine-tuning GigaPath's slide encoder on slides of 10,000 tiles: slides per second, GPU idle share, peak memory.

    python benchmarks/train.py [--slides 16] [--tiles 10000] [--max-tokens 20000 80000]

Feature files of random numbers are written, then read, packed and trained on as `longslide fit` does it, through
Lightning in mixed bfloat16, from random weights: they cost the same. Side by side: `training`, the last of three epochs,
with the files in the cache; `model`, the same steps on a batch that stays on the GPU. The GPU idles for the share of the
epochs' wall time in which no kernel runs, by the profiler.
"""

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from longslide.data.cohort.datamodule import BagDataModule
from longslide.data.cohort.options import DataOptions
from longslide.data.features.feature_file import Features, write_features
from longslide.models.aggregators.registry import AggregatorChoice
from longslide.models.classifier.classifier import SlideClassifier, TrainingFacts
from longslide.models.classifier.options import ClassifierOptions
from torch.profiler import ProfilerActivity, profile


def write_cohort(folder: Path, slides: int, tiles: int) -> None:
    rng = np.random.default_rng(0)
    index = np.arange(tiles)
    coords = 256 * np.stack([index % 128, index // 128], axis=1)
    rows = []
    for number in range(slides):
        features = rng.normal(size=(tiles, 1536)).astype(np.float16)
        file = Features(f"slide-{number}", features, coords, step_level0=256, tile_px=256, encoder="gigapath")
        write_features(folder / f"slide-{number}.h5", file)
        rows.append(f"slide-{number},patient-{number},{number % 2},train")
    (folder / "cohort.csv").write_text("slide_id,patient_id,label,split\n" + "\n".join(rows) + "\n")


class Epochs(lightning.Callback):
    """Wall seconds of each epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        torch.cuda.synchronize()
        self.started = time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=16)
    parser.add_argument("--tiles", type=int, default=10_000)
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[10_000, 40_000, 80_000])
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(
        f"gigapath, {torch.cuda.get_device_name()}, torch {torch.__version__}, bf16-mixed, {options.tiles:,} tiles per slide"
    )
    print(
        f"{'max tokens':>11} {'checkpointing':>14} {'training':>10} {'model':>10}  slides/s {'idle':>6} {'peak GiB':>9}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cohort(folder, options.slides, options.tiles)
        for max_tokens in options.max_tokens:
            for checkpointing in (False, True):
                print(row(folder, options, max_tokens, checkpointing), flush=True)


def row(folder: Path, options: argparse.Namespace, max_tokens: int, checkpointing: bool) -> str:
    table = folder / "cohort.csv"
    data = BagDataModule(
        DataOptions(folder, table, "binary", "label", max_tokens=max_tokens, workers=options.workers, cache_gb=8)
    )
    data.setup()
    model = SlideClassifier(
        TrainingFacts(data.task, data.feature_dim, preprocessing=data.preprocessing),
        ClassifierOptions(AggregatorChoice("gigapath", {"checkpointing": checkpointing}), checkpoint="random"),
    )
    epochs = Epochs()
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[epochs],
    )
    torch.cuda.reset_peak_memory_stats()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        trainer.fit(model, datamodule=data)
    peak = torch.cuda.max_memory_allocated() / 2**30
    busy = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6
    idle = 1 - busy / sum(epochs.seconds)
    training = options.slides / epochs.seconds[-1]

    model = model.cuda().train()
    batch = {name: value.cuda() for name, value in next(iter(data.train_dataloader())).items()}
    slides = len(batch["cu_seqlens"]) - 1

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            outputs = model(batch["tile_features"], batch["grid_cells"], batch["cu_seqlens"])
        outputs.float().square().sum().backward()

    step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    alone = 5 * slides / (time.perf_counter() - started)
    return f"{max_tokens:11,} {checkpointing!s:>14} {training:10.2f} {alone:10.2f} {idle:15.0%} {peak:9.1f}"


if __name__ == "__main__":
    main()

"""Training by the default loader beside the model alone: slides per second and the share of the time the GPU idles.

    python benchmarks/train.py [--rows gigapath abmil longnet] [--seconds 60] [--quick]

Feature files of random numbers are written, then read, packed and trained on as `longslide fit` does it, through Lightning
in mixed bfloat16, from random weights: they cost the same. A row has

- `alone`: forward and backward of one batch that stays on the GPU, over and over: what the model itself can do;
- `training`: all of `fit`'s steps with the default data options, after the first epoch, which makes CUDA graphs and fills
  what is kept in memory;
- `idle`: the share of training's wall time in which no kernel runs, by the profiler, in a few seconds of its own;
- `host`: milliseconds of a step in which the host is busy until the step's last launch.

Measured on one H100 (torch 2.11), when worker processes put batches together, each step waited for the GPU ten times and
packed bags were launched kernel by kernel: `gigapath` 25.1 slides/s of 34.9, idle 32%; `abmil` 65.5 of 739, idle 97%;
`longnet` 22.9 steps/s, idle 89%. Since then: `gigapath` 33.8 of 35.2, idle 4%; `abmil` 381 of 650, idle 86%; `longnet` 165.7
steps/s, idle 46% (15 seconds).

Rows: `gigapath` fine-tunes GigaPath's slide encoder on slides of 10,000 tiles, `abmil` trains gated attention on the same,
`longnet` four layers of LongNet on 32 bags of 500 tiles a step.
"""

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from longslide.data.cohort.datamodule import BagDataModule
from longslide.data.cohort.options import DataOptions
from longslide.data.features.feature_file import write_features
from longslide.data.features.features import Features
from longslide.models.aggregators.registry import AggregatorChoice
from longslide.models.aggregators.slide_encoder import use_cuda_graphs
from longslide.models.classifier.classifier import SlideClassifier, TrainingFacts
from longslide.models.classifier.options import ClassifierOptions
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile


class Row(NamedTuple):
    """What is trained, and on what."""

    aggregator: str
    slides: int
    tiles: int
    bags_per_step: int
    checkpoint: str | None = None


ROWS = {
    "gigapath": Row("gigapath", 64, 10_000, 8, "random"),
    "abmil": Row("abmil", 64, 10_000, 8),
    "longnet": Row("longnet", 512, 500, 32),
}


def write_cohort(folder: Path, slides: int, tiles: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    index = np.arange(tiles)
    coords = 256 * np.stack([index % 128, index // 128], axis=1)
    drawn = rng.standard_normal((tiles + slides, 1536), np.float32).astype(np.float16)
    rows = []
    for number in range(slides):
        file = Features(
            f"slide-{number}", drawn[number : number + tiles], coords, step_level0=256, tile_px=256, encoder="gigapath"
        )
        write_features(folder / f"slide-{number}.h5", file)
        rows.append(f"slide-{number},patient-{number},{number % 2},train")
    (folder / "cohort.csv").write_text("slide_id,patient_id,label,split\n" + "\n".join(rows) + "\n")


class Watch(lightning.Callback):
    """Times the steps after the first epoch; the GPU is waited for at the two ends only. Then the profiler's seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.steps = self.bags = 0
        self.wall = self.host = 0.0
        self.profiler: profile | None = None
        self.profiled = 0.0
        self.started: float | None = None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
        if trainer.current_epoch and self.started is None:
            torch.cuda.synchronize()
            self.started = time.perf_counter()
            self.ends = self.started + self.seconds
        self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
        if self.started is None:
            return
        now = time.perf_counter()
        if self.profiler is None:
            self.host += now - self.begun
            self.steps += 1
            self.bags += len(batch["index"])
            if now > self.ends:
                torch.cuda.synchronize()
                self.wall = time.perf_counter() - self.started
                self.profiler = profile(activities=[ProfilerActivity.CUDA])
                self.profiler.start()
                self.ends = time.perf_counter() + min(3.0, self.seconds)
                self.profiling = time.perf_counter()
        elif now > self.ends and not trainer.should_stop:
            torch.cuda.synchronize()
            self.profiled = time.perf_counter() - self.profiling
            self.profiler.stop()
            trainer.should_stop = True

    @property
    def idle(self) -> float:
        assert self.profiler is not None
        kernels = [
            event for event in self.profiler.events()  # type: ignore[no-untyped-call]
 if event.device_type == DeviceType.CUDA
            and not event.name.startswith(("Memcpy", "Memset"))
        ]  # fmt: skip
        busy, end = 0.0, 0.0
        for start, stop in sorted((event.time_range.start, event.time_range.end) for event in kernels):
            busy += max(0.0, stop - max(start, end))
            end = max(end, stop)
        return 1 - busy / 1e6 / self.profiled


def measure(name: str, row: Row, folder: Path, seconds: float) -> str:
    data = BagDataModule(DataOptions(folder, folder / "cohort.csv", "binary", "label", bags_per_step=row.bags_per_step))
    data.setup()
    model = SlideClassifier(
        TrainingFacts(data.task, data.feature_dim, preprocessing=data.preprocessing),
        ClassifierOptions(AggregatorChoice(row.aggregator), checkpoint=row.checkpoint),
    )
    use_cuda_graphs(model)
    watch = Watch(seconds)
    trainer = lightning.Trainer(
        max_epochs=100_000,
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[watch],
    )
    torch.cuda.reset_peak_memory_stats()
    trainer.fit(model, datamodule=data)
    peak = torch.cuda.max_memory_allocated() / 2**30

    model = model.cuda().train()
    batch = {name: value.cuda() for name, value in next(iter(data.train_dataloader())).items()}
    slides = len(batch["cu_seqlens"]) - 1

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            outputs = model(batch["tile_features"], batch["grid_cells"], batch["cu_seqlens"])
        outputs.float().square().sum().backward()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    steps = 0
    while time.perf_counter() - started < min(seconds, 10):
        for _ in range(5):
            step()
        torch.cuda.synchronize()
        steps += 5
    alone = steps * slides / (time.perf_counter() - started)
    training = watch.bags / watch.wall
    return (
        f"{name:>9} {row.tiles:7,} {watch.bags / watch.steps:9.1f} {training:9.1f} {watch.steps / watch.wall:8.1f} "
        f"{alone:9.1f} {training / alone:6.0%} {watch.idle:6.0%} {1000 * watch.host / watch.steps:8.2f} {peak:9.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--quick", action="store_true", help="ten seconds a row")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16-mixed")
    print(
        f"{'':>9} {'tiles':>7} {'bags/step':>9} {'slides/s':>9} {'steps/s':>8} {'alone':>9} {'share':>6} {'idle':>6} "
        f"{'host ms':>8} {'peak GiB':>9}"
    )
    with tempfile.TemporaryDirectory() as name:
        for row in options.rows:
            folder = Path(name) / f"{ROWS[row].slides}-{ROWS[row].tiles}"
            if not folder.exists():
                write_cohort(folder, ROWS[row].slides, ROWS[row].tiles)
            print(measure(row, ROWS[row], folder, 10 if options.quick else options.seconds), flush=True)


if __name__ == "__main__":
    main()

"""Slides per second when GigaPath's slide encoder is fine-tuned, the share of time the GPU waits, and peak memory.

    python benchmarks/train.py [--slides 64] [--tiles 10000] [--batch 1 4] [--checkpointing]

Random weights and random features: they cost the same. It is `longslide fit` itself with the `gigapath` recipe; the GPU
waits from the end of a step (synchronised) to the start of the next one.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pandas as pd
import torch
import yaml
from longslide.data.features import Features, write_features
from longslide.pipeline.cli import main as longslide


class StepTimer(lightning.Callback):
    """Times the steps of the second epoch and writes `slides,seconds,waiting,peak_gb` to a file."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.slides, self.waiting, self.began, self.ended = 0, 0.0, 0.0, 0.0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """A batch is there."""
        if trainer.current_epoch == 1:
            if batch_idx == 0:
                self.began = self.ended = time.perf_counter()
            self.waiting += time.perf_counter() - self.ended

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step is done."""
        if trainer.current_epoch == 1:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ended = time.perf_counter()
            self.slides += len(batch["cu_seqlens"]) - 1

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        """Write what was measured."""
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        self.file.write_text(f"{self.slides},{self.ended - self.began},{self.waiting},{peak}")


def write_slides(folder: Path, slides: int, tiles: int) -> None:
    """Write `features/` and `cohort.csv`: all slides but four are for training."""
    (folder / "features").mkdir(parents=True)
    rng = np.random.default_rng(0)
    side = int(np.ceil(np.sqrt(tiles)))
    coords = 256 * np.stack([np.arange(tiles) % side, np.arange(tiles) // side], 1)
    for i in range(slides):
        features = rng.standard_normal((tiles, 1536), dtype=np.float32).astype(np.float16)
        write_features(
            folder / "features" / f"slide{i}.h5",
            Features(slide_id=f"slide{i}", features=features, coords=coords, step_level0=256, encoder="gigapath"),
        )
    parts = ["val"] * 4 + ["train"] * (slides - 4)
    table = {"slide_id": [f"slide{i}" for i in range(slides)], "label": np.arange(slides) % 2, "split": parts}
    pd.DataFrame(table).to_csv(folder / "cohort.csv", index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=64)
    parser.add_argument("--tiles", type=int, default=10_000)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="Slides a batch.")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--encoder", default="gigapath")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--checkpointing", action="store_true")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    write_slides(work, arguments.slides, arguments.tiles)
    lines = []
    for batch in arguments.batch:
        timer = {"class_path": "train.StepTimer", "init_args": {"file": f"{work}/times{batch}.csv"}}
        (work / "timer.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [timer]}}))
        words = ["--config", "gigapath", "--config", f"{work}/timer.yaml", "--run", f"{work}/run{batch}"]
        words += ["--data.table", f"{work}/cohort.csv", "--data.features", f"{work}/features", "--data.task", "binary"]
        words += ["--data.max_bags", str(batch), "--data.max_tokens", "null", "--data.workers", str(arguments.workers)]
        words += ["--model.checkpoint", "random", "--model.gigapath.slide_encoder", arguments.encoder]
        words += ["--model.gigapath.checkpointing", str(arguments.checkpointing).lower()]
        words += ["--trainer.precision", arguments.precision, "--trainer.enable_progress_bar", "false"]
        words += ["--trainer.max_epochs", "2", "--trainer.accumulate_grad_batches", "1"]
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if longslide(["fit", *words]):
            raise SystemExit(1)
        slides, seconds, waiting, peak = map(float, (work / f"times{batch}.csv").read_text().split(","))
        lines.append(f"{batch:15} {slides / seconds:10.2f} {waiting / seconds:11.1%} {peak:11.1f}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{arguments.encoder}, {arguments.tiles:,} tiles a slide, {arguments.precision}, {device}")
    print("slides a batch  slides / s  GPU waiting  peak GiB")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""Labels that say nothing: is the test AUROC of real networks 0.5 on average, and do the intervals say so?

Each seed draws a cohort with new features, whose labels are permuted, and trains as `longslide fit` and `longslide crossval`
do. The mean AUROC must be 0.5 within its error, and 5% of the intervals may leave 0.5 out; the last columns are the
share that does and its binomial 95% range for a share of 0.05.

    python benchmarks/permuted.py --seeds 20 --jobs 2
    python benchmarks/permuted.py --seeds 20 --commands crossval --aggregators abmil
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from digits import write_tiles  # type: ignore[import-not-found]
from longslide.pipeline.cli import main as longslide
from scipy.stats import binom

AGGREGATORS = {
    "longnet": [
        *("--model.aggregator", "longnet", "--model.aggregator.layers", "2", "--model.aggregator.width", "64"),
        *("--model.aggregator.heads", "4", "--model.aggregator.ffn_width", "128"),
    ],
    "abmil": ["--model.aggregator", "abmil", "--model.aggregator.width", "64"],
}


def write_cohort(folder: Path, seed: int, patients: int = 80, tiles: int = 40, dim: int = 32) -> None:
    """Write `features/` and `cohort.csv`: bags that differ from patient to patient, and labels that do not know of it."""
    random = np.random.default_rng(seed)
    (folder / "features").mkdir(parents=True)
    side = int(np.ceil(np.sqrt(tiles)))
    cells = np.stack([np.arange(tiles) % side, np.arange(tiles) // side], 1)
    for patient in range(patients):
        embeddings = random.normal(size=dim) + random.normal(size=(tiles, dim))
        write_tiles(folder / "features" / f"s{patient}.h5", embeddings, cells)
    labels = random.permutation(np.array(["no", "yes"])[np.arange(patients) % 2])
    ids = [f"s{patient}" for patient in range(patients)]
    pd.DataFrame({"slide_id": ids, "patient_id": ids, "label": labels}).to_csv(folder / "cohort.csv", index=False)


def auroc_of(folder: Path, command: str, aggregator: str, seed: int, min_steps: int) -> tuple[float, float, float]:
    """AUROC of the test patients, the mean over folds of a cross-validation, and the ends of its interval."""
    torch.set_num_threads(1)
    if not folder.exists():
        write_cohort(folder, seed)
    run = folder / f"{command}-{aggregator}"
    words = [command, "--data.task", "binary", "--data.table", f"{folder}/cohort.csv", "--run", str(run)]
    words += ["--data.features", f"{folder}/features", "--data.workers", "0", "--min-steps", str(min_steps)]
    words += ["--epochs", "5", "--seed", str(seed), "--data.seed", str(seed), *AGGREGATORS[aggregator]]
    words += ["--folds", "4"] if command == "crossval" else ["--data.test_share", "0.4"]
    words += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        if longslide(words):
            raise RuntimeError(output.getvalue())
    metrics = pd.read_csv(run / "metrics.csv")
    rows = metrics[(metrics["metric"] == "auroc") & (metrics["level"] == "patient")].set_index("scope")
    scope = "mean" if command == "crossval" else "fold_0"
    value, low, high = rows.loc[[scope], ["value", "low", "high"]].to_numpy(float)[0].tolist()
    return value, low, high


def main() -> None:
    """Train everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--min-steps", type=int, default=200)
    parser.add_argument("--aggregators", nargs="+", default=list(AGGREGATORS))
    parser.add_argument("--commands", nargs="+", default=["fit", "crossval"])
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    print(f"{'command':10} {'aggregator':10} {'AUROC':>7} {'error':>7} {'excluded':>9}  range of a share of 0.05")
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for command in arguments.commands:
            for aggregator in arguments.aggregators:
                folders = [work / f"{command}-{aggregator}-{seed}" for seed in range(arguments.seeds)]
                jobs = [
                    pool.submit(auroc_of, folder, command, aggregator, seed, arguments.min_steps)
                    for seed, folder in enumerate(folders)
                ]
                value, low, high = np.array([job.result() for job in jobs]).T
                excluded = ((low > 0.5) | (high < 0.5)).mean()
                ends = binom.ppf([0.025, 0.975], len(value), 0.05) / len(value)
                error = value.std(ddof=1) / np.sqrt(len(value)) if len(value) > 1 else np.nan
                print(
                    f"{command:10} {aggregator:10} {value.mean():7.3f} {error:7.3f} {excluded:9.2f}  "
                    f"{ends[0]:.2f} to {ends[1]:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

"""Do the recipes train? Each beside a reference in plain PyTorch, tuned on the validation part, over several seeds.

The reference is gated attention (https://arxiv.org/abs/1802.04712) trained by a loop of 40 lines: 8 bags per step, learning
rates tried from 1e-4 to 3e-3, the epoch and the rate with the lowest validation loss. A recipe gets no such choice: it runs
with its own defaults.

- `needle-<tiles>`: bags of Gaussian tiles; in the positive ones 10% are shifted along one direction. 140 bags train.
- `digits`: bags of scikit-learn's digits, with a 9 among them or without (`digits.py`).
- `regression`: the target is the share of shifted tiles (R2). `ordinal`: four grades of that share (quadratic kappa).

    python benchmarks/recipes.py --jobs 12                # on a GPU, minutes
    python benchmarks/recipes.py --tasks needle-27 --seeds 1 --jobs 2
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from digits import write_bags, write_tiles  # type: ignore[import-not-found]
from longslide.data.features.feature_file import read_features
from longslide.pipeline.cli import main as longslide
from scipy.stats import t as student
from sklearn.metrics import cohen_kappa_score, r2_score, roc_auc_score
from torch import nn

RECIPES = {
    "binary": ["binary", "abmil", "transmil", "mean"],
    "regression": ["regression", "regression+abmil"],
    "ordinal": ["ordinal", "ordinal+abmil"],
}
"""Recipes of each kind of task; `+abmil` switches the aggregator and nothing else."""

KINDS = {
    "needle-27": "binary",
    "needle-500": "binary",
    "needle-5000": "binary",
    "digits": "binary",
    "regression": "regression",
    "ordinal": "ordinal",
}
METRICS = {"binary": "auroc", "regression": "r2", "ordinal": "quadratic_kappa"}
DIM = 64
PARTS = {"train": 140, "val": 60, "test": 300}


def write_cohort(folder: Path, name: str, seed: int) -> None:
    """Write `features/` and `cohort.csv` of a task."""
    if name == "digits":
        bags = sum(PARTS.values())
        write_bags(folder, "contains", bags, nines=0.05, train_share=140 / bags, val_share=60 / bags, seed=seed)
        return
    rng = np.random.default_rng([seed, len(name)])
    direction = np.random.default_rng(0).normal(size=DIM)
    direction /= np.linalg.norm(direction)
    tiles = int(name.split("-")[1]) if "-" in name else 200
    shift = {27: 4.0, 500: 3.0, 5000: 3.0}.get(tiles, 3.0)
    (folder / "features").mkdir(parents=True)
    rows = []
    for part, count in PARTS.items():
        for number in range(count):
            if KINDS[name] == "binary":
                label, share = ("yes", 0.1) if number % 2 else ("no", 0.0)
            elif KINDS[name] == "ordinal":
                label, share = str(number % 4), (0.0, 0.05, 0.1, 0.2)[number % 4]
            else:
                share = float(rng.uniform(0, 0.4))
                label = f"{share:.6f}"
            embeddings = rng.normal(size=(tiles, DIM))
            embeddings[rng.random(tiles) < share] += shift * direction
            if KINDS[name] == "binary" and share:  # at least one
                embeddings[rng.integers(tiles)] += shift * direction
            side = int(np.ceil(np.sqrt(tiles)))
            cells = np.stack([np.arange(tiles) % side, np.arange(tiles) // side], 1)
            write_tiles(folder / "features" / f"{part}{number}.h5", embeddings, cells)
            rows.append({"slide_id": f"{part}{number}", "label": label, "split": part})
    pd.DataFrame(rows).to_csv(folder / "cohort.csv", index=False)


class Reference(nn.Module):
    """Gated attention over bags of one length `(B, N, D)` or a list of bags."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(DIM, 256), nn.ReLU(), nn.Dropout(0.25))
        self.value, self.gate, self.score = nn.Linear(256, 128), nn.Linear(256, 128), nn.Linear(128, 1)
        self.head = nn.Linear(256, outputs)

    def forward(self, bags: list[torch.Tensor]) -> torch.Tensor:
        vectors = []
        for bag in bags:
            hidden = self.project(bag)
            weight = self.score(self.value(hidden).tanh() * self.gate(hidden).sigmoid()).softmax(0)
            vectors.append((weight * hidden).sum(0))
        predicted: torch.Tensor = self.head(torch.stack(vectors))
        return predicted


def train_reference(folder: Path, kind: str, seed: int, device: str, epochs: int = 60) -> float:
    """The metric of the test part, by the learning rate and epoch with the lowest validation loss."""
    table = pd.read_csv(folder / "cohort.csv")
    classes = sorted(table["label"].unique().tolist()) if kind != "regression" else []
    target = torch.tensor([classes.index(label) if classes else label for label in table["label"]], device=device)
    bags = [torch.from_numpy(read_features(folder / "features" / f"{slide}.h5").features).to(device).float()
            for slide in table["slide_id"]]  # fmt: skip
    index = {part: np.flatnonzero(table["split"] == part) for part in PARTS}
    mean, std = (float(target[index["train"]].float().mean()), float(target[index["train"]].float().std()))

    def loss_of(model: nn.Module, rows: np.ndarray) -> torch.Tensor:
        outputs = model([bags[row] for row in rows])
        if classes:
            return nn.functional.cross_entropy(outputs, target[rows])
        return nn.functional.mse_loss(outputs[:, 0], (target[rows].float() - mean) / std)

    best = (np.inf, np.zeros(0))
    for rate in (1e-4, 3e-4, 1e-3, 3e-3):
        torch.manual_seed(seed)
        model = Reference(max(1, len(classes))).to(device)
        optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
        for _ in range(epochs):
            model.train()
            for rows in np.array_split(np.random.default_rng([seed, _]).permutation(index["train"]), 140 // 8):
                optimiser.zero_grad()
                torch.autograd.backward(loss_of(model, rows))
                optimiser.step()
            model.eval()
            with torch.no_grad():
                loss = float(loss_of(model, index["val"]))
                if loss < best[0]:
                    best = (loss, model([bags[row] for row in index["test"]]).float().cpu().numpy())
    truth, outputs = target[index["test"]].cpu().numpy(), best[1]
    if kind == "binary":
        return float(roc_auc_score(truth, outputs[:, 1] - outputs[:, 0]))
    if kind == "ordinal":
        return float(cohen_kappa_score(truth, outputs.argmax(1), weights="quadratic"))
    return float(r2_score(truth, outputs[:, 0] * std + mean))


def train_recipe(folder: Path, kind: str, recipe: str, seed: int, run: Path, device: str) -> float:
    """The same metric by `longslide fit --config <recipe>` with nothing but what names the data."""
    name, _, aggregator = recipe.partition("+")
    words = ["fit", "--config", name, "--data.task", kind, "--data.label", "label", "--run", str(run)]
    words += ["--data.table", f"{folder}/cohort.csv", "--data.features", f"{folder}/features"]
    words += ["--data.workers", "0", "--seed", str(seed), "--trainer.enable_progress_bar", "false"]
    words += ["--trainer.accelerator", device.replace("cuda", "gpu")]
    words += ["--model.aggregator", aggregator] if aggregator else []
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            status: object = longslide(words)
        except SystemExit as end:  # of a wrong word
            status = end.code
    if status:
        raise RuntimeError(output.getvalue())
    metrics = pd.read_csv(run / "metrics.csv")
    chosen = metrics[(metrics["metric"] == METRICS[kind]) & (metrics["level"] == "patient")]
    return float(chosen["value"].iloc[0])


def one(work: Path, task: str, recipe: str, seed: int, device: str) -> tuple[str, str, int, float, float]:
    """A cell of the table: task, recipe (`reference` too), seed, metric, seconds."""
    torch.set_num_threads(1)
    started, folder = time.monotonic(), work / f"{task}-{seed}"
    if recipe == "reference":
        value = train_reference(folder, KINDS[task], seed, device)
    else:
        value = train_recipe(folder, KINDS[task], recipe, seed, work / "runs" / f"{task}-{recipe}-{seed}", device)
    return task, recipe, seed, value, time.monotonic() - started


def main() -> None:
    """Train everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(KINDS))
    parser.add_argument("--recipes", nargs="+", default=None, help="Default: all that fit the task.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 5), help="Processes on the CPU.")
    parser.add_argument("--gpu-jobs", type=int, default=4, help="Processes on the GPU, for what is slow on a core.")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(arguments.jobs, mp_context=context) as cpu,
        ProcessPoolExecutor(arguments.gpu_jobs, mp_context=context) as gpu,
    ):
        cells = [(task, seed) for task in arguments.tasks for seed in range(arguments.seeds)]
        list(cpu.map(write_cohort, [work / f"{task}-{seed}" for task, seed in cells], *zip(*cells, strict=True)))
        jobs = []
        for task, seed in sorted(cells, reverse=True):  # the largest bags first
            for recipe in ["reference", *(arguments.recipes or RECIPES[KINDS[task]])]:
                slow = task in ("needle-500", "needle-5000") or recipe in (
                    "binary",
                    "regression",
                    "ordinal",
                    "transmil",
                )
                pool, device = (gpu, "cuda") if slow and torch.cuda.is_available() else (cpu, "cpu")
                jobs.append(pool.submit(one, work, task, recipe, seed, device))
        done = []
        for job in as_completed(jobs):
            try:
                done.append(job.result())
                print(*done[-1], flush=True)
            except RuntimeError as error:
                print(error, flush=True)
    table = pd.DataFrame(done, columns=["task", "recipe", "seed", "value", "seconds"])
    print(
        f"\n{'task':12} {'metric':16} {'recipe':18} {'mean':>6} {'seconds':>8}  difference to the reference, 95% interval"
    )
    for (task, recipe), rows in table.groupby(["task", "recipe"]):
        reference = table[(table["task"] == task) & (table["recipe"] == "reference")].set_index("seed")["value"]
        difference = (rows.set_index("seed")["value"] - reference).to_numpy()
        half = student.ppf(0.975, max(1, len(difference) - 1)) * difference.std(ddof=1) / np.sqrt(len(difference))
        print(
            f"{task:12} {METRICS[KINDS[str(task)]]:16} {recipe:18} {rows['value'].mean():6.3f} {rows['seconds'].mean():8.0f}"
            f"  {difference.mean():+.3f} ({difference.mean() - half:+.3f} to {difference.mean() + half:+.3f})"
        )


if __name__ == "__main__":
    main()

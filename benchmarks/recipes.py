"""Do the recipes train? Each beside a tuned reference of its own architecture in plain PyTorch, over several seeds.

A reference is a loop of 40 lines: 8 bags per step, AdamW at a constant learning rate, and of several rates and all epochs
the ones with the lowest validation loss. Attention (https://arxiv.org/abs/1802.04712) and mean pooling are written here;
LongNet and TransMIL are the modules of the package in that same loop. A recipe gets no such choice: it runs with nothing
but what names the data.

- `needle-<tiles>`: bags of Gaussian tiles, each bag somewhat shifted as by its stain; in the positive ones 10% of the tiles
  are shifted along one direction. 140 bags train.
- `digits`: bags of scikit-learn's digits, with a 9 among them or without (`digits.py`).
- `regression`: the target is the share of shifted tiles (R2). `ordinal`: four grades of that share (quadratic kappa).

    python benchmarks/recipes.py                      # on a GPU with 16 cores: 20 minutes
    python benchmarks/recipes.py --tasks needle-27 --seeds 1 --jobs 2 --recipes abmil mean abmil@1e-3
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from copy import deepcopy
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from digits import write_bags, write_tiles  # type: ignore[import-not-found]
from longslide.data.features.feature_file import read_features
from longslide.models.aggregators.base import create_aggregator
from longslide.models.aggregators.registry import AggregatorChoice
from longslide.pipeline.cli import main as longslide
from scipy.stats import t as student
from sklearn.metrics import cohen_kappa_score, r2_score, roc_auc_score
from torch import Tensor, nn

RECIPES = ("longnet", "abmil", "mean", "transmil", "longnet+abmil")
"""`longnet` is the recipe of the task's name, `binary` and so on. `+abmil` switches its aggregator and nothing else, `@1e-3`
the learning rate."""

KINDS = {
    "needle-27": "binary",
    "needle-500": "binary",
    "needle-5000": "binary",
    "digits": "binary",
    "regression": "regression",
    "ordinal": "ordinal",
}
SHIFTS = {"needle-27": 4.0, "needle-500": 2.5, "needle-5000": 2.5, "regression": 3.0, "ordinal": 3.0}
METRICS = {"binary": "auroc", "regression": "r2", "ordinal": "quadratic_kappa"}
DIM = 64
PARTS = {"train": 140, "val": 60, "test": 300}
RATES = {
    "longnet": (1e-4, 3e-4, 1e-3),
    "transmil": (1e-4, 3e-4, 1e-3),
    "abmil": (3e-4, 1e-3, 3e-3),
    "mean": (3e-4, 1e-3, 3e-3),
}
"""Learning rates that are tried for the reference of an architecture."""

LONGNET = AggregatorChoice("longnet", {"layers": 4, "width": 256, "heads": 8, "ffn_width": 1024})


def architecture(recipe: str) -> str:
    """What a recipe trains: `longnet`, `abmil`, `mean` or `transmil`."""
    return recipe.partition("@")[0].rpartition("+")[2]


def write_cohort(folder: Path, name: str, seed: int) -> None:
    """Write `features/` and `cohort.csv` of a task."""
    if name == "digits":
        bags = sum(PARTS.values())
        write_bags(folder, "contains", bags, nines=0.05, train_share=140 / bags, val_share=60 / bags, seed=seed)
        return
    rng = np.random.default_rng([seed, len(name)])
    direction = np.random.default_rng(0).normal(size=DIM)
    direction *= SHIFTS[name] / np.linalg.norm(direction)
    tiles = int(name.partition("-")[2] or 200)
    cells = np.stack(np.divmod(np.arange(tiles), int(np.ceil(np.sqrt(tiles))))[::-1], 1)
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
            shifted = rng.random(tiles) < share
            shifted[rng.integers(tiles)] |= KINDS[name] == "binary" and share > 0  # at least one
            embeddings[shifted] += direction
            embeddings += 0.25 * rng.normal(size=DIM) * (KINDS[name] == "binary")
            write_tiles(folder / "features" / f"{part}{number}.h5", embeddings, cells)
            rows.append({"slide_id": f"{part}{number}", "label": label, "split": part})
    pd.DataFrame(rows).to_csv(folder / "cohort.csv", index=False)


class Pool(nn.Module):
    """Mean pooling of bags, or gated attention."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.width, self.attention = 256, attention
        self.project = nn.Sequential(nn.Linear(DIM, 256), nn.ReLU(), nn.Dropout(0.25))
        self.value, self.gate, self.score = nn.Linear(256, 128), nn.Linear(256, 128), nn.Linear(128, 1)

    def forward(self, tiles: Tensor, cells: Tensor, ends: Tensor) -> Tensor:
        hidden = self.project(tiles)
        score = self.score(self.value(hidden).tanh() * self.gate(hidden).sigmoid()) * float(self.attention)
        bags = zip(hidden.split(ends.diff().tolist()), score.split(ends.diff().tolist()), strict=True)
        return torch.stack([(one.softmax(0) * bag).sum(0) for bag, one in bags])


def train_reference(folder: Path, kind: str, name: str, rate: float, seed: int, device: str) -> tuple[float, float]:
    """The lowest validation loss at a learning rate, and the metric of the test part then."""
    table = pd.read_csv(folder / "cohort.csv")
    classes = sorted(table["label"].unique().tolist()) if kind != "regression" else []
    labels = [classes.index(label) if classes else label for label in table["label"]]
    index = {part: np.flatnonzero(table["split"] == part) for part in PARTS}
    files = [read_features(folder / "features" / f"{slide}.h5") for slide in table["slide_id"]]
    features = [torch.from_numpy(file.features).float().to(device) for file in files]
    cells = [torch.from_numpy(file.coords // 256).to(device) for file in files]
    truth = torch.tensor(labels, device=device)
    mean, std = (float(f(truth[index["train"]].double())) for f in (torch.mean, torch.std))
    torch.manual_seed(seed)
    own = name in ("abmil", "mean")
    pool = Pool(name == "abmil") if own else create_aggregator(LONGNET if name == "longnet" else name, None, DIM, None)
    model = nn.ModuleDict({"pool": pool, "head": nn.Linear(pool.width, max(1, len(classes)))}).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)

    def outputs(rows: np.ndarray) -> Tensor:
        ends = torch.tensor([0, *np.cumsum([len(features[row]) for row in rows])], dtype=torch.int32, device=device)
        pooled = model["pool"](torch.cat([features[i] for i in rows]), torch.cat([cells[i] for i in rows]), ends)
        return model["head"](pooled)  # type: ignore[no-any-return]

    def loss_of(rows: np.ndarray) -> Tensor:
        if classes:
            return nn.functional.cross_entropy(outputs(rows), truth[rows])
        return nn.functional.mse_loss(outputs(rows)[:, 0], (truth[rows].float() - mean) / std)

    best, weights, since = np.inf, model.state_dict(), 0
    for epoch in range(60):
        if since == 15:  # epochs without a better one
            break
        model.train()
        for rows in np.array_split(
            np.random.default_rng([seed, epoch]).permutation(index["train"]), len(index["train"]) // 8
        ):
            optimiser.zero_grad()
            torch.autograd.backward(loss_of(rows))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
        model.eval()
        with torch.no_grad():
            loss = float(torch.stack([loss_of(rows) for rows in np.array_split(index["val"], 6)]).mean())
        best, weights, since = (loss, deepcopy(model.state_dict()), 0) if loss < best else (best, weights, since + 1)
    model.load_state_dict(weights)
    with torch.no_grad():
        given = torch.cat([outputs(rows) for rows in np.array_split(index["test"], 30)]).double().cpu().numpy()
    return best, score(kind, truth[index["test"]].cpu().numpy(), given, mean, std)


def score(kind: str, truth: np.ndarray, outputs: np.ndarray, mean: float, std: float) -> float:
    """The metric of a kind of task."""
    if kind == "binary":
        return float(roc_auc_score(truth, outputs[:, 1] - outputs[:, 0]))
    if kind == "ordinal":
        return float(cohen_kappa_score(truth, outputs.argmax(1), weights="quadratic"))
    return float(r2_score(truth, outputs[:, 0] * std + mean))


def train_recipe(folder: Path, kind: str, recipe: str, seed: int, run: Path, device: str) -> float:
    """The same metric by `longslide fit --config <recipe>` with nothing but what names the data."""
    name, _, rate = recipe.partition("@")
    name, _, aggregator = name.partition("+")
    config = kind if name == "longnet" else name
    words = ["fit", "--config", config, "--data.task", kind, "--data.label", "label", "--run", str(run)]
    words += ["--data.table", f"{folder}/cohort.csv", "--data.features", f"{folder}/features"]
    words += ["--data.workers", "0", "--seed", str(seed), "--trainer.enable_progress_bar", "false"]
    words += ["--trainer.accelerator", device.replace("cuda", "gpu")]
    words += ["--model.aggregator", aggregator] if aggregator else []
    words += ["--model.optimiser.learning_rate", rate] if rate else []
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


Result = tuple[str, str, float, int, float, float, float]
COLUMNS = ["task", "recipe", "rate", "seed", "value", "loss", "seconds"]


def one(work: Path, task: str, recipe: str, rate: float, seed: int, device: str) -> Result:
    """Task, recipe (`reference <architecture>` too), learning rate, seed, metric, validation loss, seconds."""
    torch.set_num_threads(1)
    started, folder, loss = time.monotonic(), work / f"{task}-{seed}", np.nan
    word, _, name = recipe.partition(" ")
    if word == "reference":
        loss, value = train_reference(folder, KINDS[task], name, rate, seed, device)
    else:
        value = train_recipe(folder, KINDS[task], recipe, seed, work / "runs" / f"{task}-{recipe}-{seed}", device)
    return task, recipe, rate, seed, value, loss, time.monotonic() - started


def tabulate(done: list[Result]) -> None:
    """Print a row for each recipe and reference: mean, seconds, and the difference to the reference of its architecture."""
    table = pd.DataFrame(done, columns=COLUMNS)
    tuned = table[table["recipe"].str.startswith("reference")].sort_values("loss")
    tuned = tuned.drop_duplicates(["task", "recipe", "seed"]).set_index(["task", "recipe", "seed"])
    print(
        f"\n{'task':12} {'metric':15} {'recipe':20} {'mean':>6} {'seconds':>8}  difference to its reference, 95% interval"
    )
    for (task, recipe), rows in table.groupby(["task", "recipe"]):
        start = f"{task:12} {METRICS[KINDS[str(task)]]:15} {recipe:20}"
        if str(recipe).startswith("reference"):
            own = tuned.sort_index().xs((task, recipe))
            rates = " ".join(f"{rate:g}" for rate in own["rate"])
            print(f"{start} {own['value'].mean():6.3f} {rows['seconds'].mean():8.0f}  at {rates}")
            continue
        key = [(task, f"reference {architecture(str(recipe))}", seed) for seed in rows["seed"]]
        difference = rows["value"].to_numpy() - tuned["value"].reindex(key).to_numpy()
        difference = difference[~np.isnan(difference)]
        text = ""
        if len(difference) > 1:
            half = student.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / np.sqrt(len(difference))
            text = f"{difference.mean():+.3f} ({difference.mean() - half:+.3f} to {difference.mean() + half:+.3f})"
        print(f"{start} {rows['value'].mean():6.3f} {rows['seconds'].mean():8.0f}  {text}, {len(difference)} seeds")


def main() -> None:
    """Train everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(KINDS))
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="Trainings at a time.")
    parser.add_argument("--minutes", type=float, default=1e6, help="After these the rest is left out.")
    parser.add_argument(
        "--output", type=Path, default=None, help="CSV of all results, as they come; what it has is not run again."
    )
    arguments = parser.parse_args()
    began, work = time.monotonic(), Path(tempfile.mkdtemp())
    pool = ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn"))
    cells = [(task, seed) for seed in range(arguments.seeds) for task in arguments.tasks]
    list(pool.map(write_cohort, [work / f"{task}-{seed}" for task, seed in cells], *zip(*cells, strict=True)))
    print(f"{len(cells)} cohorts in {time.monotonic() - began:.0f} s", flush=True)
    names = dict.fromkeys(map(architecture, arguments.recipes))
    wanted = [(recipe, np.nan) for recipe in arguments.recipes]
    wanted += [(f"reference {name}", rate) for name in names for rate in RATES[name]]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = (
        pd.read_csv(arguments.output)
        if arguments.output and arguments.output.exists()
        else pd.DataFrame(columns=COLUMNS)
    )
    done: list[Result] = list(before[COLUMNS].itertuples(index=False, name=None))
    had = {(task, recipe, str(rate), seed) for task, recipe, rate, seed, *_ in done}
    trainings = [(task, *each, seed) for task, seed in cells for each in wanted]
    trainings = [each for each in trainings if (each[0], each[1], str(each[2]), each[3]) not in had]
    jobs = [pool.submit(one, work, *each, device) for each in trainings]
    try:
        for job in as_completed(jobs, max(1.0, 60 * arguments.minutes - (time.monotonic() - began))):
            if job.exception() is not None:
                print(job.exception(), flush=True)
                continue
            done.append(job.result())
            print(*(f"{item:.4g}" if isinstance(item, float) else item for item in done[-1]), flush=True)
            if arguments.output is not None:
                pd.DataFrame(done, columns=COLUMNS).to_csv(arguments.output, index=False)
    except TimeoutError:
        print(
            f"{len(jobs) + len(before) - len(done)} of {len(jobs)} trainings are left out: the time is over", flush=True
        )
    tabulate(done)
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    main()

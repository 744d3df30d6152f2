"""Do the models find what there is to find, and nothing where there is nothing? Bags of scikit-learn's digits.

Each tile is one of the 8 x 8 images, embedded by a fixed random projection. Bags for training and for test have images of
different writers' halves of the data set.

- `contains`: bags with a 9 among 10 to 400 other digits.
- `arrangement`: every bag has as many ones as zeros; the ones lie in the left half of the grid in half of the bags, in the
  right half in the others. Without the places of the tiles there is nothing to see.
- `apart`: in the upper rows of the grid lie a patch of ones and one of zeros, side by side, and again in the lower rows; the
  label says whether the ones are on the same side both times. What a tile shows and where it lies says nothing, nor does
  any sum over tiles: only something that knows of both ends of the slide can tell.
- `permuted`: `contains` with its labels shuffled.

    python benchmarks/digits.py --work /tmp/digits
"""

import argparse
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from longslide.data.features.feature_file import write_features
from longslide.data.features.features import Features
from longslide.pipeline.cli import main as longslide
from sklearn.datasets import load_digits

Question = Literal["contains", "arrangement", "apart", "permuted"]

DIM = 64


def write_bags(
    folder: Path,
    question: Question,
    bags: int,
    *,
    tiles: tuple[int, int] = (10, 400),
    nines: float = 0.02,
    train_share: float = 0.6,
    val_share: float = 0.15,
    seed: int = 0,
) -> None:
    """Write `features/` and `cohort.csv` (with `split`; the rest of the bags is for test) to a folder.

    A bag of n tiles that has nines has one and `nines` times n more.
    """
    rng = np.random.default_rng(seed)
    embeddings, digits, halves = read_images(rng)
    labels = rng.permutation(np.arange(bags) % 2)
    shown = rng.permutation(labels) if question == "permuted" else labels
    place = np.arange(bags) / bags
    parts = np.where(place < train_share + val_share, np.where(place < train_share, "train", "val"), "test")
    (folder / "features").mkdir(parents=True)
    for bag in range(bags):
        half = halves == (parts[bag] == "test")
        if question == "arrangement":
            chosen, cells = _arranged(rng, digits, half, tiles, left=bool(labels[bag]))
        elif question == "apart":
            chosen, cells = place_apart(rng, digits, half, together=bool(labels[bag]))
        else:
            chosen, cells = _containing(rng, digits, half, tiles, share=nines if labels[bag] else None)
        write_tiles(folder / "features" / f"bag{bag}.h5", embeddings[chosen], cells)
    table = {"slide_id": [f"bag{i}" for i in range(bags)], "label": np.where(shown, "yes", "no"), "split": parts}
    pd.DataFrame(table).to_csv(folder / "cohort.csv", index=False)


def read_images(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(N, DIM)` embeddings, the digits, and 1 for the images that are for test alone."""
    images, digits = load_digits(return_X_y=True)
    images = images / 16
    embeddings = (images - images.mean(0)) @ rng.normal(size=(64, DIM)) / 2
    return embeddings, digits, rng.permutation(len(digits)) % 2


def _containing(
    rng: np.random.Generator, digits: np.ndarray, half: np.ndarray, tiles: tuple[int, int], share: float | None
) -> tuple[np.ndarray, np.ndarray]:
    count = int(np.exp(rng.uniform(*np.log(tiles))))
    chosen = rng.choice(np.flatnonzero(half & (digits != 9)), count)
    if share is not None:
        nines = 1 + int(count * share)
        chosen[rng.choice(count, nines, replace=False)] = rng.choice(np.flatnonzero(half & (digits == 9)), nines)
    side = int(np.ceil(np.sqrt(count)))
    return chosen, np.stack([np.arange(count) % side, np.arange(count) // side], 1)


def _arranged(
    rng: np.random.Generator, digits: np.ndarray, half: np.ndarray, tiles: tuple[int, int], left: bool
) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = rng.integers(4, 1 + int(np.sqrt(tiles[1])), 2) // 2 * 2
    column, row = np.meshgrid(np.arange(columns), np.arange(rows))
    ones = (column < columns / 2) == left
    chosen = np.where(
        ones.ravel(),
        rng.choice(np.flatnonzero(half & (digits == 1)), ones.size),
        rng.choice(np.flatnonzero(half & (digits == 0)), ones.size),
    )
    return chosen, np.stack([column.ravel(), row.ravel()], 1)


SIDE = 16
"""Columns and rows of the grid of a bag of `apart`."""

BAND = 5
"""Its upper and its lower rows, in which the patches lie."""


def place_apart(
    rng: np.random.Generator, digits: np.ndarray, half: np.ndarray, together: bool, patch: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A bag of `apart`: the numbers of its images, and `(N, 2)` cells row by row.

    The four patches are of one size, `patch` rows and columns, by default any from 3 x 3 to half of the upper rows. Each
    lies anywhere in its half of its rows.
    """
    height, width = patch or rng.integers(3, (BAND + 1, SIDE // 2 + 1))
    chosen = rng.choice(np.flatnonzero(half & (digits > 1)), (SIDE, SIDE))
    left = rng.integers(2)  # which digit is on the left in the upper rows
    for top, first in ((0, left), (SIDE - BAND, left if together else 1 - left)):
        for digit, start in ((first, 0), (1 - first, SIDE // 2)):
            row = top + rng.integers(BAND - height + 1)
            column = start + rng.integers(SIDE // 2 - width + 1)
            images = rng.choice(np.flatnonzero(half & (digits == digit)), (height, width))
            chosen[row : row + height, column : column + width] = images
    columns, rows = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    return chosen.ravel(), np.stack([columns.ravel(), rows.ravel()], 1)


def write_tiles(path: Path, embeddings: np.ndarray, cells: np.ndarray) -> None:
    """Write a feature file of `(N, D)` embeddings whose tiles lie in the `(N, 2)` cells."""
    write_features(
        path,
        Features(
            slide_id=path.stem,
            features=embeddings.astype(np.float32),
            coords=cells * 256,
            step_level0=256,
            tile_size_level0=256,
            tile_px=256,
            overlap=0,
            tile_mpp=0.5,
            slide_mpp=0.5,
            encoder="random projection",
            weights="seed 0",
            precision="float32",
        ),
    )


def train(folder: Path, aggregator: str, run: Path, *words: str) -> pd.DataFrame:
    """Train on the bags and return `metrics.csv`."""
    options_of: dict[str, dict[str, float]] = {
        "longnet": {"layers": 2, "width": 64, "heads": 4, "ffn_width": 128, "dropout": 0.1},
        "transmil": {"width": 64, "landmarks": 32},
    }
    chosen = options_of.get(aggregator, {})
    small = [word for name, value in chosen.items() for word in (f"--model.aggregator.{name}", str(value))]
    options = ["--model.aggregator", aggregator, "--data.task", "binary", "--data.workers", "0"]
    options += ["--data.table", f"{folder}/cohort.csv", "--data.features", f"{folder}/features", "--run", str(run)]
    options += ["--trainer.enable_progress_bar", "false", "--model.optimiser.learning_rate", "0.001"]
    status = longslide(["fit", *options, *small, *words])
    if status:
        raise SystemExit(status)
    return pd.read_csv(run / "metrics.csv")


def main() -> None:
    """Train every model on every question, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=None, help="Folder for bags and runs; a temporary one by default.")
    parser.add_argument("--bags", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--questions", nargs="+", default=["contains", "arrangement", "permuted"])
    parser.add_argument("--models", nargs="+", default=["longnet", "transmil", "abmil", "mean", "max"])
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp())
    lines = [f"{'question':12} {'model':10} {'AUROC':>6}  95% interval"]
    for question in arguments.questions:
        if not (work / question).exists():
            write_bags(work / question, question, arguments.bags)
        for model in arguments.models:
            words = ["--trainer.max_epochs", str(arguments.epochs)]
            metrics = train(work / question, model, work / "runs" / f"{question}-{model}", *words)
            row = metrics[(metrics["metric"] == "auroc") & (metrics["level"] == "patient")].iloc[0]
            lines.append(f"{question:12} {model:10} {row['value']:6.3f}  {row['low']:.3f} to {row['high']:.3f}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

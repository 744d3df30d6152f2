"""Does pretraining by masked autoencoding help when labels are few? On bags of digits (see digits.py).

A LongNet encoder is pretrained on many unlabelled bags. A linear head on it, frozen, is trained on few labelled bags, beside
one on an encoder that has not been trained; and it is fine-tuned, beside the same model from scratch.

    python benchmarks/mae.py --work /tmp/mae
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd
from digits import train, write_bags  # type: ignore[import-not-found]  # beside this file
from longslide.pipeline.cli import main as longslide

TEST_BAGS = 300
"""Bags of the labelled sets; all but the few are for test."""

SIZE = "{class_path: longnet, init_args: {layers: 2, width: 64, heads: 4, ffn_width: 128, dropout: 0.0}}"


def pretrain(features: Path, run: Path, epochs: int, learning_rate: float) -> pd.DataFrame:
    """Pretrain on a folder of feature files and return `history.csv`."""
    options = ["--config", "mae", "--data.features", str(features), "--data.workers", "0"]
    options += ["--model.encoder", SIZE, "--model.decoder", "{layers: 1, width: 64, heads: 4, ffn_width: 128}"]
    options += ["--run", str(run), "--trainer.max_epochs", str(epochs), "--trainer.enable_progress_bar", "false"]
    options += ["--model.optimiser.learning_rate", str(learning_rate), "--model.shift", "0"]
    if longslide(["pretrain", *options]):
        raise SystemExit(1)
    return pd.read_csv(run / "history.csv")


def main() -> None:
    """Pretrain, probe, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=None, help="Folder for bags and runs; a temporary one by default.")
    parser.add_argument("--unlabelled", type=int, default=600)
    parser.add_argument("--labelled", type=int, nargs="+", default=[40, 80], help="Bags to train and validate on.")
    parser.add_argument("--epochs", type=int, default=30)
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp())
    lines = []
    for question in ("arrangement", "contains"):
        write_bags(work / question, question, arguments.unlabelled, tiles=(16, 144), nines=0.1, seed=1)
        history = pretrain(work / question / "features", work / f"mae-{question}", arguments.epochs, 5e-4)
        pretrain(work / question / "features", work / f"untrained-{question}", 1, 1e-12)
        losses = history["val_loss"]
        lines.append(f"{question}: loss of hidden tiles {losses.iloc[0]:.3f} -> {losses.iloc[-1]:.3f}")
        for labelled in arguments.labelled:
            share = labelled / TEST_BAGS
            shares = {"train_share": 2 / 3 * share, "val_share": share / 3}
            few = work / f"{question}-{labelled}"
            write_bags(few, question, TEST_BAGS, tiles=(16, 144), nines=0.1, seed=2, **shares)
            for name in ("mae frozen", "untrained frozen", "mae fine-tuned", "from scratch"):
                words = ["--trainer.max_epochs", "30"]
                if name != "from scratch":
                    words += ["--model.checkpoint", str(work / f"{name.split()[0]}-{question}" / "best.ckpt")]
                    words += ["--model.aggregator.frozen", str("frozen" in name).lower()]
                run = work / "runs" / f"{question}-{labelled}-{name}".replace(" ", "-")
                metrics = train(few, "longnet" if name == "from scratch" else "gigapath", run, *words)
                row = metrics[(metrics["metric"] == "auroc") & (metrics["level"] == "patient")].iloc[0]
                lines.append(
                    f"  {labelled:4} bags, {name:17} {row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
                )
    print("\n".join(lines))


if __name__ == "__main__":
    main()

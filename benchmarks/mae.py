"""Does pretraining by masked autoencoding help when labels are few? On bags of digits (see digits.py).

A LongNet encoder is pretrained on many unlabelled bags, then frozen; a linear head is trained on few labelled ones. Beside
it the same with an encoder that has not been trained, and the whole model from scratch on the few.

    python benchmarks/mae.py --work /tmp/mae
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd
from digits import train, write_bags  # type: ignore[import-not-found]  # beside this file
from longslide.pipeline.cli import main as longslide

SIZE = "{layers: 2, width: 64, heads: 4, ffn_width: 128, dropout: 0.0}"


def pretrain(features: Path, run: Path, epochs: int, learning_rate: float) -> pd.DataFrame:
    """Pretrain on a folder of feature files and return `history.csv`."""
    options = ["--config", "mae", "--data.features", str(features), "--data.workers", "0", "--data.max_bags", "8"]
    options += ["--model.longnet", SIZE, "--model.decoder", "{layers: 1, width: 64, heads: 4, ffn_width: 128}"]
    options += ["--run", str(run), "--trainer.max_epochs", str(epochs), "--trainer.enable_progress_bar", "false"]
    options += ["--model.optimiser.learning_rate", str(learning_rate), "--model.shift", "0"]
    if longslide(["fit", *options]):
        raise SystemExit(1)
    return pd.read_csv(run / "history.csv")


def main() -> None:
    """Pretrain, probe, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=None, help="Folder for bags and runs; a temporary one by default.")
    parser.add_argument("--unlabelled", type=int, default=600)
    parser.add_argument("--labelled", type=int, nargs="+", default=[80, 160])
    parser.add_argument("--epochs", type=int, default=30)
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp())
    lines = []
    for question in ("arrangement", "contains"):
        write_bags(work / question, question, arguments.unlabelled, tiles=(16, 144), seed=1)
        history = pretrain(work / question / "features", work / f"mae-{question}", arguments.epochs, 5e-4)
        pretrain(work / question / "features", work / f"untrained-{question}", 1, 1e-12)
        losses = history["val_loss"]
        lines.append(f"{question}: loss of hidden tiles {losses.iloc[0]:.3f} -> {losses.iloc[-1]:.3f}")
        for labelled in arguments.labelled:
            # A quarter of the bags is the test part: enough of them for an interval of some use.
            write_bags(work / f"{question}-{labelled}", question, labelled, tiles=(16, 144), seed=2)
            for name in ("mae", "untrained", "from scratch"):
                words = ["--trainer.max_epochs", "30"]
                aggregator = "longnet"
                if name != "from scratch":
                    aggregator = "gigapath"
                    words += ["--model.checkpoint", str(work / f"{name}-{question}" / "best.ckpt")]
                    words += ["--model.gigapath.frozen", "true"]
                run = work / "runs" / f"{question}-{labelled}-{name}".replace(" ", "-")
                metrics = train(work / f"{question}-{labelled}", aggregator, run, *words)
                row = metrics[(metrics["metric"] == "auroc") & (metrics["level"] == "patient")].iloc[0]
                lines.append(
                    f"  {labelled:4} bags, {name:12} {row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
                )
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""Explanations by number of tiles: seconds per slide and GPU memory of each method, for each model.

    python benchmarks/explain.py [--tiles 1000 10000 50000] [--models longnet gigapath abmil] [--device cuda]

Random weights, random features of length 1,536, one slide, float32 by TF32 products (exact for occlusion of models without a
slide encoder); each runs once before, to compile.
Integrated gradients take 50 steps, occlusion about a thousand squares. `gigapath` has 12 layers of width 768.
"""

import argparse
import time
from collections.abc import Callable

import torch
from longslide.models.classifier.classifier import SlideClassifier, TrainingFacts
from longslide.models.classifier.ensemble import ClassifierEnsemble
from longslide.models.classifier.options import ClassifierOptions
from longslide.models.explain.classifier import explain_ensemble
from longslide.models.explain.methods import METHODS
from longslide.task import Task

DIM = 1536


def classifier(name: str) -> SlideClassifier:
    facts = TrainingFacts(Task("binary", ("label",), ("normal", "tumour")), DIM)
    checkpoint = "random" if name == "gigapath" else None
    return SlideClassifier(facts, ClassifierOptions(name, checkpoint=checkpoint))


def measure(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds, and the most GiB that the GPU held."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started, torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, nargs="+", default=[1_000, 10_000, 50_000])
    parser.add_argument("--models", nargs="+", default=["abmil", "longnet", "gigapath"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, float32")
    print(f"{'model':>9} {'tiles':>7} {'method':>21} {'seconds':>8} {'GiB':>6}")
    for model in options.models:
        ensemble = ClassifierEnsemble([classifier(model)], [model]).to(device)
        for tiles in options.tiles:
            features = torch.randn(tiles, DIM, device=device)
            index = torch.arange(tiles, device=device)
            width = int(tiles**0.5) + 1
            cells = torch.stack([index % width, index // width], -1)
            for method in options.methods:
                if method == "attention" and model != "abmil":
                    continue

                def run(method: str = method, features: torch.Tensor = features, cells: torch.Tensor = cells) -> None:
                    explain_ensemble(ensemble, features, cells, method)  # type: ignore[arg-type]  # noqa: B023

                try:
                    if tiles == options.tiles[0]:
                        run()
                    seconds, gib = measure(run, device)
                except torch.OutOfMemoryError:
                    seconds, gib = float("nan"), float("nan")
                print(f"{model:>9} {tiles:7,} {method:>21} {seconds:8.2f} {gib:6.1f}", flush=True)


if __name__ == "__main__":
    main()

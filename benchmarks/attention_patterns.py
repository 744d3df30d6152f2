"""LongNet's dilated attention beside the patterns it is compared with: what they learn, and time and memory by tokens.

`learn` trains one small encoder of each pattern on the task `apart` of `digits.py`, whose label no tile and no sum over
tiles tells: something must know of both ends of the slide. A query sees about as many keys with each sparse pattern, 16
of 257; `keys` counts them. Bags for training are drawn anew at each step, bags for test show images of other writers. Of
`learned` it also says which share of the chosen tiles are of a patch, before training and after it.

`time` runs one layer's attention, forward and backward, on longer and longer sequences, until a call takes too long.

    python benchmarks/attention_patterns.py learn --seeds 5 --processes 4
    python benchmarks/attention_patterns.py time --tokens 1000 4000 16000 64000
"""

import argparse
import multiprocessing
import os
import re
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from typing import Any

import numpy as np
import torch
from digits import DIM, SIDE, place_apart, read_images  # type: ignore[import-not-found]
from longslide.models.aggregators.base import Aggregator
from longslide.models.aggregators.registry import AGGREGATORS
from longslide.models.slide_encoder.attention_pattern import PATTERNS, Pattern, attention
from longslide.models.slide_encoder.learned_attention import choose_blocks
from longslide.pipeline.attention_map.attention_map import scored_pairs
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

SMALL: dict[str, dict[str, object]] = {
    "dense": {},
    "sliding-window": {"window": 8},
    "sliding-window, half the slide": {"window": 128},
    "strided": {"period": 16},
    "random": {"random_keys": 15},
    "random+window+global": {"random_keys": 7, "window": 4, "global_tokens": 1},
    "learned": {"block_size": 8, "chosen_blocks": 1},
    "dilated": {"segment_lengths": (4, 257), "dilated_ratios": (1, 4)},
    "dilated, ratio above heads": {"segment_lengths": (6, 24, 257), "dilated_ratios": (1, 2, 8)},
    "dilated, one dense branch": {"segment_lengths": (257,), "dilated_ratios": (1,)},
    "mean": {},
    "abmil": {},
}
"""Patterns for 257 tokens, and two aggregators that know no places."""

LARGE: dict[str, dict[str, object]] = {
    "dense": {},
    "sliding-window": {"window": 256},
    "strided": {"period": 64},
    "random": {"random_keys": 64},
    "random+window+global": {"random_keys": 32, "window": 128, "global_tokens": 1},
    "learned": {"block_size": 64, "chosen_blocks": 8},
    "dilated": {"segment_lengths": (1024, 5792, 32768, 185363, 1048576), "dilated_ratios": (1, 2, 4, 8, 16)},
}


LAYERS, HEADS, TOKENS = 3, 4, SIDE**2 + 1

TEST_BAGS = 1000

PATCHES = (5, 3)
"""Columns and rows of the patches of the test bags."""


def keys_of(name: str) -> float:
    """How many keys a query scores with each head, on average; of `learned` with the means of blocks."""
    settings: dict[str, Any] = dict(SMALL[name])
    branches = tuple(zip(settings.pop("segment_lengths", ()), settings.pop("dilated_ratios", ()), strict=True))
    pairs = scored_pairs(TOKENS, HEADS, pattern_of(name), False, branches=branches, **settings)
    return float(sum(pairs) / TOKENS / HEADS)


def pattern_of(name: str) -> Pattern:
    """The pattern of one of the names in `SMALL` and `LARGE`."""
    [pattern] = [pattern for pattern in PATTERNS if re.split("[+,]", name)[0] == pattern]
    return pattern


class Bags:
    """Bags of `apart`, drawn from the images for training or from those for test."""

    def __init__(self, test: bool, seed: int) -> None:
        self._embeddings, self._digits, halves = read_images(np.random.default_rng(0))
        self._half = halves == test
        self._rng = np.random.default_rng(seed)

    def draw(self, count: int, patch: tuple[int, int] | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`(count, N, D)` embeddings, `(count, N, 2)` cells, `(count,)` labels and `(count, N)` the digits."""
        labels = self._rng.permutation(np.arange(count) % 2)
        chosen, cells = zip(
            *(place_apart(self._rng, self._digits, self._half, bool(label), patch) for label in labels), strict=True
        )
        which = np.stack(chosen)
        tiles = torch.from_numpy(self._embeddings[which]).float()
        return tiles, torch.from_numpy(np.stack(cells)), torch.from_numpy(labels), torch.from_numpy(self._digits[which])


class Classifier(nn.Module):
    """An aggregator and a linear head."""

    def __init__(self, name: str) -> None:
        super().__init__()
        if name in ("mean", "abmil"):
            self.aggregator: Aggregator = AGGREGATORS.get(name)(DIM, width=64)
        else:
            settings: dict[str, Any] = dict(SMALL[name])
            branches = {key: settings.pop(key) for key in ("segment_lengths", "dilated_ratios") if key in settings}
            size = {"layers": LAYERS, "width": 64, "heads": HEADS, "ffn_width": 128, "dropout": 0.0}
            self.aggregator = AGGREGATORS.get("longnet")(DIM, pattern=pattern_of(name), **size, **settings)
            encoder: Any = self.aggregator.encoder
            for layer in encoder.layers if branches else ():  # an encoder's shortest segment is 1,024
                layer.segment_lengths, layer.dilated_ratios = branches["segment_lengths"], branches["dilated_ratios"]
        self.head = nn.Linear(self.aggregator.width, 1)

    def forward(self, tiles: Tensor, cells: Tensor) -> Tensor:
        """Logits of `(B, N, D)` embeddings in their `(B, N, 2)` cells."""
        bounds = torch.arange(len(tiles) + 1, dtype=torch.int32, device=tiles.device) * tiles.shape[1]
        logits: Tensor = self.head(self.aggregator(tiles.flatten(0, 1), cells.flatten(0, 1), bounds))[:, 0]
        return logits


def learn_one(name: str, seed: int, steps: int, batch: int) -> dict[str, float]:
    """Train once; the AUROC of the test bags of each size of patch, and of `learned` what is chosen before and after."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    model = Classifier(name).to(device)
    held_out, bags = Bags(True, 1), Bags(False, 1000 + seed)
    of_sizes = {size: held_out.draw(TEST_BAGS, (size, size)) for size in PATCHES}
    shown = tuple(x[:200] for x in of_sizes[PATCHES[-1]])
    found: dict[str, float] = {}
    if name == "learned":
        found["chance"], found["before"] = chosen_share(model, *shown)
    optimiser = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps, pct_start=0.1)
    begun = time.perf_counter()
    for _ in range(steps):
        some_tiles, some_cells, wanted, _ = bags.draw(batch)
        loss = binary_cross_entropy_with_logits(
            model(some_tiles.to(device), some_cells.to(device)), wanted.to(device).float()
        )
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    found["seconds"] = time.perf_counter() - begun
    model.eval()
    for size, (tiles, cells, labels, _) in of_sizes.items():
        some = zip(torch.split(tiles, 50), torch.split(cells, 50), strict=True)
        with torch.no_grad():
            logits = torch.cat([model(x.to(device), c.to(device)).cpu() for x, c in some])
        found[f"auroc {size}"] = float(roc_auc_score(labels, logits))
    if name == "learned":
        found["after"] = chosen_share(model, *shown)[1]
    return found


@torch.no_grad()
def chosen_share(model: Classifier, tiles: Tensor, cells: Tensor, _: Tensor, digits: Tensor) -> tuple[float, float]:
    """The share of tiles that are of a patch: of all, and in the blocks chosen in any layer and head."""
    settings: dict[str, Any] = SMALL["learned"]
    size = settings["block_size"]
    padded = nn.functional.pad((digits <= 1).float(), (1, -(digits.shape[1] + 1) % size))
    share = padded.view(len(digits), -1, size).mean(2)
    hits: list[Tensor] = []

    def look(layer: Any, inputs: tuple[Any, ...]) -> None:
        x, _, _, update = inputs
        qkv = layer.project(x, update)[0]
        q, k, _ = qkv.view(len(tiles), -1, *qkv.shape[1:]).unbind(2)
        chosen, _ = choose_blocks(q, k, size, settings["chosen_blocks"])
        hits.append(share.to(chosen.device).gather(1, chosen.flatten(1)).mean())

    encoder: Any = model.aggregator.encoder
    hooks = [layer.register_forward_pre_hook(look) for layer in encoder.layers]
    device = model.head.weight.device
    model(tiles.to(device), cells.to(device))
    for hook in hooks:
        hook.remove()
    return float(share.mean()), float(torch.stack(hits).mean())


def learn(patterns: list[str], steps: int, batch: int, seeds: int, processes: int) -> None:
    """Train each pattern with several seeds; print the mean and its 95% interval (Student's t) over them."""
    jobs = list(product(range(seeds), patterns))
    os.environ["OMP_NUM_THREADS"] = "1"  # of each process
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(learn_one, name, seed, steps, batch): (name, seed) for seed, name in jobs}
        for done in as_completed(running):
            print(*running[done], " ".join(f"{key} {x:.3f}" for key, x in done.result().items()), sep=", ", flush=True)
        found = [one.result() for one in running]
    print(
        f"{steps} steps of {batch} bags of {SIDE}x{SIDE} tiles, {LAYERS} layers, {seeds} seeds, {TEST_BAGS} test bags"
    )
    sizes = "  ".join(f"{f'AUROC, {size}x{size}':>22}" for size in PATCHES)
    print(f"{'pattern':32} {'keys':>6}  {sizes} {'s':>5}  AUROC of each seed")
    for name in patterns:
        of_seeds = [one for (_, other), one in zip(jobs, found, strict=True) if other == name]
        cells, each = [], []
        for size in PATCHES:
            aurocs = np.array([one[f"auroc {size}"] for one in of_seeds])
            half = student.ppf(0.975, seeds - 1) * aurocs.std(ddof=1) / seeds**0.5 if seeds > 1 else np.nan
            cells.append(f"{aurocs.mean():.3f} ({aurocs.mean() - half:.3f} to {aurocs.mean() + half:.3f})")
            each.append(" ".join(f"{auroc:.3f}" for auroc in aurocs))
        keys = f"{keys_of(name):6.1f}" if name not in ("mean", "abmil") else "     -"
        seconds = np.mean([one["seconds"] for one in of_seeds])
        print(f"{name:32} {keys}  {'  '.join(f'{cell:>22}' for cell in cells)} {seconds:5.0f}  {' | '.join(each)}")
        if name == "learned":
            shares = {key: np.array([one[key] for one in of_seeds]) for key in ("chance", "before", "after")}
            print(
                "  tiles of a patch in chosen blocks:", ", ".join(f"{key} {x.mean():.3f}" for key, x in shares.items())
            )


def measure(patterns: list[str], tokens: list[int], heads: int, dim: int, limit: float) -> None:
    """Print seconds of forward and of both, and on a GPU the memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, {heads} heads of {dim}, {dtype}")
    print(
        f"{'pattern':22} {'tokens':>9} {'forward s':>10} {'both s':>8} {'GiB':>6} {'s a million tokens':>19}",
        flush=True,
    )
    for name in patterns:
        for count in tokens:
            q, k, v = (
                torch.randn(1, count, heads, dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
            )
            settings = dict(LARGE[name])
            if name == "learned":
                settings["gate"] = torch.full((1, count, heads), 0.5, device=device, dtype=dtype)

            def both(backward: bool, inputs: Any = (q, k, v), settings: Any = settings, name: Any = name) -> float:
                begun = time.perf_counter()
                output = attention(inputs[0], inputs[1], inputs[2], pattern_of(name), **settings)
                if backward:
                    torch.autograd.grad(output.float().square().mean(), inputs)
                if device == "cuda":
                    torch.cuda.synchronize()
                return time.perf_counter() - begun

            if count == tokens[0]:
                both(True)  # compiles, allocates
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            forward, whole = (min(both(backward) for _ in range(2)) for backward in (False, True))
            memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
            rate = whole / count * 1e6
            print(f"{name:22} {count:9,} {forward:10.4f} {whole:8.4f} {memory:6.2f} {rate:19.1f}", flush=True)
            if whole > limit:
                break


def main() -> None:
    """Learn, or measure the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["learn", "time"])
    parser.add_argument("--patterns", nargs="+", default=None, choices=list(SMALL))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 4000, 16_000, 64_000])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=16)
    parser.add_argument(
        "--limit", type=float, default=30.0, help="Seconds of a call after which no longer sequence follows."
    )
    options = parser.parse_args()
    if options.what == "learn":
        learn(options.patterns or list(SMALL), options.steps, options.batch, options.seeds, options.processes)
    else:
        measure(options.patterns or list(LARGE), options.tokens, options.heads, options.head_dim, options.limit)


if __name__ == "__main__":
    main()

"""LongNet's dilated attention beside the patterns it is compared with: what they learn, and time and memory by tokens.

`learn` trains one small encoder with each pattern on the arrangement task of `digits.py`: each bag has ones in one half of
the grid and zeros in the other; which half has the ones is the label. Test bags show images of other writers. A token sees
about as many keys with each sparse pattern.

`time` runs one layer's attention, forward and backward, on longer and longer sequences, until a call takes too long.

    python benchmarks/attention_patterns.py learn --seeds 3
    python benchmarks/attention_patterns.py time --tokens 1000 4000 16000 64000
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from digits import train, write_bags  # type: ignore[import-not-found]
from longslide.models.slide_encoder.attention_pattern import attention

SMALL: dict[str, dict[str, object]] = {
    "dense": {},
    "sliding-window": {"window": 12},
    "strided": {"period": 8},
    "random": {"random_keys": 24},
    "random+window+global": {"random_keys": 12, "window": 6, "global_tokens": 1},
    "learned": {"block_size": 8, "chosen_blocks": 2},
    "dilated": {},
}
"""Of bags of 16 to 400 tiles. The shortest segment of an encoder's dilated attention has 1,024 tokens: it is dense here."""

LARGE: dict[str, dict[str, object]] = {
    "dense": {},
    "sliding-window": {"window": 256},
    "strided": {"period": 64},
    "random": {"random_keys": 64},
    "random+window+global": {"random_keys": 32, "window": 128, "global_tokens": 1},
    "learned": {"block_size": 64, "chosen_blocks": 8},
    "dilated": {"segment_lengths": (1024, 5792, 32768, 185363, 1048576), "dilated_ratios": (1, 2, 4, 8, 16)},
}


def learn(work: Path, patterns: list[str], bags: int, epochs: int, seeds: int) -> None:
    """Train each pattern with several seeds, and print the AUROC and balanced accuracy of the test bags."""
    if not (work / "arrangement").exists():
        write_bags(work / "arrangement", "arrangement", bags)
    print(f"{'pattern':22} {'AUROC':>6} {'accuracy':>9}  of each seed", flush=True)
    for name in patterns:
        found = []
        for seed in range(seeds):
            words = ["--epochs", str(epochs), "--seed", str(seed)]
            words += ["--model.aggregator.pattern", name.split("+")[0]]
            for setting, value in SMALL[name].items():
                words += [f"--model.aggregator.{setting}", str(value)]
            table = train(work / "arrangement", "longnet", work / "runs" / f"{name}-{seed}", *words)
            pooled = table[(table["scope"] == "pooled") & (table["level"] == "patient")]
            values = pooled.set_index("metric")["value"]
            found.append((float(values["auroc"]), float(values["balanced_accuracy"])))
        mean = pd.DataFrame(found).mean()
        each = "  ".join(f"{auroc:.3f} {accuracy:.3f}" for auroc, accuracy in found)
        print(f"{name:22} {mean[0]:6.3f} {mean[1]:9.3f}  {each}", flush=True)


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
                output = attention(inputs[0], inputs[1], inputs[2], name.split("+")[0], **settings)
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
    parser.add_argument("--patterns", nargs="+", default=list(SMALL), choices=list(SMALL))
    parser.add_argument("--work", type=Path, default=None, help="Folder for bags and runs; a temporary one by default.")
    parser.add_argument("--bags", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 4000, 16_000, 64_000])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=16)
    parser.add_argument(
        "--limit", type=float, default=30.0, help="Seconds of a call after which no longer sequence follows."
    )
    options = parser.parse_args()
    if options.what == "learn":
        learn(options.work or Path(tempfile.mkdtemp()), options.patterns, options.bags, options.epochs, options.seeds)
    else:
        measure(options.patterns, options.tokens, options.heads, options.head_dim, options.limit)


if __name__ == "__main__":
    main()

"""GigaPath's slide encoder by number of tiles: milliseconds and memory, Triton kernels beside plain PyTorch, in one run.

    python benchmarks/slide_encoder.py [--tokens 1000 10000 70000] [--dtype bfloat16]

Random weights, one slide, medians. `backward` is forward and backward.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from longslide import create_slide_encoder, dilated_attention
from longslide.models import longnet
from torch import Tensor


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return float(statistics.median(times))


def grid(tokens: int) -> Tensor:
    index = torch.arange(tokens, device="cuda")
    return torch.stack([index % 1024, index // 1024], -1)[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000, 10_000, 30_000, 70_000, 100_000, 250_000])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    dtype = getattr(torch, options.dtype)
    encoder = create_slide_encoder("gigapath", checkpoint="random").to("cuda", dtype)
    print(f"gigapath, {torch.cuda.get_device_name()}, torch {torch.__version__}, {options.dtype}")
    print(f"{'tiles':>9} {'':>8} {'forward ms':>11} {'GiB':>6} {'backward ms':>12} {'GiB':>6}")
    for tokens in options.tokens:
        x, cells = torch.randn(1, tokens, 1536, device="cuda", dtype=dtype), grid(tokens)

        def forward(x: Tensor = x, cells: Tensor = cells) -> None:
            with torch.inference_mode():
                encoder(x, cells)

        def backward(x: Tensor = x, cells: Tensor = cells) -> None:
            encoder.zero_grad(set_to_none=True)
            encoder(x, cells).float().square().sum().backward()

        times: dict[str, list[float]] = {}
        for backend in ("fused", "gather"):
            longnet.dilated_attention = lambda *a, backend=backend: dilated_attention(*a, backend=backend)  # type: ignore[attr-defined]
            row = []
            for run in (forward, backward):
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                try:
                    row += [milliseconds(run, options.repeats), torch.cuda.max_memory_allocated() / 2**30]
                except torch.OutOfMemoryError:
                    row += [float("nan"), float("nan")]
                encoder.zero_grad(set_to_none=True)
            times[backend] = row
            print(f"{tokens:9,} {backend:>8} {row[0]:11.2f} {row[1]:6.1f} {row[2]:12.2f} {row[3]:6.1f}", flush=True)
        ratios = [a / b for a, b in zip(times["gather"], times["fused"], strict=True)]
        print(f"{'':9} {'ratio':>8} {ratios[0]:11.2f} {ratios[1]:6.2f} {ratios[2]:12.2f} {ratios[3]:6.2f}", flush=True)


if __name__ == "__main__":
    main()

"""GigaPath's slide encoder by number of tiles, beside what the published implementation took: milliseconds and memory.

    python benchmarks/slide_encoder.py [--tokens 1000 10000 70000] [--parts table memory packed linear long]

Random weights in bfloat16, medians of wall time. The published figures were measured once on one NVIDIA H200 (torch 2.11,
gigapath_slide_enc12l768d, float16 autocast, dropout 0, FlashAttention-2 inside): on another GPU the ratios are no ratios.

- `table`: forward, forward + backward, peak memory.
- `memory`: forward + backward of 70,000 tiles, activations kept and computed again.
- `packed`: 32 slides of 500 to 20,000 tiles in one call, beside one slide with as many tiles.
- `linear`: time per token with segments of at most 65,536 tokens.
- `long`: a training step on 1,000,000 tiles, a forward on 4,000,000.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from longslide import create_slide_encoder
from longslide.models.slide_encoder.cuda_graphs import GraphedEncoder
from torch import Tensor

NAN = float("nan")
PUBLISHED = {
    1_000: (63.9, 121.7),
    10_000: (67.6, 156.9),
    30_000: (102.4, 284.0),
    70_000: (253.8, 707.0),
    100_000: (358.0, 1005.6),
    250_000: (1051.7, NAN),
}
"""Tiles: milliseconds of forward, and of forward and backward."""


def measure(run: Callable[[], object], repeats: int = 5) -> tuple[float, float]:
    """(median milliseconds, peak GiB: of the first run, which makes the CUDA graphs of short slides)."""
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return float(statistics.median(times)), torch.cuda.max_memory_allocated() / 2**30


def encoder_of(**options: Any) -> GraphedEncoder:
    return GraphedEncoder(create_slide_encoder("gigapath", checkpoint="random", **options).to("cuda", torch.bfloat16))


def slide(tiles: int) -> tuple[Tensor, Tensor]:
    index = torch.arange(tiles, device="cuda")
    features = torch.randn(tiles, 1536, device="cuda", dtype=torch.bfloat16)
    return features, torch.stack([index % 2048, index // 2048], -1)


def forward(encoder: GraphedEncoder, *batch: Tensor) -> None:
    with torch.inference_mode():
        encoder(*batch)


def step(encoder: GraphedEncoder, *batch: Tensor) -> None:
    encoder(*batch).float().square().sum().backward()  # type: ignore[no-untyped-call]
    encoder.zero_grad(set_to_none=True)  # while the GPU works


def table(tokens: list[int]) -> None:
    encoder = encoder_of()
    print(
        f"{'tiles':>9} {'forward ms':>11} {'GiB':>6} {'published over it':>18} {'fwd+bwd ms':>11} {'GiB':>6} {'pub.':>6}"
    )
    for tiles in tokens:
        batch = [x[None] for x in slide(tiles)]
        once, memory = measure(lambda: forward(encoder, *batch), 9)  # noqa: B023
        twice, more = (NAN, NAN) if tiles > 200_000 else measure(lambda: step(encoder, *batch))  # noqa: B023
        a, b = PUBLISHED.get(tiles, (NAN, NAN))
        print(
            f"{tiles:9,} {once:11.2f} {memory:6.1f} {a / once:17.2f}x {twice:11.2f} {more:6.1f} {b / twice:5.2f}x",
            flush=True,
        )


def memory() -> None:
    batch = [x[None] for x in slide(70_000)]
    for checkpointing in (False, True):
        encoder = encoder_of(checkpointing=checkpointing)
        time, peak = measure(lambda: step(encoder, *batch), 3)  # noqa: B023
        print(f"70,000 tiles, checkpointing {checkpointing}: {time:.1f} ms, peak {peak:.2f} GiB", flush=True)


def packed() -> None:
    encoder = encoder_of()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(500, 20_001, (32,), generator=generator)
    total = int(lengths.sum())
    slides = [slide(int(length)) for length in lengths]
    cu_seqlens = torch.tensor([0, *lengths.cumsum(0).tolist()], device="cuda")
    together = (torch.cat([x for x, _ in slides]), torch.cat([cells for _, cells in slides]), cu_seqlens)
    alone = [x[None] for x in slide(total)]
    for name, run in (("forward", forward), ("forward + backward", step)):
        many, _ = measure(lambda: run(encoder, *together))  # noqa: B023
        one, _ = measure(lambda: run(encoder, *alone))  # noqa: B023
        print(
            f"{name}: 32 slides packed, {total:,} tiles: {total / many:,.0f} tiles/ms; one slide of them: "
            f"{total / one:,.0f}; ratio {one / many:.2f}",
            flush=True,
        )


def linear() -> None:
    encoder = encoder_of(max_wsi_size=65_536)
    first = NAN
    for tiles in (128_000, 512_000, 1_000_000, 4_000_000):
        batch = [x[None] for x in slide(tiles)]
        time, peak = measure(lambda: forward(encoder, *batch), 3)  # noqa: B023
        each = 1e6 * time / tiles
        first = each if tiles == 128_000 else first
        print(
            f"{tiles:9,} tiles, segments to {max(encoder.spec.segment_lengths):,}: {time:8.1f} ms, {each:.1f} ns per tile, "
            f"{each / first:.3f} of that at 128,000; peak {peak:.1f} GiB",
            flush=True,
        )


def long() -> None:
    batch = [x[None] for x in slide(1_000_000)]
    encoder = encoder_of(checkpointing=True)
    time, peak = measure(lambda: step(encoder, *batch), 1)
    print(f"training step on 1,000,000 tiles, checkpointing: {time / 1000:.2f} s, peak {peak:.1f} GiB", flush=True)
    del encoder
    encoder = encoder_of()
    batch = [x[None] for x in slide(4_000_000)]
    time, peak = measure(lambda: forward(encoder, *batch), 1)
    print(f"forward on 4,000,000 tiles: {time / 1000:.2f} s, peak {peak:.1f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(PUBLISHED))
    parts = {"memory": memory, "packed": packed, "linear": linear, "long": long}
    parser.add_argument("--parts", nargs="+", default=["table", *parts], choices=["table", *parts])
    options = parser.parse_args()
    print(f"gigapath, {torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16")
    for part in options.parts:
        if part == "table":
            table(options.tokens)
        else:
            parts[part]()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

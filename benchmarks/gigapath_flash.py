"""GigaPath-Flash's slide encoder beside GigaPath's and TITAN's, and the kernels at its head dimension, 24.

    python benchmarks/gigapath_flash.py [--tokens 10000 100000] [--titan 10000 100000] [--device cuda]

Random weights in bfloat16, medians of wall time and peak memory; the tile encoders are `tile_encoder.py --tile-encoders
gigapath-flash gigapath`. The kernels: relative error of outputs and gradients against the naive version in float64.
"""

import argparse
from typing import Literal

import torch
from longslide import create_slide_encoder, dilated_attention
from longslide.models.slide_encoder.cuda_graphs import GraphedEncoder
from longslide.models.slide_encoder.encoder import SlideEncoder
from longslide.models.slide_encoder.spec import load_longnet_spec
from slide_encoder import forward, measure, step  # type: ignore[import-not-found]  # beside this file
from torch import Tensor


def slide(tiles: int, dim: int, device: str) -> tuple[Tensor, Tensor]:
    index = torch.arange(tiles, device=device)
    side = int(tiles**0.5)
    return torch.randn(1, tiles, dim, device=device, dtype=torch.bfloat16), torch.stack(
        [index % side, index // side], -1
    )[None]


def errors(tiles: int, heads: int, head_dim: int, dtype: torch.dtype, device: str) -> list[float]:
    """Of the output and the gradients of queries, keys and values."""
    spec = load_longnet_spec("gigapath-flash")
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, tiles, heads, head_dim, generator=generator).to(device, dtype) for _ in range(3)]
    direction = torch.randn(1, tiles, heads, head_dim, generator=generator).to(device)
    results = []
    runs: tuple[tuple[Literal["naive", "fused"], torch.dtype], ...] = (("naive", torch.float64), ("fused", dtype))
    for backend, kind in runs:
        q, k, v = (x.to(kind).requires_grad_() for x in inputs)
        out = dilated_attention(q, k, v, spec.segment_lengths, spec.dilated_ratios, backend=backend)
        results.append([out, *torch.autograd.grad(out, (q, k, v), direction.to(kind))])
    return [((a.double() - b).norm() / b.norm()).item() for b, a in zip(*results, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--titan", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--slide-encoders", nargs="+", default=["gigapath-flash", "gigapath", "titan"])
    parser.add_argument("--kernel-tokens", type=int, default=5000)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = options.device
    for head_dim in (24, 48):
        for dtype in (torch.float32, torch.bfloat16):
            found = errors(options.kernel_tokens, 16, head_dim, dtype, device)
            print(
                f"kernels, head dimension {head_dim}, {dtype}: error of the output {found[0]:.1e}, of gradients "
                f"{max(found[1:]):.1e}",
                flush=True,
            )
    if device == "cpu":
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'':16} {'tiles':>8} {'forward ms':>11} {'GiB':>6} {'fwd+bwd ms':>11} {'GiB':>6}")
    for name in options.slide_encoders:
        encoder = create_slide_encoder(name, checkpoint="random").to(device, torch.bfloat16)
        run = GraphedEncoder(encoder) if isinstance(encoder, SlideEncoder) else encoder
        for tiles in options.titan if name == "titan" else options.tokens:
            batch = slide(tiles, encoder.spec.tile_dim, device)
            once, memory = measure(lambda: forward(run, *batch), 3)  # noqa: B023
            twice, more = measure(lambda: step(run, *batch), 2)  # noqa: B023
            print(f"{name:16} {tiles:8,} {once:11.2f} {memory:6.1f} {twice:11.2f} {more:6.1f}", flush=True)


if __name__ == "__main__":
    main()

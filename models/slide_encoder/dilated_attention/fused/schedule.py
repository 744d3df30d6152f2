"""How the kernels are launched: block sizes, the grid, and the table of branches that they look up."""

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from ..windows import Windows
from .layout import columns, has_spare
from .walk import Sizes

BLOCKS: dict[str, dict[str, int]] = {
    "forward": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 168},
    "forward_long": {"BM": 128, "BN": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 255},
    "backward_q": {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 3, "maxnreg": 128},
    "backward_kv": {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 3, "maxnreg": 168},
}
"""The fastest of 20 to 30 tried for each on H200s, at 10,000 and 70,000 tokens and head dimension 48."""
LONG = 5 * 2**18
"""Tokens times heads from which on blocks of 128 queries are 2 to 5% faster: those of 64 read the keys twice as often."""
OTHER_BLOCKS = {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 2}
"""For float32, and for head dimensions over 64."""


@cache  # for good: a CUDA graph may read it
def plan(
    segment_lengths: tuple[int, ...], dilated_ratios: tuple[int, ...], heads: int, stride: int, device: torch.device
) -> Tensor:
    """What the kernels look up, int32: segment length and log2 of the ratio of each branch; the offset of each head in each
    branch; the classes of each head in the order of their number of keys, most first, so that no long one is left over."""
    ratios = torch.tensor(dilated_ratios)
    offsets = torch.arange(heads) // -(-heads // ratios[:, None])
    covered = (torch.arange(stride) - offsets[..., None]) % ratios[:, None, None].clamp(max=stride) == 0
    keys = (covered * (torch.tensor(segment_lengths) / ratios)[:, None, None]).sum(0)
    branches = torch.stack([torch.tensor(segment_lengths), ratios.log2().long()], 1)
    parts = (branches, offsets, keys.argsort(dim=1, descending=True, stable=True))
    with torch.inference_mode(False):
        return torch.cat([part.flatten() for part in parts]).int().to(device)


def settings(
    shape: Sequence[int],
    dtype: torch.dtype,
    cu_seqlens: Tensor,
    kernel: str,
    segment_lengths: Sequence[int],
    ratios: Sequence[int],
    causal: bool,
    windows: Windows | None = None,
) -> tuple[tuple[int, int, int], Sizes, Mapping[str, int], Tensor]:
    """Grid, sizes, options of the compiler and plan of a kernel for queries of a shape `(T, H, D)`, of sequences that
    `windows` spread over ranks."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return _settings(
        tuple(shape), dtype, cu_seqlens.device, cu_seqlens.shape[0] - 1, kernel, tuple(segment_lengths), tuple(ratios),
        causal, tf32, None if windows is None else windows.longest,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _settings(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    sequences: int,
    kernel: str,
    segment_lengths: tuple[int, ...],
    ratios: tuple[int, ...],
    causal: bool,
    tf32: bool,
    longest: int | None,
) -> tuple[tuple[int, int, int], Sizes, Mapping[str, int], Tensor]:
    """See `settings`; `longest` is the longest sequence of those spread over ranks, None if none are."""
    tokens, heads, dim = shape
    largest = max(ratios)
    stride = max(1, largest // 2)
    if kernel == "forward" and tokens * heads >= LONG:
        kernel = "forward_long"
    options = dict(OTHER_BLOCKS if dtype == torch.float32 or dim > 64 else BLOCKS[kernel])
    rows, keys = options.pop("BM"), options.pop("BN")
    parts = sequences if longest is None else 2 * sequences  # parts begin anywhere within a block
    pairs = tokens // (2 * rows * stride) + parts
    z = Sizes(
        H=heads,
        D=dim,
        DP=columns(dim),
        SPARE=has_spare(dim),
        R=largest,
        S=stride,
        NB=len(ratios),
        LARGEST=ratios.index(largest),
        CAUSAL=causal,
        MERGE=keys >= largest and len(ratios) < 16,  # what `log_of_times` can count
        BM=rows,
        BN=keys,
        PRECISION="tf32" if tf32 else "tf32x3",
        SHARDED=longest is not None,
    )
    most = 2 ** ((tokens if longest is None else longest) - 1).bit_length()
    lengths = tuple(min(length, most) for length in segment_lengths)
    return (2 * pairs, heads, stride), z, options, plan(lengths, ratios, heads, stride, device)

"""`grid_positions` on a GPU: one Triton kernel, which never asks how large the grid is."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

TWO_PI = tl.constexpr(6.283185307179586)


@triton.jit
def _positions(cells, turns, out, tiles, Q: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """A quarter of the width Q: the row's half for the programs (.., 0), the column's for (.., 1)."""
    tile = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    half = tl.program_id(1)
    step = tl.arange(0, BLOCK)
    cell = tl.load(cells + tile * 2 + 1 - half, mask=tile < tiles, other=0).to(tl.float64)
    turn = cell[:, None] * tl.load(turns + step, mask=step < Q, other=0.0)[None, :]
    turn -= tl.floor(turn + 0.5)  # in float64: there may be many whole turns
    angle = turn.to(tl.float32) * TWO_PI
    where = tile[:, None] * (4 * Q) + half * (2 * Q) + step[None, :]
    mask = (tile < tiles)[:, None] & (step < Q)[None, :]
    tl.store(out + where, tl.sin(angle).to(out.dtype.element_ty), mask=mask)
    tl.store(out + where + Q, tl.cos(angle).to(out.dtype.element_ty), mask=mask)


def fused_grid_positions(grid_cells: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Tensor:
    """See `grid_positions`; the frequencies are radians a cell, float64."""
    quarter = len(frequencies)
    out = torch.empty((*grid_cells.shape[:-1], 4 * quarter), dtype=dtype, device=grid_cells.device)
    tiles = grid_cells.numel() // 2
    arguments = (grid_cells.contiguous(), frequencies / TWO_PI.value, out, tiles)
    launch(_positions, (-(-tiles // 8), 2), arguments, (quarter, triton.next_power_of_2(quarter), 8))
    return out

"""The 2-D sine-cosine position of tiles, as GigaPath's slide encoder adds it to their embeddings."""

from functools import cache

import torch
from torch import Tensor

from .dilated_attention import has_kernels

POSITION_BASE = 10_000.0


def grid_positions(grid_cells: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The 2-D sine-cosine position of grid cells, computed: no table, no limit to the grid.

    The first half of the width encodes the row, the second the column, each as `[sin | cos]`.

    Args:
        grid_cells: `(..., 2)` integer (column, row).
        width: Width of the position, a multiple of 4.
        dtype: Of the position.

    Returns:
        `(..., width)` of the dtype.
    """
    frequencies = _frequencies(width, grid_cells.device)
    if has_kernels(grid_cells) and grid_cells.numel():
        from .positions_fused import fused_grid_positions  # imports triton, which not every machine has

        return fused_grid_positions(grid_cells, frequencies, dtype)
    rows_and_columns, which = torch.unique(grid_cells.flip(-1), return_inverse=True)  # few, of however many tiles
    angles = rows_and_columns[:, None] * frequencies  # float64: a row of some thousands times a frequency near 1
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)[which].flatten(-2)


@cache  # for good: a CUDA graph may read it
def _frequencies(width: int, device: torch.device) -> Tensor:
    """Radians a cell, `(width / 4,)` float64."""
    with torch.inference_mode(False):  # kept for later calls, which may save it for their backward
        steps = torch.arange(width // 4, dtype=torch.float64)
        return (POSITION_BASE ** (-steps / (width / 4))).to(device)

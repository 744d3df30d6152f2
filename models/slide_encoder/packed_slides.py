"""Slides packed end to end: where each is among the tokens, and what is refused of tiles and their grid cells."""

from functools import cache

import torch
from torch import Tensor

from ...bag_lengths import lengths_of, with_lengths
from ...errors import LongslideError
from ..later import Later
from .dilated_attention.parallel import SequenceShards
from .spec import SlideEncoderFacts


def pack_slides(
    tile_features: Tensor,
    grid_cells: Tensor,
    cu_seqlens: Tensor | None,
    spec: SlideEncoderFacts,
    *,
    parts: bool = False,
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """A batch of slides of one length, or packed ones as they are, held against what an encoder reads.

    Args:
        tile_features: `(B, N, tile_dim)`, or with `cu_seqlens` `(T, tile_dim)`.
        grid_cells: `(B, N, 2)` integer, or `(T, 2)`.
        cu_seqlens: For packed slides `(B + 1,)` integer: where each slide's tiles begin, and T.
        spec: The facts of the encoder.
        parts: Whether these are a rank's parts of slides, of which it may have no tile.

    Returns:
        `(T, tile_dim)`, `(T, 2)`, `(B + 1,)` and the lengths of the slides.

    Raises:
        LongslideError: Shapes or dtypes do not fit, or a slide is empty.
    """
    some = not parts or tile_features.numel() > 0
    if cu_seqlens is None:
        if some:
            _check_shapes(tile_features, grid_cells, spec)
        lengths = [tile_features.shape[1]] * len(tile_features)
        cu_seqlens = torch.arange(len(lengths) + 1, dtype=torch.int32, device=tile_features.device) * lengths[0]
        return tile_features.flatten(0, 1), grid_cells.flatten(0, 1), cu_seqlens, lengths
    if some:
        _check_shapes(tile_features[None], grid_cells[None], spec)
    lengths = lengths_of(cu_seqlens)
    if min(lengths) < (not parts) or sum(lengths) != len(tile_features):
        raise LongslideError(
            f"cu_seqlens of slides with {lengths} tiles do not fit {len(tile_features)} tile embeddings; each slide "
            "has at least one tile"
        )
    return tile_features, grid_cells, cu_seqlens, lengths


def _check_shapes(tile_features: Tensor, grid_cells: Tensor, spec: SlideEncoderFacts) -> None:
    """Hold a batch `(B, N, tile_dim)` and its cells `(B, N, 2)` against what an encoder reads."""
    if tile_features.ndim != 3 or grid_cells.shape != (*tile_features.shape[:2], 2) or tile_features.shape[1] == 0:
        raise LongslideError(
            f"tile_features {tuple(tile_features.shape)} and grid_cells {tuple(grid_cells.shape)} must be (B, N, "
            f"{spec.tile_dim}) and (B, N, 2) with N at least 1"
        )
    if tile_features.shape[2] != spec.tile_dim:
        raise LongslideError(
            f"slide encoder {spec.name!r} reads tile embeddings of length {spec.tile_dim} (of {spec.tile_encoder}), "
            f"not {tile_features.shape[2]}"
        )
    if grid_cells.is_floating_point():
        raise LongslideError("grid_cells must be integers (column, row), not level-0 pixels as floats")


def ends(tokens: int, device: torch.device) -> Tensor:
    """The cumulative lengths of one sequence, `(2,)` int32."""
    if tokens == 0:
        return torch.zeros(2, dtype=torch.int32, device=device)
    return torch.arange(0, 2 * tokens, tokens, dtype=torch.int32, device=device)


class PackedSlides:
    """Where packed slides are: `lengths` in tiles each, `cu_seqlens` `(B + 1,)` int32, to which it adds the cls tokens.

    With `shards` this rank has `lengths` tiles of them, and `cls_tokens` before each: one if it is the first, else none.
    """

    _of_tile: Tensor | None
    """Each tile's slide, `(T,)` int64; None of one slide."""

    def __init__(
        self,
        lengths: list[int],
        cu_seqlens: Tensor,
        grid_cells: Tensor,
        shards: SequenceShards | None = None,
    ) -> None:
        device = cu_seqlens.device
        self.lengths = lengths
        self.shards = shards
        self.cls_tokens = 1 if shards is None or shards.rank == 0 else 0
        self.grid_cells = grid_cells
        if len(lengths) == 1:
            self.cu_seqlens = ends(lengths[0] + self.cls_tokens, device)
            self._of_tile = None
        else:
            before = self.cls_tokens * torch.arange(len(cu_seqlens), dtype=torch.int32, device=device)
            self.cu_seqlens = cu_seqlens.int() + before
            with_lengths(self.cu_seqlens, [n + self.cls_tokens for n in lengths])
            counts = self.cu_seqlens.diff() - self.cls_tokens
            self._of_tile = torch.arange(len(lengths), device=device).repeat_interleave(
                counts, output_size=sum(lengths)
            )
        self._ready: torch.cuda.Event | None = None  # when the cells are there, for the stream that checks them
        if grid_cells.is_cuda and not torch.compiler.is_compiling():
            self._ready = torch.cuda.current_stream(grid_cells.device).record_event()

    def rows_of_tiles(self) -> Tensor:
        """`(T,)` int64, where each tile is among the tokens."""
        rows = torch.arange(self.cls_tokens, len(self.grid_cells) + self.cls_tokens, device=self.grid_cells.device)
        return rows if self._of_tile is None else rows + self.cls_tokens * self._of_tile

    def check(self, later: Later | None = None) -> None:
        """Refuse grid cells that cannot be right. On a GPU beside what has been launched, so that it does not wait for this.

        Args:
            later: What looks at the cells of a GPU when the answer is there, so that the host does not wait for it either.

        Raises:
            LongslideError: A negative cell or one beyond any slide, or two tiles of a slide in one cell.
        """
        if len(self.grid_cells) == 0:
            return
        if self._ready is None or torch.compiler.is_compiling():
            _refuse(cell_faults(self.grid_cells, self._of_tile))
            return
        stream = _side_stream(self.grid_cells.device)
        with torch.cuda.stream(stream):
            stream.wait_event(self._ready)
            faults = cell_faults(self.grid_cells, self._of_tile)
            if later is None:
                _refuse(faults)
                return
            for read in (self.grid_cells, self._of_tile):
                if read is not None:
                    read.record_stream(stream)  # else their memory may be another's before they are read
            later.put(faults, _refuse)


def _refuse(faults: Tensor) -> None:
    outside, twice = faults.tolist()
    if outside:
        raise LongslideError(
            f"grid cell below 0 or of {MAX_CELL:,} or more: cells are coords // step_level0, counted from the slide's corner"
        )
    if twice:
        raise LongslideError(
            "two tiles in one grid cell: cells must be coords // step_level0, with the step between tiles in level-0 pixels"
        )


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


MAX_CELL = 2**22
"""No slide has as many columns or rows of tiles; 2 ** 19 slides of them fit an int64 each."""


def cell_faults(grid_cells: Tensor, slide: Tensor | None) -> Tensor:
    """Whether a cell is negative or beyond any slide, and whether two tiles of a slide are in one: two booleans.

    Args:
        grid_cells: `(T, 2)` integer (column, row) of each tile.
        slide: `(T,)` the slide each tile belongs to; None for one slide.
    """
    grid_cells = grid_cells.long()
    columns, rows = grid_cells.unbind(-1)
    place = torch.add(columns, rows, alpha=MAX_CELL)
    if slide is not None:
        place.add_(slide, alpha=MAX_CELL * MAX_CELL)
    ordered = place.sort().values
    return torch.stack([(grid_cells // MAX_CELL).any(), (ordered[1:] == ordered[:-1]).any()])

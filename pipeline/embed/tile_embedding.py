"""Tiles to embeddings on one device, kept busy: uploads, the encoder and downloads overlap."""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from ...data.tiles.stream import TileBatch
from ...errors import LongslideError
from ...models.slide_encoder.base import AnySlideEncoder
from ...models.slide_encoder.cuda_graphs import GraphedEncoder
from ...models.slide_encoder.encoder import SlideEncoder
from ...models.tile_encoder.encoder import TileEncoder

Precision = Literal["float32", "float16", "bfloat16"]

# Batches launched on the device before the oldest one's result is fetched: enough to hide the copies, few enough to
# bound the memory.
IN_FLIGHT = 3


def resolve_device(device: str) -> torch.device:
    """The device `auto` stands for: the first NVIDIA GPU, or the CPU; any other word is a torch device name.

    Raises:
        LongslideError: Not a device, or not one of this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise LongslideError(
            f"device {device!r} is not available here ({str(error).splitlines()[0]}); use --device auto"
        ) from error
    if resolved.type == "cuda" and resolved.index is not None:
        torch.cuda.set_device(resolved)  # Triton launches its kernels on the current device
    return resolved


def resolve_precision(precision: str, recommended: str, device: torch.device) -> Precision:
    """The precision `auto` stands for: the encoder's own on a GPU, float32 on a CPU."""
    if precision == "auto":
        precision = "float32" if device.type == "cpu" else recommended
    return cast(Precision, precision)


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Mixed precision on a device; none for float32."""
    dtype = getattr(torch, precision)
    return torch.autocast(device.type, dtype=dtype if precision != "float32" else None, enabled=precision != "float32")


class TileEmbedder:
    """Runs a tile encoder over streams of tiles.

    When the GPU runs out of memory the batch is halved, for this and all later batches, and the work goes on.

    Args:
        encoder: Maps `(B, H, W, 3)` uint8 tiles to `(B, D)` embeddings; already on `device`.
        device: Where the encoder is.
        precision: Autocast precision; float32 for none.
    """

    def __init__(self, encoder: TileEncoder, device: torch.device, precision: Precision) -> None:
        self.encoder = encoder
        self.device = device
        self.precision = precision
        self.max_batch: int | None = None  # known once the memory ran out

    def __call__(
        self, batches: Iterable[TileBatch], on_batch: Callable[[int], None] = lambda tiles: None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embed all tiles of a stream.

        Args:
            batches: The tiles, in order.
            on_batch: Called with the number of tiles after each finished batch.

        Returns:
            `(N, D)` embeddings, float32 for that precision and float16 otherwise, and the `(N,)` int64 rows of the
            grid they belong to. `(0, 0)` when the stream was empty.

        Raises:
            LongslideError: An embedding is not finite, or a single tile does not fit in the device's memory.
        """
        pending: deque[tuple[Tensor, np.ndarray]] = deque()
        features: list[np.ndarray] = []
        index: list[np.ndarray] = []

        def fetch() -> None:
            embedding, rows = pending.popleft()
            features.append(embedding.cpu().numpy())
            index.append(rows)
            on_batch(len(rows))

        for batch in batches:
            pending.append((self._embed(torch.from_numpy(batch.tiles)), batch.index))
            if len(pending) > IN_FLIGHT:
                fetch()
        while pending:
            fetch()
        if not features:
            return np.zeros((0, 0), np.float16), np.zeros(0, np.int64)
        embeddings = np.concatenate(features)
        if not np.isfinite(embeddings).all():
            raise LongslideError(
                f"embeddings are not finite in {self.precision}; try --precision "
                f"{'bfloat16' if self.precision == 'float16' else 'float32'}"
            )
        return embeddings, np.concatenate(index)

    @torch.inference_mode()
    def _embed(self, tiles: Tensor) -> Tensor:
        if self.device.type == "cuda":
            tiles = tiles.pin_memory().to(self.device, non_blocking=True)
        dtype = torch.float32 if self.precision == "float32" else torch.float16
        while True:
            try:
                with autocast(self.device, self.precision):
                    parts = [self.encoder(part) for part in torch.split(tiles, self.max_batch or len(tiles))]
                return torch.cat(parts).to(dtype)
            except torch.OutOfMemoryError as error:
                smallest = min(self.max_batch or len(tiles), len(tiles))
                if smallest == 1:
                    raise LongslideError(
                        f"one tile does not fit in the memory of {self.device}; use --device cpu, or free the GPU"
                    ) from error
                self.max_batch = smallest // 2
            torch.cuda.empty_cache()  # outside the handler: the error's traceback keeps the failed batch's tensors


def slide_encoder_on(device: torch.device, encoder: AnySlideEncoder) -> AnySlideEncoder:
    """A slide encoder on a device; one of the package with CUDA graphs for short slides."""
    if isinstance(encoder, nn.Module):
        encoder = encoder.to(device)
    return GraphedEncoder(encoder) if isinstance(encoder, SlideEncoder) else encoder


@torch.inference_mode()
def embed_slide(
    slide_encoder: AnySlideEncoder,
    features: np.ndarray,
    cells: np.ndarray,
    device: torch.device,
    precision: Precision,
) -> np.ndarray:
    """One slide embedding from all of a slide's tile embeddings.

    Args:
        slide_encoder: Maps `(1, N, D)` and `(1, N, 2)` to `(1, D_slide)`; already on `device`.
        features: `(N, D)` tile embeddings.
        cells: `(N, 2)` integer (column, row) of each tile.
        device: Where the encoder is.
        precision: Autocast precision; float32 for none.

    Returns:
        `(D_slide,)` float32.

    Raises:
        LongslideError: The slide does not fit in the device's memory, or what the encoder gives is no embedding.
    """
    try:
        with autocast(device, precision):
            embedding = slide_encoder(
                torch.from_numpy(features).to(device=device, dtype=torch.float32)[None],
                torch.from_numpy(cells).to(device)[None],
            )
    except torch.OutOfMemoryError as error:
        raise LongslideError(
            f"the slide encoder runs out of memory on {device} with {len(features):,} tiles; the same command with "
            "--device cpu goes on from the tile embeddings"
        ) from error
    if not isinstance(embedding, Tensor) or embedding.ndim != 2 or len(embedding) != 1:
        shape = tuple(embedding.shape) if isinstance(embedding, Tensor) else type(embedding).__name__
        raise LongslideError(f"slide encoder {slide_encoder.name!r} gives {shape}, and not one embedding (1, D)")
    result: np.ndarray = embedding[0].float().cpu().numpy()
    if not np.isfinite(result).all():
        raise LongslideError(f"the embedding of slide encoder {slide_encoder.name!r} is not finite in {precision}")
    return result

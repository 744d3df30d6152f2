"""Tiles to embeddings on one device."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from ...data.features.feature_file import Features
from ...data.tiles.stream import TileBatch
from ...errors import LongslideError
from ...models.slide_encoder.base import AnySlideEncoder
from ...models.slide_encoder.cuda_graphs import GraphedEncoder
from ...models.slide_encoder.encoder import SlideEncoder
from ...models.tile_encoder.encoder import TileEncoder
from ...models.tile_encoder.engine import Precision, TileEngine, weights_dtype

READING_BATCH = 64
"""Tiles that a reader hands over at a time; the encoder's batches are made of these."""


def resolve_device(device: str) -> torch.device:
    """The device `auto` stands for: the first NVIDIA GPU, or the CPU; any other word is a torch device name.

    Raises:
        LongslideError: Not a device, or not one of this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.zeros(1, device=resolved).item()  # "meta" has tensors, but nothing in them
    except (RuntimeError, AssertionError, NotImplementedError) as error:
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
    half = precision != "float32"
    return torch.autocast(device.type, dtype=weights_dtype(precision) if half else None, enabled=half)


class TileEmbedder:
    """Runs a tile encoder over streams of tiles.

    Args:
        encoder: Maps `(B, H, W, 3)` uint8 tiles to `(B, D)` embeddings; float32, on any device.
        device: Where to run.
        precision: What it runs in; see `TileEngine`.
        batch_size: Tiles a batch; None for what is fastest. Halved when the GPU runs out of memory.

    Raises:
        LongslideError: The device or the encoder has no float8.
    """

    def __init__(
        self, encoder: TileEncoder, device: torch.device, precision: Precision, batch_size: int | None = None
    ) -> None:
        self.encoder = encoder
        self.device = device
        self.precision = precision
        self.engine = TileEngine(encoder, device, precision, batch_size)

    @property
    def reading_batch(self) -> int:
        """Tiles that a reader should hand over at a time."""
        return min(READING_BATCH, self.engine.batch_size)

    @property
    def fidelity(self) -> dict[str, float]:
        """How far the first tiles were from float32, for the feature file; empty where it was not measured."""
        measured = self.engine.fidelity
        return {} if measured is None else {f"fidelity_{name}": value for name, value in asdict(measured).items()}

    def __call__(
        self, batches: Iterable[TileBatch], on_batch: Callable[[int], None] = lambda tiles: None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embed all tiles of a stream.

        Args:
            batches: The tiles, in order.
            on_batch: Called with a number of tiles whenever so many more are embedded.

        Returns:
            `(N, D)` embeddings, float32 for that precision and float16 otherwise, and the `(N,)` int64 rows of the
            grid they belong to. `(0, 0)` when the stream was empty.

        Raises:
            LongslideError: An embedding is not finite, a single tile does not fit in the device's memory, or float8 is too
                coarse for these tiles.
        """
        index: list[np.ndarray] = []

        def tiles() -> Iterator[np.ndarray]:
            for batch in batches:
                index.append(batch.index)
                yield batch.tiles

        features: list[np.ndarray] = []
        for part in self.engine.stream(tiles()):
            features.append(part)
            on_batch(len(part))
        if not features:
            return np.zeros((0, 0), np.float16), np.zeros(0, np.int64)
        embeddings = np.concatenate(features)
        if not np.isfinite(embeddings).all():
            raise LongslideError(
                f"embeddings are not finite in {self.precision}; try --precision "
                f"{'bfloat16' if self.precision == 'float16' else 'float32'}"
            )
        return embeddings, np.concatenate(index)


def slide_encoder_on(device: torch.device, encoder: AnySlideEncoder) -> AnySlideEncoder:
    """A slide encoder on a device; one of the package with CUDA graphs for short slides."""
    if isinstance(encoder, nn.Module):
        encoder = encoder.to(device)
    return GraphedEncoder(encoder) if isinstance(encoder, SlideEncoder) else encoder


@torch.inference_mode()
def embed_slide(
    slide_encoder: AnySlideEncoder, features: Features, device: torch.device, precision: Precision
) -> Features:
    """Add one slide embedding, from all of a slide's tile embeddings.

    Args:
        slide_encoder: The slide encoder, already on `device`.
        features: The slide's features.
        device: Where the encoder is.
        precision: Autocast precision; float32 for none.

    Returns:
        The features with `slide_embedding`, `(D_slide,)` float32, and what made it.

    Raises:
        LongslideError: The encoder does not read these embeddings, the slide does not fit in the device's memory, or what
            the encoder gives is no embedding.
    """
    try:
        with autocast(device, precision):
            embedding = slide_encoder(
                torch.from_numpy(features.features).to(device=device, dtype=torch.float32)[None],
                torch.from_numpy(features.cells).to(device)[None],
            )
    except torch.OutOfMemoryError as error:
        raise LongslideError(
            f"the slide encoder runs out of memory on {device} with {len(features.features):,} tiles; the same command "
            "with --device cpu goes on from the tile embeddings"
        ) from error
    if not isinstance(embedding, Tensor) or embedding.ndim != 2 or len(embedding) != 1:
        shape = tuple(embedding.shape) if isinstance(embedding, Tensor) else type(embedding).__name__
        raise LongslideError(f"slide encoder {slide_encoder.name!r} gives {shape}, and not one embedding (1, D)")
    result: np.ndarray = embedding[0].float().cpu().numpy()
    if not np.isfinite(result).all():
        raise LongslideError(f"the embedding of slide encoder {slide_encoder.name!r} is not finite in {precision}")
    return replace(
        features,
        slide_embedding=result,
        slide_encoder=slide_encoder.name,
        slide_weights=slide_encoder.weights,
        pool=getattr(slide_encoder, "pool", None),
    )

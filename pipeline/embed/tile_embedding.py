"""Tiles to embeddings on one device."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from ...data.features.features import Features
from ...data.tiles.readers import TileReaders
from ...data.tiles.stream import TileStream, read_slides
from ...errors import LongslideError
from ...models.slide_encoder.base import AnySlideEncoder
from ...models.slide_encoder.cuda_graphs import GraphedEncoder
from ...models.slide_encoder.encoder import SlideEncoder
from ...models.tile_encoder.encoder import TileEncoder
from ...models.tile_encoder.engine import Precision, TileEngine, weights_dtype
from .waits import Waits

T = TypeVar("T")


class EmbeddedTiles(NamedTuple):
    """`(N, D)` embeddings and the `(N,)` int64 rows of the grid they belong to; `(0, 0)` if there are none.

    They are float32 in that precision, else float16.
    """

    embeddings: np.ndarray
    rows: np.ndarray


@dataclass
class _Slide(Generic[T]):
    """A slide on its way through the encoder; `pushed` and `received` count tiles."""

    key: T
    stream: TileStream | None
    index: list[np.ndarray] = field(default_factory=list)
    parts: list[np.ndarray] = field(default_factory=list)
    pushed: int = 0
    received: int = 0
    error: Exception | None = None
    all_read: bool = False


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


def resolve_devices(devices: str) -> list[str]:
    """The devices that `all` stands for, the machine's NVIDIA GPUs; or a list such as `0,1,5` or `cuda:0,cuda:1`.

    Raises:
        LongslideError: There is none, or one is not of this machine, or named twice.
    """
    if devices == "all":
        names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        if not names:
            raise LongslideError("--devices all: there is no NVIDIA GPU here; leave it out to work on the CPU")
        return names
    names = [f"cuda:{name.strip()}" if name.strip().isdecimal() else name.strip() for name in devices.split(",")]
    for name in names:
        if name.startswith("cuda") and names.count(name) > 1:
            raise LongslideError(f"--devices {devices}: {name} is there twice")
        if name.removeprefix("cuda:").isdecimal():  # a GPU is not touched: each takes half a gigabyte of it
            if int(name.removeprefix("cuda:")) >= torch.cuda.device_count():
                raise LongslideError(
                    f"--devices {devices}: {name} is not one of the {torch.cuda.device_count()} GPUs here"
                )
        else:
            resolve_device(name)
    return names


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one of this thread, on which Triton launches its kernels."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


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
        self.waits = Waits()

    @property
    def fidelity(self) -> dict[str, float]:
        """How far the first tiles were from float32, for the feature file; empty where it was not measured."""
        measured = self.engine.fidelity
        return {} if measured is None else {f"fidelity_{name}": value for name, value in asdict(measured).items()}

    def __call__(
        self,
        slides: Iterable[tuple[T, TileStream | None]],
        readers: TileReaders,
        on_slide: Callable[[T, int], None] = lambda key, tiles: None,
        on_tiles: Callable[[int], None] = lambda tiles: None,
        stop: Callable[[], None] = lambda: None,
    ) -> Generator[tuple[T, EmbeddedTiles | Exception | None]]:
        """Embed the tiles of slides as one stream: neither the readers nor the device wait for the end of a slide.

        Args:
            slides: Each slide with its tiles, or None where there is nothing to embed; asked for in another thread.
            readers: What reads the tiles.
            on_slide: Called with a slide and the number of its tiles when its first embeddings come.
            on_tiles: Called with a number of tiles whenever so many more of that slide are embedded.
            stop: Called where this is given up, as by Ctrl-C, so that asking for the next slide does not wait any longer.

        Yields:
            Each slide, in order, with its embeddings; with None where there was nothing to embed; or with the error that
            ended it: in reading, or because an embedding is not finite, a single tile does not fit in the device's memory,
            or float8 is too coarse for these tiles.
        """
        waiting: deque[_Slide[T]] = deque()
        self.engine.drop()  # what a run that was given up has left there
        self.waits = waits = Waits()

        def embed(parts: Iterator[np.ndarray]) -> None:
            try:
                for part in parts:
                    self._hand_out(part, waiting, on_slide, on_tiles)
            except Exception as error:
                self.engine.drop()
                for slide in waiting:
                    if slide.received < slide.pushed or not slide.all_read:
                        slide.error, slide.pushed = slide.error or error, slide.received

        streams = ((_Slide(key, stream), stream) for key, stream in slides)
        for event in read_slides(streams, readers, stop=stop):
            if event is None:
                waits.lap("slides")
                embed(self.engine.flush())
            else:
                slide, read = event
                waits.lap("tiles" if waiting and waiting[-1] is slide else "slides")
                if not waiting or waiting[-1] is not slide:
                    waiting.append(slide)
                if read is None:
                    slide.all_read = True
                elif isinstance(read, Exception):
                    slide.error = slide.error or read
                else:
                    if slide.error is None:
                        slide.index.append(read.index)
                        slide.pushed += len(read.tiles)
                        waits.tiles += len(read.tiles)
                        embed(self.engine.push(read.tiles))
                    read.release()
            waits.lap("encoder")
            while waiting and waiting[0].all_read and waiting[0].received == waiting[0].pushed:
                yield self._ended(waiting.popleft())
                waits.lap("writing")
        if waiting:
            embed(self.engine.flush())
            waits.lap("encoder")
        yield from map(self._ended, waiting)

    @staticmethod
    def _hand_out(
        part: np.ndarray,
        waiting: Iterable[_Slide[T]],
        on_slide: Callable[[T, int], None],
        on_tiles: Callable[[int], None],
    ) -> None:
        """Give embeddings to the slides whose tiles they are of; both come in the order in which the tiles were pushed."""
        for slide in waiting:
            taken = part[: slide.pushed - slide.received]
            if not len(taken):
                continue
            if not slide.parts:
                on_slide(slide.key, 0 if slide.stream is None else len(slide.stream))
            slide.parts.append(taken)
            slide.received += len(taken)
            on_tiles(len(taken))
            part = part[len(taken) :]

    def _ended(self, slide: _Slide[T]) -> tuple[T, EmbeddedTiles | Exception | None]:
        if slide.stream is None or slide.error is not None:
            return slide.key, slide.error
        if not slide.parts:
            return slide.key, EmbeddedTiles(np.zeros((0, 0), np.float16), np.zeros(0, np.int64))
        embeddings = np.concatenate(slide.parts)
        if not np.isfinite(embeddings).all():
            other = "bfloat16" if self.precision == "float16" else "float32"
            error = LongslideError(f"embeddings are not finite in {self.precision}; try --precision {other}")
            return slide.key, error
        return slide.key, EmbeddedTiles(embeddings, np.concatenate(slide.index))


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
        with on_device(device), autocast(device, precision):
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

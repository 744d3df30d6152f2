"""A tile encoder at the speed of its device: weights in the precision they run in, compiled blocks, CUDA graphs, copies
that overlap.

On a GPU an encoder loses a third to three quarters of its rate to autocast, which casts all weights and activations again in
every batch, and to the launches of its kernels. Here weights are cast once; the blocks of a transformer are compiled, one
graph for all depths; a whole forward of a fixed number of tiles is one CUDA graph; and tiles go up and embeddings come down
beside it. What an encoder does not stand (dtypes set by hand, a sync within) it is spared, with a remark.
"""

import copy
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import LongslideError
from .compilation import compile_blocks, compile_transform
from .float8 import Fidelity, Float8Linear, fidelity, fits_float8, has_float8, product_dtype

logger = logging.getLogger(__name__)

Precision = Literal["float32", "float16", "bfloat16", "float8"]
"""float8: linear layers in float8, everything else in float16."""

BATCH_SIZE = 256
"""Tiles of a batch on a GPU."""
IN_FLIGHT = 3
"""Batches handed to the device before the oldest one's embeddings are fetched: copies hide, memory stays bounded."""
LEAST_COSINE = 0.999
LEAST_MEAN_COSINE = 0.9999
"""Float8 below one of these is refused."""
FIDELITY_TILES = 256


def weights_dtype(precision: Precision) -> torch.dtype:
    """The dtype that weights are held in."""
    return torch.float16 if precision == "float8" else getattr(torch, precision)


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    tiles: Tensor
    embeddings: Tensor


class _Slot:
    """Memory of one batch on its way: pinned tiles, tiles on the device, pinned embeddings."""

    def __init__(self, tiles: int, shape: tuple[int, ...], device: torch.device) -> None:
        self.host = torch.empty(tiles, *shape, dtype=torch.uint8, pin_memory=True)
        self.device = torch.empty(tiles, *shape, dtype=torch.uint8, device=device)
        self.embeddings: Tensor | None = None
        event: Any = torch.cuda.Event
        self.uploaded, self.done = event(), event()
        self.filled = 0


class TileEngine:
    """Runs a tile encoder on one device.

    Args:
        encoder: Maps `(B, H, W, 3)` uint8 tiles to `(B, D)` embeddings; on any device, in float32. It is not changed, and
            its weights are not held twice on one device in one precision.
        device: Where to run.
        precision: What the weights and products are in.
        batch_size: Tiles of a batch; by default what is fastest. Halved, for good, when the device runs out of memory.
        compiles: Whether repeated blocks are compiled; by default on a GPU, but for float32.
        pads: Whether batches are filled up to `batch_size`; by default on a GPU.

    Attributes:
        remarks: What the encoder does not stand, a sentence each.
        fidelity: How far the first tiles are from float32; measured in float8.

    Raises:
        LongslideError: Float8 on a device that has none, or of an encoder without linear layers.
    """

    def __init__(
        self,
        encoder: nn.Module,
        device: torch.device,
        precision: Precision = "float32",
        batch_size: int | None = None,
        *,
        compiles: bool | None = None,
        pads: bool | None = None,
    ) -> None:
        on_gpu = device.type == "cuda"
        self.encoder = encoder
        self.device = device
        self.precision = precision
        self.batch_size = batch_size or (BATCH_SIZE if on_gpu else 64)
        self.remarks: list[str] = []
        self.fidelity: Fidelity | None = None
        self._compiles = on_gpu and precision != "float32" if compiles is None else compiles
        self._pads = on_gpu if pads is None else pads
        self._graphs: dict[tuple[int, ...], _Graph] | None = {} if on_gpu else None
        self._pool: Any = None
        self._copies: Any = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._slots: deque[_Slot] = deque()
        self._filling: _Slot | None = None
        self._launched: deque[_Slot] = deque()
        self._autocast = False
        self._run: Callable[[Tensor], Tensor] = self._prepare()
        self._warm: set[tuple[int, ...]] = set()

    def _prepare(self) -> nn.Module:
        """The encoder with its weights as they run."""
        if self.precision == "float8" and not has_float8(self.device):
            raise LongslideError(
                f"--precision float8 needs an NVIDIA GPU of compute capability 8.9 or more, not {self.device}; use float16"
            )
        try:
            network = placed(self.encoder, self.device, weights_dtype(self.precision))
        except (TypeError, AttributeError, NotImplementedError) as error:  # of copy.deepcopy
            if self.precision == "float8":
                raise LongslideError(f"float8: the tile encoder cannot be copied ({error}); use float16") from error
            self._compiles, self._autocast = False, self.precision != "float32"
            self._remark(f"the tile encoder cannot be copied: it runs as it is, with autocast ({error})")
            return self.encoder.to(self.device)
        if self.precision == "float8":
            replace_linears(network, self.encoder, self.device)
        if self._compiles:
            compile_blocks(network)
            compile_transform(network, weights_dtype(self.precision))
        return network

    @torch.inference_mode()
    def __call__(self, tiles: Tensor) -> Tensor:
        """Embed tiles.

        Args:
            tiles: `(B, H, W, 3)` uint8, B at least 1.

        Returns:
            `(B, D)` on the engine's device: float32 in that precision, else float16.

        Raises:
            LongslideError: One tile does not fit in the device's memory.
        """
        tiles = tiles.to(self.device)
        while True:
            try:
                return torch.cat([self._fixed(part) for part in torch.split(tiles, self.batch_size)])
            except torch.OutOfMemoryError as error:
                smallest = self.batch_size if self._pads else min(self.batch_size, len(tiles))
                if smallest == 1:
                    raise LongslideError(
                        f"one tile does not fit in the memory of {self.device}; use --device cpu, or free the GPU"
                    ) from error
                self.batch_size = smallest // 2
            self._forget()  # outside the handler: the error's traceback keeps the failed batch's tensors

    def push(self, tiles: np.ndarray) -> Iterator[np.ndarray]:
        """Take tiles in; they have been read when this ends. What they give may come with later calls.

        Args:
            tiles: `(B, H, W, 3)` uint8, of any B.

        Yields:
            `(B', D)` embeddings of these tiles or earlier ones, in the order of the tiles.

        Raises:
            LongslideError: One tile does not fit in the device's memory; float8 is too coarse for these tiles.
        """
        left = torch.from_numpy(tiles)
        if self.device.type != "cuda":
            embeddings = self(left)
            self._check_fidelity(left, embeddings)
            yield embeddings.numpy()
            return
        while len(left):
            if self._filling is None:
                self._filling = self._free_slot(tuple(left.shape[1:]))
            slot = self._filling
            taken = left[: len(slot.host) - slot.filled]
            slot.host[slot.filled : slot.filled + len(taken)].copy_(taken)
            slot.filled += len(taken)
            left = left[len(taken) :]
            if slot.filled == len(slot.host):
                self._launch()
                while len(self._launched) >= IN_FLIGHT:
                    yield self._fetch()

    def flush(self) -> Iterator[np.ndarray]:
        """Embed what has been pushed, without waiting for more.

        Yields:
            `(B', D)` embeddings, as `push` does.

        Raises:
            LongslideError: As `push` does.
        """
        if self._filling is not None:
            self._launch()
        while self._launched:
            yield self._fetch()

    def drop(self) -> None:
        """Forget the tiles that have been pushed and not been given back."""
        for slot in self._launched:
            slot.done.synchronize()
        self._slots.extend(self._launched)
        self._launched.clear()
        self._filling = None

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Embed a stream of tiles: `push` for each batch, then `flush`."""
        try:
            for batch in batches:
                yield from self.push(batch)
            yield from self.flush()
        finally:
            self.drop()

    def _fixed(self, tiles: Tensor) -> Tensor:
        """Embed at most a batch; padded to a whole one if the engine pads.

        There is one size only, so that an embedding is the same to the last bit whatever else is in the batch: products of
        other sizes may be other kernels.
        """
        count, size = len(tiles), self.batch_size
        if not self._pads:
            return self._embed(tiles)
        if self._graphs is not None:
            graph = self._graph(size, tiles)
            if graph is not None:
                graph.tiles[:count].copy_(tiles)
                graph.graph.replay()
                return graph.embeddings[:count].clone()
        if count < size:
            tiles = torch.cat([tiles, tiles.new_zeros(size - count, *tiles.shape[1:])])
        return self._embed(tiles)[:count]

    def _embed(self, tiles: Tensor) -> Tensor:
        """One forward, in the first of the ways that the encoder stands."""
        key = (*tiles.shape, self._compiles)
        started = time.monotonic()
        try:
            embeddings = self._forward(tiles)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if isinstance(error, LongslideError) or not self._fall_back(error):
                raise
            return self._embed(tiles)
        if self._compiles and key not in self._warm:
            self._warm.add(key)
            logger.info("compiled for batches of %d tiles in %.0f s", len(tiles), time.monotonic() - started)
        return embeddings

    def _forward(self, tiles: Tensor) -> Tensor:
        with torch.autocast(self.device.type, weights_dtype(self.precision), enabled=self._autocast):
            embeddings = self._run(tiles)
        return embeddings.to(torch.float32 if self.precision == "float32" else torch.float16)

    def _fall_back(self, error: Exception) -> bool:
        """Take the next plainer way; False if there is none."""
        reason = " ".join(str(error).split())[:200]
        if self._compiles:
            self._compiles = False
            self._remark(f"the tile encoder cannot be compiled and runs as it is ({reason})")
        elif self.precision in ("float16", "bfloat16") and not self._autocast:
            self._autocast = True
            self._remark(
                f"the tile encoder runs by autocast, which is slower than weights in {self.precision} ({reason})"
            )
        else:
            return False
        self._run = placed(self.encoder, self.device, torch.float32) if self._autocast else self._prepare()
        return True

    def _remark(self, remark: str) -> None:
        self.remarks.append(remark)
        logger.warning("%s", remark)

    def _graph(self, size: int, like: Tensor) -> _Graph | None:
        """The graph of a number of tiles; None if the encoder has none."""
        assert self._graphs is not None
        key = (size, *like.shape[1:])
        if key in self._graphs:
            return self._graphs[key]
        tiles = torch.zeros(size, *like.shape[1:], dtype=torch.uint8, device=self.device)
        stream: Any = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled and chosen outside the graph
                self._embed(tiles)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            # A reader's thread may pin memory meanwhile: only this thread's calls are held to what a capture allows.
            capture = torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local")
            with capture:
                embeddings = self._forward(tiles)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.synchronize(self.device)
            self._remark(f"the tile encoder runs without CUDA graphs ({' '.join(str(error).split())[:200]})")
            self._graphs = None
            return None
        self._graphs[key] = _Graph(graph, tiles, embeddings)
        return self._graphs[key]

    def _forget(self) -> None:
        """Free what batches of another size have taken."""
        if self._graphs is not None:
            self._graphs.clear()
            self._pool = None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def _free_slot(self, shape: tuple[int, ...]) -> _Slot:
        self._slots = deque(slot for slot in self._slots if slot.host.shape[1:] == shape)
        if self._slots:
            slot = self._slots.popleft()
        else:
            slot = _Slot(self.batch_size, shape, self.device)
            # Its memory may be what a kernel that has yet to run still uses: the allocator knows of one stream only.
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
        slot.filled = 0
        return slot

    @torch.inference_mode()
    def _launch(self) -> None:
        """Hand the batch that was filled to the device; nothing here waits for it."""
        slot, self._filling = self._filling, None
        assert slot is not None
        count = slot.filled
        main = torch.cuda.current_stream(self.device)
        self._copies.wait_event(slot.done)  # the device's copy of the tiles before these has been read
        with torch.cuda.stream(self._copies):
            slot.device[:count].copy_(slot.host[:count], non_blocking=True)
            slot.uploaded.record(self._copies)
        main.wait_event(slot.uploaded)
        embeddings = self(slot.device[:count])
        self._check_fidelity(slot.device[:count], embeddings)
        if slot.embeddings is None:
            slot.embeddings = torch.empty(len(slot.host), embeddings.shape[1], dtype=embeddings.dtype, pin_memory=True)
        slot.embeddings[:count].copy_(embeddings, non_blocking=True)
        slot.done.record(main)
        self._launched.append(slot)

    def _fetch(self) -> np.ndarray:
        slot = self._launched.popleft()
        slot.done.synchronize()
        assert slot.embeddings is not None
        embeddings: np.ndarray = slot.embeddings[: slot.filled].numpy().copy()
        self._slots.append(slot)
        return embeddings

    def _check_fidelity(self, tiles: Tensor, embeddings: Tensor) -> None:
        """Measure the first tiles in float8 against float32, again when a later batch has more of them.

        Raises:
            LongslideError: The embeddings are too far from those in float32.
        """
        if self.precision != "float8":
            return
        count = min(len(tiles), FIDELITY_TILES)
        if count > max(1, self.fidelity.tiles if self.fidelity else 0):
            self.fidelity = fidelity(embeddings[:count], self.exact(tiles[:count]))
            logger.info("float8: %s", self.fidelity)
        coarse = self.fidelity is not None and (
            self.fidelity.mean_cosine < LEAST_MEAN_COSINE or self.fidelity.least_cosine < LEAST_COSINE
        )
        if coarse:
            raise LongslideError(
                f"float8 is too coarse for this tile encoder and these tiles: {self.fidelity}; at least "
                f"{LEAST_MEAN_COSINE} and {LEAST_COSINE} are asked for. Use --precision float16"
            )

    @torch.inference_mode()
    def exact(self, tiles: Tensor) -> Tensor:
        """`(B, D)` float32 embeddings of tiles on the device, by the encoder as it was given."""
        network = placed(self.encoder, self.device, torch.float32)
        return torch.cat([network(part).float() for part in torch.split(tiles, 32)])


def placed(encoder: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy of an encoder whose weights are on a device and in a dtype; it shares those that already are.

    Batch norms keep float32, in which their statistics are exact and which their kernels take with any input.
    """
    kept = {
        id(tensor)
        for module in encoder.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    memo: dict[int, Any] = {}
    for tensor in (*encoder.parameters(), *encoder.buffers()):
        wanted = dtype if tensor.is_floating_point() and id(tensor) not in kept else None
        moved = tensor.detach().to(device, wanted)
        memo[id(tensor)] = nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved
    return copy.deepcopy(encoder, memo).eval()


def replace_linears(network: nn.Module, original: nn.Module, device: torch.device) -> None:
    """Put float8 layers in the place of a network's linear ones, with the weights of the original.

    Raises:
        LongslideError: It has none.
    """
    names = [name for name, module in original.named_modules() if fits_float8(module)]
    if not names:
        raise LongslideError(
            "--precision float8: the tile encoder has no linear layers that it could speed up; use float16"
        )
    dtype = product_dtype(device)
    for name in names:
        linear: Any = original.get_submodule(name)
        network.set_submodule(name, Float8Linear(linear, dtype).to(device))

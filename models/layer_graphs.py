"""Layers replayed as CUDA graphs: on short sequences launching the kernels takes longer than running them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MAX_TOKENS = 16_384
"""Above it the GPU is the slower part."""


def bucket(tokens: int) -> int:
    """The length that a sequence is run as: an eighth of a power of two further at most, so that graphs are few."""
    step = max(32, 2 ** ((tokens - 1).bit_length() - 4))
    return int(-(-tokens // step) * step)


class LayerGraphs:
    """Runs a function of one sequence's tokens from a graph for each bucket of lengths.

    The kernels find the end of the sequence by the cumulative lengths on the device, so one graph serves every length up to
    its bucket's; the rows past the end are computed and never read. All graphs read and write the same buffers.

    Args:
        run: Maps `(T, width)` tokens and `(2,)` int32 cumulative lengths to `(T, width)`, on one GPU, without gradients.
        module: Whose parameters it uses: graphs are thrown away when these have moved.
    """

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor], module: nn.Module) -> None:
        self._run = run
        self._module = module
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}
        self._buffers: dict[Any, Tensor] = {}
        self._parameters = 0
        self._pool: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the module starts without graphs

    @torch.inference_mode(False)  # what is kept may serve a call outside inference mode
    @torch.no_grad()
    def __call__(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """`(T, width)`; valid until the next call."""
        parameters = hash(tuple(parameter.data_ptr() for parameter in self._module.parameters()))
        if parameters != self._parameters:
            self._graphs.clear()
            self._buffers.clear()
            self._parameters, self._pool = parameters, torch.cuda.graph_pool_handle()
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (bucket(len(x)), x.dtype, autocast)
        if key not in self._graphs:
            self._graphs[key] = self._capture(key[0], x)
        graph, tokens, lengths, output = self._graphs[key]
        tokens[: len(x)].copy_(x)
        lengths.copy_(cu_seqlens)
        graph.replay()
        return output[: len(x)]

    def _capture(self, rows: int, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        tokens = self._buffer("tokens", x)[:rows]
        lengths = self._buffer("lengths", torch.tensor([0, rows], dtype=torch.int32, device=x.device))
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # once outside the graph: kernels are compiled and their look-ups made
            output = self._buffer("output", self._run(tokens, lengths))[:rows]
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # A loader's thread may pin memory meanwhile: only this thread's calls are held to what a capture allows.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output.copy_(self._run(tokens, lengths))
        return graph, tokens, lengths, output

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """The buffer of this name for tensors like this one, as long as the longest sequence."""
        key = (name, like.dtype, like.shape[1:])
        if key not in self._buffers:
            rows = len(like) if like.ndim == 1 else bucket(MAX_TOKENS)
            self._buffers[key] = like.new_zeros(rows, *like.shape[1:])
        return self._buffers[key]

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
    """Runs a function of tokens and cumulative lengths, from a graph for each bucket of lengths.

    The kernels find the sequences by the cumulative lengths on the device, so one graph serves every length up to its
    bucket's; the rows past the end are computed and never read.

    Args:
        run: Maps `(T, width)` tokens and `(B + 1,)` int32 cumulative lengths to `(T, width)`, on one GPU, without gradients.
        module: Whose parameters it uses: graphs are thrown away when these have moved.
    """

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor], module: nn.Module) -> None:
        self._run = run
        self._module = module
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}
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
            self._parameters, self._pool = parameters, torch.cuda.graph_pool_handle()
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (bucket(len(x)), len(cu_seqlens), x.dtype, autocast)
        if key not in self._graphs:
            self._graphs[key] = self._capture(key[0], x, cu_seqlens)
        graph, tokens, lengths, output = self._graphs[key]
        tokens[: len(x)].copy_(x)
        lengths.copy_(cu_seqlens)
        graph.replay()
        return output[: len(x)]

    def _capture(self, rows: int, x: Tensor, cu_seqlens: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        tokens, lengths = x.new_zeros(rows, x.shape[1]), cu_seqlens.clone()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # once outside the graph: kernels are compiled and their look-ups made
            self._run(tokens, lengths)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._run(tokens, lengths)
        return graph, tokens, lengths, output

"""Layers replayed as CUDA graphs: on short sequences launching the kernels takes longer than running them."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MAX_TOKENS = 16_384
"""Above it the GPU is the slower part."""


def bucket(tokens: int) -> int:
    """The length that a sequence is run as: an eighth of a power of two further at most, so that graphs are few."""
    step = max(32, 2 ** ((tokens - 1).bit_length() - 4))
    return int(-(-tokens // step) * step)


@cache
def keeps_activations(device: torch.device) -> bool:
    """Whether a GPU has the memory to spare for the activations of such a sequence: those of GigaPath take 4 GiB."""
    return bool(torch.cuda.get_device_properties(device).total_memory >= 30 * 2**30)


class _Graph(NamedTuple):
    """What is replayed, and where it reads and writes; a backward and its gradients only in training."""

    forward: torch.cuda.CUDAGraph
    tokens: Tensor
    lengths: Tensor
    output: Tensor
    backward: torch.cuda.CUDAGraph | None = None
    grad_output: Tensor | None = None
    grad_tokens: Tensor | None = None
    grad_parameters: Sequence[Tensor] = ()


class _Ticket:
    """Held by a forward for its backward: while it lives and that has not run, no other forward takes its activations."""

    done = False


class LayerGraphs:
    """Runs a function of one sequence's tokens from a graph for each bucket of lengths, and its backward from another.

    The kernels find the end of the sequence by the cumulative lengths on the device, so one graph serves every length up to
    its bucket's; the rows past the end are zeros, computed and never read, and their gradients are zero. All graphs read and
    write the same buffers, and keep their activations in the same memory: that of the longest sequence so far. A second
    forward before the backward of the first runs without graphs, as do modules with hooks (such as those of FSDP). Nothing
    may differentiate twice, and weights that change between a forward and its backward go unnoticed.

    Args:
        run: Maps `(T, width)` tokens and `(2,)` int32 cumulative lengths to `(T, width)`, on one GPU.
        modules: Gives all whose parameters it uses, and no others: graphs are thrown away when these have moved.
    """

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor], modules: Callable[[], Sequence[nn.Module]]) -> None:
        self._run = run
        self._modules = modules
        self._slots: list[tuple[dict[str, nn.Parameter | None], str]] = []
        self._training: tuple[bool, ...] = ()
        self._graphs: dict[Any, _Graph] = {}
        self._buffers: dict[Any, Tensor] = {}
        self._addresses: tuple[int, ...] = ()
        self._pool: Any = None
        self._stream: Any = None
        self._ticket: Callable[[], _Ticket | None] = lambda: None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the module starts without graphs

    def __call__(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """`(T, width)`; without gradients valid until the next call."""
        ticket = self._ticket()
        if (ticket is not None and not ticket.done) or not self._look():
            return self._run(x, cu_seqlens)
        trained = [p for p in self._parameters() if p.requires_grad] if torch.is_grad_enabled() else []
        if trained or (torch.is_grad_enabled() and x.requires_grad):
            output: Tensor = _Replay.apply(self, x, cu_seqlens, *trained)
            return output
        self._ticket = lambda: None
        return self._replay(self._graph(x.detach(), ()), x, cu_seqlens)

    def _look(self) -> bool:
        """Take the modules as they are now; whether graphs can stand for them."""
        modules = [module for root in self._modules() for module in root.modules()]
        self._training = tuple(module.training for module in modules)
        self._slots = [(module._parameters, name) for module in modules for name in module._parameters]
        self._slots = [(parameters, name) for parameters, name in self._slots if parameters[name] is not None]
        hooked = any(
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
            for module in modules
        )
        return len(self._slots) > 0 and not hooked  # replicas of DataParallel have no parameters

    def _parameters(self) -> list[Tensor]:
        return [cast(Tensor, parameters[name]) for parameters, name in self._slots]

    @contextmanager
    def _leaves(self, trained: bool) -> Iterator[list[Tensor]]:
        """Leaves on the memory of trained parameters, in their place: a leaf knows the stream that it was first used on."""
        if not trained:
            yield []
            return
        held = self._parameters()
        for (parameters, name), parameter in zip(self._slots, held, strict=True):
            parameters[name] = nn.Parameter(parameter.detach(), parameter.requires_grad)
        try:
            yield [leaf for leaf in self._parameters() if leaf.requires_grad]
        finally:
            for (parameters, name), parameter in zip(self._slots, held, strict=True):
                parameters[name] = cast(nn.Parameter, parameter)

    @torch.inference_mode(False)  # what is kept may serve a call outside inference mode
    @torch.no_grad()
    def _replay(self, graph: _Graph, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        graph.tokens[: len(x)].copy_(x)
        graph.tokens[len(x) :].zero_()  # no NaN of an earlier slide times the gradient's zero
        graph.lengths.copy_(cu_seqlens)
        graph.forward.replay()
        return graph.output[: len(x)]

    @torch.inference_mode(False)
    def _graph(self, x: Tensor, trained: tuple[Tensor, ...]) -> _Graph:
        addresses = tuple(parameter.data_ptr() for parameter in self._parameters())
        if addresses != self._addresses:
            self._graphs.clear()
            self._buffers.clear()
            self._addresses, self._pool = addresses, torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        wanted = (x.requires_grad, *(parameter.data_ptr() for parameter in trained))
        key = (bucket(len(x)), x.dtype, wanted, autocast, torch.backends.cuda.matmul.fp32_precision, self._training)
        if key not in self._graphs:
            with torch.cuda.device(x.device), torch.random.fork_rng([x.device]):
                self._graphs[key] = self._capture(key[0], x, trained)
        return self._graphs[key]

    def _capture(self, rows: int, x: Tensor, trained: tuple[Tensor, ...]) -> _Graph:
        differentiable = x.requires_grad or len(trained) > 0
        tokens = self._buffer("tokens", x)[:rows].detach().requires_grad_(x.requires_grad)
        whole = torch.tensor([0, rows], dtype=torch.int32, device=x.device)
        lengths = self._buffer("lengths", whole).copy_(whole)  # not those of a longer sequence before
        graphs = [torch.cuda.CUDAGraph() for _ in range(1 + differentiable)]
        self._stream.wait_stream(torch.cuda.current_stream())
        # A loader's thread may pin memory meanwhile: only this thread's calls are held to what a capture allows.
        capture = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with torch.set_grad_enabled(differentiable), self._leaves(len(trained) > 0) as leaves:
            wanted = [*((tokens,) if x.requires_grad else ()), *leaves]
            with torch.cuda.stream(self._stream):  # once outside the graph: kernels are compiled and look-ups made
                found = self._run(tokens, lengths)
                output = self._buffer("output", found)[:rows]
                grad_output = self._buffer("grad_output", found)[:rows] if differentiable else None
                if differentiable:
                    torch.autograd.grad(found, wanted, grad_output)
            torch.cuda.current_stream().wait_stream(self._stream)
            del found
            with torch.cuda.graph(graphs[0], **capture):
                found = self._run(tokens, lengths)
                output.copy_(found.detach())
            if not differentiable:
                return _Graph(graphs[0], tokens, lengths, output)
            grad_tokens = self._buffer("grad_tokens", x)[:rows] if x.requires_grad else None
            grad_parameters = [self._grad_of(parameter) for parameter in trained]
            with torch.cuda.graph(graphs[1], **capture):
                # Retained: a second gradient of the same forward reads the activations again.
                grads = torch.autograd.grad(found, wanted, grad_output, retain_graph=True)
                torch._foreach_copy_([*(() if grad_tokens is None else (grad_tokens,)), *grad_parameters], grads)
        return _Graph(
            graphs[0], tokens.detach(), lengths, output, graphs[1], grad_output, grad_tokens, tuple(grad_parameters)
        )  # fmt: skip

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """The buffer of this name for tensors like this one, as long as the longest sequence."""
        key = (name, like.dtype, like.shape[1:])
        if key not in self._buffers:
            rows = len(like) if like.ndim == 1 else bucket(MAX_TOKENS)
            self._buffers[key] = torch.zeros(rows, *like.shape[1:], dtype=like.dtype, device=like.device)
        return self._buffers[key]

    def _grad_of(self, parameter: Tensor) -> Tensor:
        """Where the backward writes the gradient of a parameter."""
        key = ("grad", parameter.data_ptr())
        if key not in self._buffers:
            self._buffers[key] = torch.empty_like(parameter)
        return self._buffers[key]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graphs: LayerGraphs, x: Tensor, cu_seqlens: Tensor, *trained: Tensor) -> Tensor:
        with torch.enable_grad():
            graph = graphs._graph(x, trained)
        ctx.ticket = _Ticket()
        graphs._ticket = weakref.ref(ctx.ticket)
        ctx.graphs, ctx.graph, ctx.tokens = graphs, graph, len(x)
        return graphs._replay(graph, x, cu_seqlens).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        graphs, graph = ctx.graphs, ctx.graph
        if graphs._ticket() is not ctx.ticket:
            raise RuntimeError("a slide's second backward comes too late: another slide has taken its activations")
        graph.grad_output[: ctx.tokens].copy_(grad)
        graph.grad_output[ctx.tokens :].zero_()
        graph.backward.replay()
        ctx.ticket.done = True
        grads = [torch.empty_like(found) for found in graph.grad_parameters]
        if grads:
            torch._foreach_copy_(grads, graph.grad_parameters)
        grad_x = None if graph.grad_tokens is None else graph.grad_tokens[: ctx.tokens].clone()
        return (None, grad_x, None, *grads)

"""A slide encoder replayed as CUDA graphs: of few tiles launching the kernels takes longer than running them."""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .dilated_attention import has_kernels
from .encoder import SlideEncoder

MAX_TOKENS = 16_384
"""Above it the GPU is the slower part."""


def bucket(tokens: int) -> int:
    """The length that a slide is run as: an eighth of a power of two further at most, so that graphs are few."""
    step = max(32, 2 ** ((tokens - 1).bit_length() - 4))
    return int(-(-tokens // step) * step)


@cache
def keeps_activations(device: torch.device) -> bool:
    """Whether a GPU has the memory to spare for the activations of such a slide: those of GigaPath take 4 GiB."""
    return bool(torch.cuda.get_device_properties(device).total_memory >= 30 * 2**30)


class GraphedEncoder:
    """A slide encoder whose short slides are replayed as CUDA graphs; called as the encoder is, for the same numbers.

    No module: the encoder stays what it is and where it is. Its attributes are the encoder's. Slides that graphs cannot
    stand for (long ones, a CPU, hooks, sequence parallelism, `torch.compile`) go to the encoder itself. A copy starts
    without graphs. See `EncoderGraphs` for what it asks of its caller.

    Args:
        encoder: The slide encoder.
    """

    def __init__(self, encoder: SlideEncoder) -> None:
        self.encoder = encoder
        self._graphs: EncoderGraphs | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphedEncoder, (self.encoder,)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.encoder, name)

    def __call__(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """See `SlideEncoder.forward`."""
        if not self.takes_graphs(tile_features, grid_cells, cu_seqlens):
            embeddings: Tensor = self.encoder(tile_features, grid_cells, cu_seqlens)
            return embeddings
        tile_features, grid_cells, slides = self.encoder.pack(tile_features, grid_cells, cu_seqlens)
        if self._graphs is None:
            self._graphs = EncoderGraphs(self._encode, self._modules_of_encode)
        embeddings = self.encoder.pool_tokens(self._graphs(tile_features, grid_cells, slides.cu_seqlens), slides)
        slides.check(self.encoder.later)
        return embeddings

    def takes_graphs(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor | None) -> bool:
        """Whether the tokens may come from CUDA graphs: of few tiles, by kernels that never ask the host."""
        encoder = self.encoder
        slides = len(tile_features) if cu_seqlens is None else len(cu_seqlens) - 1
        tiles = tile_features.shape[:-1].numel()
        if not 0 < tiles <= MAX_TOKENS - slides or encoder.sequence_group is not None:
            return False
        if not has_kernels(tile_features) or torch.compiler.is_compiling() or torch.is_anomaly_enabled():
            return False
        if encoder._forward_hooks or encoder._forward_pre_hooks:  # they see calls of the encoder itself
            return False
        # Hooks of a checkpoint around the encoder, which saves nothing.
        if torch._C._autograd._top_saved_tensors_default_hooks(True):
            return False
        if getattr(encoder, "_is_replica", False):  # of DataParallel, whose parameters are new in every step
            return False
        if not encoder.cls_token.device == tile_features.device == grid_cells.device:
            return False
        if encoder.recomputes() or (torch.is_grad_enabled() and not keeps_activations(tile_features.device)):
            return False
        from .dilated_attention.fused import eligible  # imports triton, which not every machine has

        spec = encoder.spec
        dtype = encoder.tile_projection.weight.dtype
        return spec.pattern == "dilated" and eligible(dtype, spec.width // spec.heads, tuple(spec.dilated_ratios))

    def _encode(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        """`(N + B, width)` tokens of B slides after all layers."""
        encoder = self.encoder
        x = encoder.project(tile_features, grid_cells)
        if len(cu_seqlens) == 2:
            return encoder.encode(encoder.prepend_cls(x), cu_seqlens)
        # The number of each tile's slide, found on the GPU; tiles past the end go with the last one.
        numbers = torch.arange(len(x), device=x.device)
        begins = cu_seqlens[1:-1] - torch.arange(1, len(cu_seqlens) - 1, device=x.device)
        of_tile = torch.searchsorted(begins, numbers, right=True)
        return encoder.encode(encoder.insert_cls(x, numbers + 1 + of_tile, cu_seqlens), cu_seqlens)

    def _modules_of_encode(self) -> list[nn.Module]:
        """The modules of `_encode`, the encoder for its cls token."""
        encoder = self.encoder
        roots = (encoder.tile_projection, encoder.layers, encoder.layers_norm)
        return [encoder, *(part for root in roots for part in root.modules())]


class _Graph(NamedTuple):
    """What is replayed, and where it reads and writes; a backward and its gradients only in training."""

    forward: torch.cuda.CUDAGraph
    features: Tensor
    cells: Tensor
    lengths: Tensor
    output: Tensor
    backward: torch.cuda.CUDAGraph | None = None
    grad_output: Tensor | None = None
    grad_features: Tensor | None = None
    grad_parameters: Sequence[Tensor] = ()


class _Ticket:
    """Held by a forward for its backward: while it lives and that has not run, no other forward takes its activations."""

    done = False


class EncoderGraphs:
    """Runs a function of the tiles of slides from a graph for each bucket of their number and each number of slides, and its
    backward from another.

    The kernels find where sequences end by the cumulative lengths on the device, so one graph serves all lengths whose
    sum is in its bucket; the rows past the end are computed and never read, and their gradients are zero. All graphs
    read and write the same buffers, and keep their activations in the same memory: that of the longest slides so far. A
    second forward before the backward of the first runs without graphs, as do modules with hooks, those of FSDP, and
    calls from another thread or stream than the first one's. Nothing may differentiate twice. Weights that change
    between a forward and its backward go unnoticed, and so do settings that are no weights, such as the rate of a
    dropout.

    Args:
        run: Maps `(N, D)` tile features of B slides, their `(N, 2)` integer cells and `(B + 1,)` int32 cumulative lengths,
            which count a token more for each slide, to `(N + B, width)` tokens, on one GPU. It never asks for the lengths.
        modules: Gives all modules whose parameters it uses, each for its own: graphs are thrown away when these have moved.
    """

    def __init__(
        self, run: Callable[[Tensor, Tensor, Tensor], Tensor], modules: Callable[[], Sequence[nn.Module]]
    ) -> None:
        self._run = run
        self._modules = modules
        self._tree: list[tuple[Mapping[str, Any], Mapping[str, Any], tuple[Any, ...]]] = []
        self._seen: list[nn.Module] = []
        self._hooks: list[Mapping[int, Any]] = []
        self._slots: list[tuple[dict[str, nn.Parameter | None], str]] = []
        self._caller: tuple[int, Any] | None = None
        self._training: tuple[bool, ...] = ()
        self._graphs: dict[Any, _Graph] = {}
        self._buffers: dict[Any, Tensor] = {}
        self._addresses: list[int] = []
        self._pool: Any = None
        self._stream: Any = None
        self._ticket: Callable[[], _Ticket | None] = lambda: None

    def __call__(self, features: Tensor, cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        """`(N + B, width)`; without gradients valid until the next call."""
        ticket = self._ticket()
        caller = (threading.get_ident(), torch.cuda.current_stream(features.device))
        self._caller = self._caller or caller
        if caller != self._caller or (ticket is not None and not ticket.done) or not self._look():
            return self._run(features, cells, cu_seqlens)
        held = self._parameters()
        trained = self._trained(held) if torch.is_grad_enabled() else []
        differentiable = torch.is_grad_enabled() and (len(trained) > 0 or features.requires_grad)
        self._ticket = lambda: None  # first: a capture that fails has changed the buffers
        slides = len(cu_seqlens) - 1
        graph = self._graph(features if differentiable else features.detach(), cells, slides, held, trained)
        output = self._replay(graph, features, cells, cu_seqlens)
        if differentiable:  # autograd's part comes after the launch: the GPU need not wait for it
            output = _Replay.apply(self, graph, output, features, *trained)
        return output

    def _look(self) -> bool:
        """Take the modules as they are now; whether graphs can stand for them."""
        if not self._tree or any(
            (*parameters, *children.values()) != seen for parameters, children, seen in self._tree
        ):
            self._addresses = []  # graphs of other modules are no more to be used
            self._seen = list(self._modules())
            self._tree = [
                (module._parameters, module._modules, (*module._parameters, *module._modules.values()))
                for module in self._seen
            ]
            self._hooks = [
                hooks
                for module in self._seen
                for hooks in (
                    module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
                )
            ]  # fmt: skip
            self._slots = [(module._parameters, name) for module in self._seen for name in module._parameters]
        self._training = tuple([module.training for module in self._seen])
        # FSDP's own mark: it moves parameters within a forward, with or without hooks.
        sharded = any(module.__dict__.get("_is_fsdp_managed_module") for module in self._seen)
        return not sharded and not any(self._hooks)

    def _parameters(self) -> list[nn.Parameter | None]:
        return [parameters[name] for parameters, name in self._slots]

    @staticmethod
    def _trained(held: list[nn.Parameter | None]) -> list[Tensor]:
        return [parameter for parameter in held if parameter is not None and parameter.requires_grad]

    @contextmanager
    def _leaves(self, trained: bool) -> Iterator[list[Tensor]]:
        """Leaves on the memory of trained parameters, in their place: a leaf knows the stream that it was first used on."""
        if not trained:
            yield []
            return
        held = self._parameters()
        for (parameters, name), parameter in zip(self._slots, held, strict=True):
            if parameter is not None:
                parameters[name] = nn.Parameter(parameter.detach(), parameter.requires_grad)
        try:
            yield self._trained(self._parameters())
        finally:
            for (parameters, name), parameter in zip(self._slots, held, strict=True):
                parameters[name] = parameter

    @torch.inference_mode(False)  # what is kept may serve a call outside inference mode
    @torch.no_grad()
    def _replay(self, graph: _Graph, features: Tensor, cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        tiles = len(features)
        graph.features[:tiles].copy_(features)
        if tiles < len(graph.features):  # no NaN of an earlier slide times the gradient's zero
            graph.features[tiles:].zero_()
        graph.cells[:tiles].copy_(cells)
        graph.lengths.copy_(cu_seqlens)
        graph.forward.replay()
        return graph.output[: tiles + len(cu_seqlens) - 1]

    @torch.inference_mode(False)
    def _graph(
        self, features: Tensor, cells: Tensor, slides: int, held: list[nn.Parameter | None], trained: list[Tensor]
    ) -> _Graph:
        addresses = [0 if parameter is None else parameter.data_ptr() for parameter in held]
        if addresses != self._addresses:
            self._graphs.clear()
            self._buffers.clear()
            self._addresses, self._pool = addresses, torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(features.device)  # type: ignore[no-untyped-call]
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        wanted = (features.requires_grad, *[parameter.data_ptr() for parameter in trained])
        precision = torch.backends.cuda.matmul.fp32_precision
        tokens = bucket(len(features) + slides)
        key = (tokens, slides, features.dtype, cells.dtype, wanted, autocast, precision, self._training)
        if key not in self._graphs:
            # Weights that autocast has cast and kept for later would be read by the graph when they are long gone.
            casts = torch.autocast("cuda", autocast, enabled=autocast is not None, cache_enabled=False)
            with torch.cuda.device(features.device), torch.random.fork_rng([features.device]), casts:
                self._graphs[key] = self._capture(tokens, slides, features, cells, trained)
        return self._graphs[key]

    def _capture(self, rows: int, slides: int, features: Tensor, cells: Tensor, trained: list[Tensor]) -> _Graph:
        """For up to `rows` tokens, of which one of each slide is no tile."""
        differentiable = features.requires_grad or len(trained) > 0
        tiles = rows - slides
        inputs = self._buffer("features", features)[:tiles].detach().requires_grad_(features.requires_grad)
        places = self._buffer("cells", cells)[:tiles]
        whole = torch.linspace(0, rows, slides + 1, device=features.device).int()
        lengths = self._buffer(f"lengths of {slides}", whole).copy_(whole)  # not those of a longer slide before
        graphs = [torch.cuda.CUDAGraph() for _ in range(1 + differentiable)]
        self._stream.wait_stream(torch.cuda.current_stream())
        # A loader's thread may pin memory meanwhile: only this thread's calls are held to what a capture allows.
        capture = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with torch.set_grad_enabled(differentiable), self._leaves(len(trained) > 0) as leaves:
            wanted = [*((inputs,) if features.requires_grad else ()), *leaves]
            with torch.cuda.stream(self._stream):  # once outside the graph: kernels are compiled and look-ups made
                found = self._run(inputs, places, lengths)
                output = self._buffer("output", found)[:rows]
                grad_output = self._buffer("grad_output", found)[:rows] if differentiable else None
                if differentiable:
                    torch.autograd.grad(found, wanted, grad_output, allow_unused=True)
            torch.cuda.current_stream().wait_stream(self._stream)
            del found
            with torch.cuda.graph(graphs[0], **capture):
                found = self._run(inputs, places, lengths)
                output.copy_(found.detach())
            if not differentiable:
                return _Graph(graphs[0], inputs, places, lengths, output)
            grad_features = self._buffer("grad_features", features)[:tiles] if features.requires_grad else None
            grad_parameters = [self._grad_of(parameter) for parameter in trained]
            with torch.cuda.graph(graphs[1], **capture):
                # Retained: a second gradient of the same forward reads the activations again.
                grads = torch.autograd.grad(found, wanted, grad_output, retain_graph=True, materialize_grads=True)
                torch._foreach_copy_([*(() if grad_features is None else (grad_features,)), *grad_parameters], grads)
        return _Graph(
            graphs[0], inputs.detach(), places, lengths, output, graphs[1], grad_output, grad_features,
            tuple(grad_parameters),
        )  # fmt: skip

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """The buffer of this name for tensors like this one, as long as the longest slide."""
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
    def forward(
        ctx: Any, graphs: EncoderGraphs, graph: _Graph, output: Tensor, features: Tensor, *trained: Tensor
    ) -> Tensor:
        ctx.ticket = _Ticket()
        graphs._ticket = weakref.ref(ctx.ticket)
        ctx.graphs, ctx.graph, ctx.tiles, ctx.tokens = graphs, graph, len(features), len(output)
        return output.clone()

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
        grad_features = None if graph.grad_features is None else graph.grad_features[: ctx.tiles].clone()
        return (None, None, None, grad_features, *grads)

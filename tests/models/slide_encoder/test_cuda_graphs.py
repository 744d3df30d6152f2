"""Short sequences as CUDA graphs give what they give without: on a GPU, and with a stand-in for the graphs on a CPU."""

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from longslide import create_slide_encoder
from longslide.models.aggregators.slide_encoder import SlideEncoderAggregator, use_cuda_graphs
from longslide.models.slide_encoder.cuda_graphs import EncoderGraphs, GraphedEncoder, bucket
from longslide.models.slide_encoder.encoder import SlideEncoder
from longslide.models.slide_encoder.packed_slides import ends
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def test_lengths_are_run_as_few_lengths_a_little_longer() -> None:
    assert all(n <= bucket(n) <= max(n + 31, 1.125 * n) for n in range(1, 20_000))
    assert len({bucket(n) for n in range(256, 16_385)}) <= 60


class Recorded:
    """Stands for a CUDA graph: operations, which replay runs again into the tensors that they gave at first."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, ...]] = []

    def replay(self) -> None:
        with torch.no_grad():
            for function, arguments, options, results in self.operations:
                for there, new in zip(tree_leaves(results), tree_leaves(function(*arguments, **options)), strict=True):
                    if isinstance(there, Tensor) and there.data_ptr() != new.data_ptr():
                        there.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, graph: Recorded) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        self.graph.operations.append((function, args, kwargs or {}, results))
        return results


@contextmanager
def recording(graph: Recorded, **_: Any) -> Iterator[None]:
    with Recorder(graph):
        yield


class Layers:
    """Two layers over a token and the tiles, as recorded graphs; `seen` has rows and length of runs, not replays."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 8)).eval()
        self.net.first = nn.Parameter(torch.randn(1, 8))
        self.seen: list[tuple[int, int]] = []
        self.graphs = EncoderGraphs(self.run, lambda: list(self.net.modules()))

    def plain(self, x: Tensor, slides: int = 1) -> Tensor:
        output: Tensor = self.net(torch.cat([*[self.net.first] * slides, x]))
        return output

    def run(self, x: Tensor, cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        assert len(x) == len(cells)
        self.seen.append((len(x) + len(cu_seqlens) - 1, int(cu_seqlens[-1])))
        return self.plain(x, len(cu_seqlens) - 1)

    def __call__(self, x: Tensor) -> Tensor:
        return self.graphs(x, torch.zeros(len(x), 2, dtype=torch.long), ends(len(x) + 1, x.device))

    def packed(self, x: Tensor, slides: int) -> Tensor:
        """Tokens of several slides, whose first tokens stand before the tiles here."""
        cu_seqlens = torch.linspace(0, len(x) + slides, slides + 1).int()
        return self.graphs(x, torch.zeros(len(x), 2, dtype=torch.long), cu_seqlens)

    def weight_gradient(self, output: Tensor, **options: Any) -> Tensor:
        wanted = (self.net[0].weight, self.net.first)
        return torch.cat(torch.autograd.grad(output.square().sum(), wanted, **options))


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Layers:
    def nothing(*_: Any, **__: Any) -> Any:
        return nullcontext()

    replaced: dict[str, Callable[..., Any]] = {
        "CUDAGraph": Recorded, "graph": recording, "stream": nothing, "device": nothing,
        "Stream": lambda _: mock.MagicMock(), "current_stream": mock.MagicMock(), "graph_pool_handle": lambda: None,
    }  # fmt: skip
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.random, "fork_rng", nothing)
    return Layers()


def test_replays_and_their_gradients_are_those_of_the_layers(layers: Layers) -> None:
    for rows in (500, 40, 300, 500, 41):
        x = torch.randn(rows, 8)
        with torch.no_grad():
            torch.testing.assert_close(layers(x), layers.plain(x))
        torch.testing.assert_close(layers.weight_gradient(layers(x)), layers.weight_gradient(layers.plain(x)))


def test_several_slides_have_graphs_by_their_number_and_share_buffers_with_one(layers: Layers) -> None:
    for rows, slides in ((500, 4), (40, 1), (490, 4), (300, 2), (500, 4)):
        x = torch.randn(rows, 8)
        with torch.no_grad():
            torch.testing.assert_close(layers.packed(x, slides), layers.plain(x, slides))
        found = layers.weight_gradient(layers.packed(x, slides))
        torch.testing.assert_close(found, layers.weight_gradient(layers.plain(x, slides)))
    assert all(rows == length for rows, length in layers.seen)
    assert len(layers.seen) == 2 * 2 * 3, "two runs for a graph, with gradients and without: 500 and 490 share them"


def test_a_first_run_knows_its_own_length_and_not_that_of_the_sequence_before(layers: Layers) -> None:
    for rows in (5000, 300, 40):
        layers(torch.randn(rows, 8))
    assert len(layers.seen) == 6
    assert all(rows == length for rows, length in layers.seen)


def test_a_gradient_whose_activations_are_gone_is_refused(layers: Layers) -> None:
    output = layers(torch.randn(100, 8))
    first = layers.weight_gradient(output, retain_graph=True)
    torch.testing.assert_close(layers.weight_gradient(output, retain_graph=True), first)
    with torch.no_grad():
        layers(torch.randn(90, 8))
    with pytest.raises(RuntimeError, match="second backward comes too late"):
        layers.weight_gradient(output)


@pytest.mark.parametrize("trained", [False, True])
def test_such_a_gradient_is_refused_after_a_forward_that_failed_too(layers: Layers, trained: bool) -> None:
    output = layers(torch.randn(40, 8))
    layers.weight_gradient(output, retain_graph=True)
    full = mock.patch.object(layers.net, "forward", side_effect=torch.OutOfMemoryError)
    with full, pytest.raises(torch.OutOfMemoryError), torch.set_grad_enabled(trained):
        layers(torch.randn(300, 8))
    with pytest.raises(RuntimeError, match="second backward comes too late"):
        layers.weight_gradient(output)


def test_other_modules_modes_and_hooks_are_noticed(layers: Layers) -> None:
    x = torch.randn(50, 8)
    with torch.no_grad():
        layers(x)
        layers.net[3] = nn.Linear(8, 8)
        torch.testing.assert_close(layers(x), layers.plain(x))
        layers.net[1] = nn.ReLU().eval()
        torch.testing.assert_close(layers(x), layers.plain(x))
        layers.net[2].train()
        assert not torch.equal(layers(x).clone(), layers(x))
        layers.net[2].eval()
        weight = layers.net[0]._parameters.pop("weight")
        layers.net[0].weight = 2 * weight.detach()
        torch.testing.assert_close(layers(x), layers.plain(x))
        del layers.net[0].weight
        layers.net[0].weight = weight
        runs = len(layers.seen)
        layers.net[0]._is_fsdp_managed_module = True
        for _ in range(2):
            layers(x)
        assert len(layers.seen) == runs + 2
        del layers.net[0]._is_fsdp_managed_module
        calls: list[object] = []
        layers.net[0].register_forward_hook(lambda *_: calls.append(0))
        layers(x)
        assert calls == [0]


def test_a_parameter_may_go_or_have_no_part(layers: Layers) -> None:
    x = torch.randn(50, 8)
    layers(x)
    layers.net.idle = nn.Parameter(torch.zeros(3))
    torch.testing.assert_close(layers.weight_gradient(layers(x)), layers.weight_gradient(layers.plain(x)))
    layers.net[3].bias = None
    torch.testing.assert_close(layers.weight_gradient(layers(x)), layers.weight_gradient(layers.plain(x)))


def test_another_thread_does_not_take_the_first_ones_buffers(layers: Layers) -> None:
    x, other = torch.randn(2, 50, 8)
    with torch.no_grad():
        found = layers(x)
        with ThreadPoolExecutor(1) as pool:
            torch.testing.assert_close(pool.submit(layers, other).result().detach(), layers.plain(other))
        torch.testing.assert_close(found, layers.plain(x))


def test_a_slide_that_is_not_finite_spoils_no_later_one(layers: Layers) -> None:
    x = torch.randn(100, 8)
    x[97] = torch.nan
    layers.weight_gradient(layers(x))
    assert layers.weight_gradient(layers(torch.randn(97, 8))).isfinite().all()


def test_a_replica_a_checkpoint_around_the_encoder_hooks_and_cells_elsewhere_take_no_graphs() -> None:
    """A replica of DataParallel would take those of its origin, on another GPU."""
    encoder = create_slide_encoder("gigapath", checkpoint="random", layers=1)
    index = torch.arange(4)
    x, cells = torch.randn(1, 4, 1536), torch.stack([index, index], -1)[None]

    def takes(encoder: SlideEncoder, x: Tensor = x, cells: Tensor = cells, cu_seqlens: Tensor | None = None) -> bool:
        return GraphedEncoder(encoder).takes_graphs(x, cells, cu_seqlens)

    with mock.patch("longslide.models.slide_encoder.cuda_graphs.has_kernels", return_value=True), torch.no_grad():
        assert takes(encoder)
        assert takes(encoder, x[0], cells[0], torch.tensor([0, 4]))
        assert takes(encoder, x[0], cells[0], torch.tensor([0, 1, 4]))
        assert not takes(encoder._replicate_for_data_parallel())
        assert not takes(encoder, cells=cells.to("meta"))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            assert not takes(encoder)
        hook = encoder.register_forward_hook(lambda *_: None)
        assert not takes(encoder)
        hook.remove()
        assert takes(encoder)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[5, 1, 9], [12], [3, 20]])
def test_rows_past_the_last_of_several_slides_change_nothing(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a graph of a bucket runs, against the tokens of the slides alone: by the kernels, in their interpreter too."""
    pytest.importorskip("triton")
    monkeypatch.setattr("longslide.models.slide_encoder.dilated_attention.has_kernels", lambda x: True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = {"layers": 2, "width": 32, "heads": 2, "ffn_width": 64, "tile_dim": 8, "dilated_ratios": (1, 2)}
    encoder = create_slide_encoder("gigapath", checkpoint="random", **small).to(device)
    tiles, slides, room = sum(lengths), len(lengths), 40
    x = torch.randn(room, 8, device=device)
    x[tiles:] = 0
    x.requires_grad_()
    index = torch.arange(room, device=device)
    cells = torch.stack([index, index], -1)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    with_cls = cu_seqlens + torch.arange(slides + 1, dtype=torch.int32, device=device)
    found = GraphedEncoder(encoder)._encode(x, cells, with_cls)[: tiles + slides]
    features, places, packed = encoder.pack(x[:tiles], cells[:tiles], cu_seqlens)
    wanted = encoder.encode(encoder._embed(features, places, packed), packed.cu_seqlens)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    leaves = [x, encoder.cls_token, encoder.layers[0].qkv.weight]
    direction = torch.randn_like(wanted)
    grads = [torch.autograd.grad(tokens, leaves, direction) for tokens in (found, wanted)]
    for one, other in zip(*grads, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6


def test_a_graphed_encoder_is_called_asked_and_copied_as_the_encoder_is() -> None:
    encoder = create_slide_encoder("gigapath", checkpoint="random", layers=1)
    graphed = GraphedEncoder(encoder)
    index = torch.arange(4)
    x, cells = torch.randn(1, 4, 1536), torch.stack([index, index], -1)[None]
    with torch.no_grad():
        torch.testing.assert_close(graphed(x, cells), encoder(x, cells))
        packed = (x[0], cells[0], torch.tensor([0, 1, 4]))
        torch.testing.assert_close(graphed(*packed), encoder(*packed))
    assert (graphed.name, graphed.weights) == ("gigapath", encoder.weights)
    for other in (copy.deepcopy(graphed), pickle.loads(pickle.dumps(graphed))):
        assert other.encoder is not encoder
        with torch.no_grad():
            other.cls_token.add_(1)
            assert not torch.equal(other(x, cells), encoder(x, cells))


def test_the_graphs_of_an_aggregator_are_its_own_and_leave_its_weights_names() -> None:
    encoder = create_slide_encoder("gigapath", checkpoint="random", layers=1)
    aggregator = SlideEncoderAggregator(encoder)
    names = list(aggregator.state_dict())
    use_cuda_graphs(nn.Sequential(aggregator))
    index = torch.arange(4)
    bag = (torch.randn(4, 1536), torch.stack([index, index], -1), torch.tensor([0, 4]))
    with (
        torch.no_grad(),
        mock.patch.object(GraphedEncoder, "__call__", autospec=True, side_effect=GraphedEncoder.__call__) as run,
    ):
        aggregator(*bag)
        assert run.call_args.args[0].encoder is encoder
        other = copy.deepcopy(aggregator)
        other(*bag)
        assert run.call_args.args[0].encoder is other.encoder
        runs = run.call_count
        replica = aggregator._replicate_for_data_parallel()
        replica.encoder = copy.deepcopy(encoder)  # it shares all but its modules
        replica(*bag)
        assert run.call_count == runs
    assert list(aggregator.state_dict()) == names


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")


def slide(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(1, tokens, 1536, device="cuda", generator=torch.Generator("cuda").manual_seed(tokens))
    index = torch.arange(tokens, device="cuda")
    return x, torch.stack([index % 50, index // 50], -1)[None]


def graphed(**options: Any) -> GraphedEncoder:
    return GraphedEncoder(create_slide_encoder("gigapath", checkpoint="random", **options).cuda())


def run_of(encoder: GraphedEncoder, x: Tensor, cells: Tensor) -> Tensor:
    assert encoder.takes_graphs(x, cells, None)
    return encoder(x, cells)


def weighed(output: Tensor) -> Tensor:
    """A loss. The sum of the squares of embeddings, which are normalised, hardly changes: its gradient is rounding."""
    return (output.float() * torch.linspace(-1, 2, output.numel(), device=output.device).view(output.shape)).sum()


@needs_gpu
def test_graphs_give_what_the_layers_give_and_follow_their_weights() -> None:
    encoder = graphed(layers=2)
    for tokens in (1000, 1, 300, 290):
        x, cells = slide(tokens)
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                replayed = run_of(encoder, x, cells).clone()
                torch.testing.assert_close(replayed, encoder.encoder(x, cells), rtol=1e-3, atol=1e-4)
    with torch.inference_mode():
        before = encoder(x, cells)
        other = copy.deepcopy(encoder)
        other.load_state_dict({name: 1.1 * value for name, value in encoder.state_dict().items()})
        assert not torch.equal(other(x, cells), before)
        assert torch.equal(encoder(x, cells), before)


@needs_gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_from_graphs_add_up_as_those_of_the_layers(autocast: bool) -> None:
    encoder = graphed(layers=2)
    encoder.layers[0].ffn_out.requires_grad_(False)
    found = []
    for run in (partial(run_of, encoder), encoder.encoder):
        encoder.zero_grad()
        for tokens in (1000, 300, 290, 1000):  # accumulated
            x, cells = slide(tokens)
            x.requires_grad_()
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                weighed(run(x, cells)).backward()
        found.append(
            {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None} | {"x": x.grad}
        )
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        wanted = found[1][name]
        assert (grad - wanted).norm() <= (2e-2 if autocast else 1e-4) * wanted.norm() + 1e-6, name


@needs_gpu
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_packed_slides_from_graphs_give_what_the_layers_give_and_so_do_their_gradients(pool: str) -> None:
    encoder = graphed(layers=2, pool=pool)
    for lengths in ([300, 1, 700], [500] * 4, [290, 8, 690], [2], [40, 2000, 30]):
        parts = [slide(n) for n in lengths]
        x, cells = (torch.cat([part[i][0] for part in parts]) for i in range(2))
        cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
        assert encoder.takes_graphs(x, cells, cu_seqlens)
        found = []
        for run in (encoder, encoder.encoder):
            encoder.zero_grad()
            leaf = x.clone().requires_grad_()
            output = run(leaf, cells, cu_seqlens)
            weighed(output).backward()
            grads = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
            found.append({"output": output.detach(), "x": leaf.grad} | grads)
        assert found[0].keys() == found[1].keys()
        for name, wanted in found[1].items():
            assert (found[0][name] - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6, (lengths, name)
    runs = len(encoder._graphs._graphs)
    encoder(x[1:].clone().requires_grad_(), cells[1:], cu_seqlens - (cu_seqlens > 0).int()).sum().backward()
    assert len(encoder._graphs._graphs) == runs == 4, "one graph for each number of slides and bucket of tokens"


@needs_gpu
def test_a_second_slide_before_the_backward_of_the_first_leaves_that_one_right() -> None:
    encoder = graphed(layers=1)
    wanted = [torch.autograd.grad(weighed(encoder(*slide(n))), encoder.layers[0].qkv.weight)[0] for n in (300, 400)]
    outputs = [encoder(*slide(n)) for n in (300, 400)]
    with torch.no_grad():
        encoder(*slide(350))
    for output, grad in zip(outputs, wanted, strict=True):
        (found,) = torch.autograd.grad(weighed(output), encoder.layers[0].qkv.weight)
        assert (found - grad).norm() <= 1e-5 * grad.norm()


@needs_gpu
def test_one_forward_has_as_many_gradients_as_are_asked_for() -> None:
    """As explanations ask for: one for each class."""
    encoder = graphed(layers=2)
    encoder.requires_grad_(False)
    x, cells = slide(300)
    x.requires_grad_()
    for column in (0, 5):
        replayed, plain = encoder(x, cells), encoder.encoder(x, cells)
        for output in (replayed, plain):
            torch.autograd.grad(output[0, 1], x, retain_graph=True)
        found, wanted = (torch.autograd.grad(output[0, column], x)[0] for output in (replayed, plain))
        assert (found - wanted).norm() <= 1e-4 * wanted.norm()


@needs_gpu
def test_some_of_packed_slides_are_left_out_of_a_layer() -> None:
    encoder = graphed(layers=2, drop_path=0.5)
    encoder.train()
    x, cells = slide(300)
    packed = (x[0].repeat(8, 1), cells[0].repeat(8, 1), torch.arange(0, 2700, 300, device="cuda", dtype=torch.int32))
    assert encoder.takes_graphs(*packed)
    kinds = {round(value, 4) for value in encoder(*packed)[:, 0].tolist()}
    assert 1 < len(kinds) <= 4, "the last layer's two halves are there or not"


@needs_gpu
def test_dropped_paths_differ_from_replay_to_replay() -> None:
    encoder = graphed(layers=2, drop_path=0.5)
    encoder.train()
    x, cells = slide(300)
    assert len({round(encoder(x, cells)[0, 0].item(), 4) for _ in range(16)}) > 2

"""Every aggregator on packed bags, against the same bags one at a time."""

import itertools
from pathlib import Path

import pytest
import torch
import yaml
from longslide.errors import LongslideError
from longslide.models.aggregators import registry
from longslide.models.aggregators.abmil import ABMIL
from longslide.models.aggregators.base import Aggregator, create_aggregator
from longslide.models.aggregators.linear_probe import LinearProbe
from longslide.models.aggregators.pool import MaxPool, MeanPool
from longslide.models.aggregators.registry import AggregatorChoice
from longslide.models.aggregators.slide_encoder import LongNetAggregator, SlideEncoderAggregator
from longslide.models.aggregators.transmil import NystromAttention, TransMIL
from longslide.models.slide_encoder.checkpoint import to_published
from longslide.models.slide_encoder.encoder import create_slide_encoder
from torch import Tensor, nn

DIM = 6
LENGTHS = [7, 1, 12, 30]
LONGNET = {"layers": 2, "width": 8, "heads": 2, "ffn_width": 16, "dilated_ratios": (1, 2), "dropout": 0.0}


def gigapath(layers: tuple[int, ...] = (), frozen: bool = False) -> SlideEncoderAggregator:
    encoder = LongNetAggregator(DIM, **LONGNET).encoder
    return SlideEncoderAggregator(encoder, layers, frozen)


AGGREGATORS = {
    "abmil": lambda: ABMIL(DIM, 8, 4, 0.0),
    "transmil": lambda: TransMIL(DIM, 8, 2, landmarks=4, dropout=0.0),
    "mean": lambda: MeanPool(DIM, 8, 0.0),
    "max": lambda: MaxPool(DIM, 0),
    "longnet": lambda: LongNetAggregator(DIM, **LONGNET),
    "layers": lambda: gigapath((0, 2)),
    "frozen": lambda: gigapath(frozen=True),
    "linear-probe": lambda: LinearProbe(DIM),
}


def bags(lengths: list[int] = LENGTHS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(sum(lengths), DIM, dtype=torch.float64, generator=generator)
    cells = torch.cat([torch.stack([torch.arange(n) % 5, torch.arange(n) // 5], 1) for n in lengths])
    return features, cells, torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.fixture(params=AGGREGATORS)
def aggregator(request: pytest.FixtureRequest) -> Aggregator:
    torch.manual_seed(0)
    return AGGREGATORS[request.param]().double()


def test_a_packed_batch_gives_what_its_bags_give_one_at_a_time_and_so_do_its_gradients(aggregator: Aggregator) -> None:
    features, cells, cu_seqlens = bags()
    parameters = [parameter for parameter in aggregator.parameters() if parameter.requires_grad]
    packed_input = features.clone().requires_grad_()
    packed = aggregator(packed_input, cells, cu_seqlens)
    assert packed.shape == (len(LENGTHS), aggregator.width)
    weights = torch.randn(packed.shape, dtype=torch.float64)
    packed_gradients = torch.autograd.grad((packed * weights).sum(), [packed_input, *parameters])

    single_input = features.clone().requires_grad_()
    begins = cu_seqlens.tolist()
    single = torch.cat(
        [
            aggregator(single_input[a:b], cells[a:b], torch.tensor([0, b - a], dtype=torch.int32))
            for a, b in itertools.pairwise(begins)
        ]
    )
    single_gradients = torch.autograd.grad((single * weights).sum(), [single_input, *parameters])
    torch.testing.assert_close(packed, single)
    for one, other in zip(packed_gradients, single_gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["abmil", "mean", "max"])
def test_the_order_of_the_tiles_is_nothing_to_pooling(name: str) -> None:
    torch.manual_seed(0)
    aggregator = AGGREGATORS[name]().double()
    features, cells, cu_seqlens = bags([20])
    order = torch.randperm(20)
    torch.testing.assert_close(
        aggregator(features[order], cells[order], cu_seqlens), aggregator(features, cells, cu_seqlens)
    )


def test_longnet_sees_where_the_tiles_are() -> None:
    torch.manual_seed(0)
    aggregator = AGGREGATORS["longnet"]().double()
    features, cells, cu_seqlens = bags([20])
    assert not torch.allclose(
        aggregator(features.flip(0), cells, cu_seqlens), aggregator(features, cells, cu_seqlens), rtol=1e-3
    )


def test_the_attention_weights_of_a_bag_add_up_to_one_and_make_its_vector() -> None:
    torch.manual_seed(0)
    abmil = ABMIL(DIM, 8, 4, 0.0).double()
    features, cells, cu_seqlens = bags()
    weights = abmil.attention_weights(features, cells, cu_seqlens)
    assert weights.shape == (sum(LENGTHS),)
    torch.testing.assert_close(
        torch.segment_reduce(weights, "sum", lengths=torch.tensor(LENGTHS)), torch.ones(4, dtype=torch.float64)
    )
    hidden = abmil.projection(features[:7]).relu()
    torch.testing.assert_close(weights[:7] @ hidden, abmil(features, cells, cu_seqlens)[0])


def test_nystrom_attention_with_a_landmark_a_token_is_softmax_attention() -> None:
    torch.manual_seed(0)
    options = {"width": 8, "heads": 2, "landmarks": 12, "pinv_iterations": 20, "dropout": 0.0}
    attention = NystromAttention(**options).double()
    nn.init.zeros_(attention.values.weight)
    x = torch.randn(12, 8, dtype=torch.float64)
    q, k, v = attention.qkv(x).unflatten(1, (3, 2, 4)).permute(1, 2, 0, 3)
    exact = attention.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))
    torch.testing.assert_close(attention(x), exact, rtol=1e-6, atol=1e-8)


def test_the_chosen_layers_are_those_of_the_slide_encoder_and_the_rest_is_cut_off() -> None:
    torch.manual_seed(0)
    encoder = LongNetAggregator(DIM, **LONGNET).encoder.double()
    features, cells, cu_seqlens = bags([9])
    every = encoder.layer_embeddings(features[None], cells[None])
    aggregator = SlideEncoderAggregator(encoder, (0, 1))
    torch.testing.assert_close(aggregator(features, cells, cu_seqlens)[0], torch.cat([every[0, 0], every[1, 0]]))
    assert len(aggregator.encoder.layers) == 1
    trained = {name: parameter for name, parameter in aggregator.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(
        aggregator(features, cells, cu_seqlens).sum(), list(trained.values()), allow_unused=True
    )
    unused = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]
    assert not unused, "distributed training stops at parameters without a gradient"


def test_a_frozen_encoder_does_not_train_and_drops_nothing() -> None:
    options = {"layers": 1, "width": 8, "heads": 2, "ffn_width": 16, "dropout": 0.5}
    aggregator = SlideEncoderAggregator(LongNetAggregator(DIM, **options).encoder, frozen=True).double().train()
    assert not any(parameter.requires_grad for parameter in aggregator.parameters())
    features, cells, cu_seqlens = bags()
    torch.testing.assert_close(
        aggregator(features, cells, cu_seqlens), aggregator(features, cells, cu_seqlens), rtol=0, atol=0
    )


def test_a_checkpoint_refuses_features_that_it_was_not_trained_on(tmp_path: Path) -> None:
    encoder = create_slide_encoder("gigapath", checkpoint="random", layers=1, width=16, heads=2, ffn_width=16)
    torch.save({"model": to_published(encoder)}, tmp_path / "ours.pth")
    spec = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(encoder.spec).items()}
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(spec | {"name": "ours"}))
    choice = AggregatorChoice("gigapath", {"slide_encoder": str(tmp_path / "ours.yaml")})
    checkpoint = str(tmp_path / "ours.pth")
    with pytest.raises(LongslideError, match="trained on features of tile encoder 'gigapath', but these are of 'uni'"):
        create_aggregator(choice, checkpoint, 1536, "uni")
    with pytest.raises(LongslideError, match="of length 1536, but the features have 1024"):
        create_aggregator(choice, checkpoint, 1024, "gigapath")
    create_aggregator(choice, checkpoint, 1536, None)  # files of other tools do not say


def test_layers_that_the_encoder_does_not_have_are_refused() -> None:
    with pytest.raises(LongslideError, match=r"has the layers 0 \(the projected tiles\) to 2, not \[3\]"):
        gigapath((3,))


@pytest.mark.parametrize("name", sorted(registry.AGGREGATORS.builtin))
def test_what_reads_slide_embeddings_is_known_without_the_class(name: str) -> None:
    assert AggregatorChoice(name).reads_slide_embedding == registry.AGGREGATORS.get(name).reads_slide_embedding

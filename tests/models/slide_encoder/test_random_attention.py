"""Random keys: how many, which, the same by seed; and attention to them against a softmax under the mask written out."""

import pytest
import torch
from longslide import create_slide_encoder
from longslide.models.slide_encoder.attention_pattern import attention
from longslide.models.slide_encoder.random_attention import random_key_positions
from torch import Tensor


def random_mask(
    length: int,
    heads: int,
    causal: bool,
    random_keys: int,
    window: int = 0,
    global_tokens: int = 0,
    pattern_seed: int = 0,
) -> Tensor:
    """(heads, L, L) bool, of the random keys as they are drawn, and what BigBird adds."""
    position, is_one = random_key_positions(torch.arange(length), heads, length, random_keys, pattern_seed, causal)
    seen = torch.zeros(heads, length, length, dtype=torch.bool)
    for head in range(heads):
        for query in range(length):
            seen[head, query, position[head, query][is_one[head, query]]] = True
    number = torch.arange(length)
    seen |= (number[:, None] - number).abs() <= window
    seen[:, :, :global_tokens] = True
    seen[:, :global_tokens] = True
    return seen & (number[:, None] >= number) if causal else seen


SETTINGS = [
    {"random_keys": 1},
    {"random_keys": 9, "pattern_seed": 4},
    {"random_keys": 5, "window": 3},
    {"random_keys": 5, "window": 70, "global_tokens": 2},
    {"random_keys": 500, "global_tokens": 700},
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 5, 150])
@pytest.mark.parametrize("settings", SETTINGS)
def test_random_attention_and_its_gradients_are_those_of_a_softmax_under_the_mask(
    settings: dict[str, int], length: int, causal: bool
) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, length, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    output = attention(*inputs, "random", causal, **settings)
    q, k, v = inputs
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / 2
    weights = logits.masked_fill(~random_mask(length, 3, causal, **settings), -torch.inf).softmax(-1)
    expected = torch.einsum("bhij,bjhd->bihd", weights, v)
    torch.testing.assert_close(output, expected)
    direction = torch.randn_like(output)
    for actual, wanted in zip(
        torch.autograd.grad(output, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_every_query_has_as_many_random_keys_as_asked_none_twice_and_if_causal_none_after_it(causal: bool) -> None:
    length, count = 1000, 7
    position, is_one = random_key_positions(torch.arange(length), 4, length, count, 0, causal)
    assert position.shape == (4, length, count)
    enough = torch.arange(length) >= (count - 1 if causal else 0)
    assert is_one[:, enough].all()
    for keys in position[:, enough].flatten(0, 1):
        assert len(keys.unique()) == count
    if causal:
        assert (position <= torch.arange(length)[:, None]).all()
        assert (is_one.sum(-1) == torch.arange(1, length + 1).clamp(max=count)).all(), "of few before it, all"


def test_every_key_is_as_likely_as_any_other() -> None:
    length, count = 500, 20
    position, _ = random_key_positions(torch.arange(length), 16, length, count, 3, False)
    drawn = position.flatten().bincount(minlength=length).double()
    expected = drawn.sum() / length
    chi_squared = float(((drawn - expected) ** 2 / expected).sum())
    assert abs(chi_squared - (length - 1)) < 5 * (2 * (length - 1)) ** 0.5
    heads = torch.corrcoef(position[:2, :, 0].double())  # of the first part, in two heads
    assert abs(float(heads[0, 1])) < 0.2


def test_the_keys_follow_from_the_seed_alone_and_are_the_same_for_some_of_the_queries() -> None:
    queries = torch.arange(100)
    first, again, other = (random_key_positions(queries, 4, 100, 5, seed, False)[0] for seed in (1, 1, 2**32 - 1))
    assert torch.equal(first, again)
    assert (first != other).float().mean() > 0.9
    assert not torch.equal(first[0], first[1]), "each head has keys of its own"
    torch.manual_seed(5)
    assert torch.equal(random_key_positions(queries[40:50], 4, 100, 5, 1, False)[0], first[:, 40:50])


def test_each_layer_of_an_encoder_has_random_keys_of_its_own_that_no_other_seed_repeats() -> None:
    def seeds(seed: int) -> list[int]:
        small = {"layers": 3, "width": 64, "ffn_width": 64, "tile_dim": 8}
        encoder = create_slide_encoder(
            "gigapath", checkpoint="random", pattern="random", random_keys=4, pattern_seed=seed, **small
        )
        return [layer.pattern_settings.get("pattern_seed", 0) for layer in encoder.layers]

    assert len({*seeds(0), *seeds(1), *seeds(2)}) == 9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_keys_and_repeats_its_gradients_to_the_bit() -> None:
    here = random_key_positions(torch.arange(3000), 4, 3000, 16, 9, False)[0]
    assert torch.equal(random_key_positions(torch.arange(3000, device="cuda"), 4, 3000, 16, 9, False)[0].cpu(), here)
    inputs = [torch.randn(1, 3000, 4, 32, device="cuda", requires_grad=True) for _ in range(3)]
    gradients = [
        torch.autograd.grad(attention(*inputs, "random", random_keys=16, window=4).sin().sum(), inputs)
        for _ in range(2)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))

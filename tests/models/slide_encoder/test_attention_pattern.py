"""The attention patterns against a softmax under a mask written out; packed, causal, and what is refused."""

import pytest
import torch
from longslide import LongslideError, create_slide_encoder
from longslide.models.slide_encoder.attention_pattern import attention, check_pattern, window_block_mask
from longslide.models.slide_encoder.encoder import SlideEncoder
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

SETTINGS: dict[str, list[dict[str, object]]] = {
    "dense": [{}],
    "sliding-window": [{"window": 1}, {"window": 13}, {"window": 500}],
    "strided": [{"period": 1}, {"period": 3}, {"period": 7}, {"period": 400}],
}
CASES = [(pattern, settings) for pattern, several in SETTINGS.items() for settings in several]


def mask(length: int, pattern: str, causal: bool, window: int = 0, period: int = 0) -> Tensor:
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = {
        "dense": distance == distance,
        "sliding-window": distance.abs() <= window,
        "strided": distance % max(1, period) == 0,
    }[pattern]
    return seen & (distance >= 0) if causal else seen


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhd->bihd", logits.masked_fill(~seen, -torch.inf).softmax(-1), v)


def qkv(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 5, 300])
@pytest.mark.parametrize(("pattern", "settings"), CASES)
def test_a_pattern_is_a_softmax_under_its_mask(
    pattern: str, settings: dict[str, int], length: int, causal: bool
) -> None:
    inputs = qkv(2, length, 3, 4)
    output = attention(*inputs, pattern, causal, **settings)
    expected = plain(*inputs, mask(length, pattern, causal, **settings))
    torch.testing.assert_close(output, expected)
    direction = torch.randn_like(output)
    for actual, wanted in zip(
        torch.autograd.grad(output, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("lengths", [[40, 1, 150, 9], [50, 50, 50, 50]])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("pattern", "settings"),
    [
        *CASES,
        ("dilated", {"segment_lengths": [8, 40], "dilated_ratios": [1, 4]}),
        ("random", {"random_keys": 6, "window": 2, "global_tokens": 1}),
        ("learned", {"block_size": 8, "chosen_blocks": 2}),
    ],
)
def test_packed_sequences_give_what_they_give_one_at_a_time(
    pattern: str, settings: dict[str, int], causal: bool, lengths: list[int]
) -> None:
    q, k, v = qkv(200, 3, 4)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    output = attention(q, k, v, pattern, causal, cu_seqlens=bounds, **settings)
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        alone = attention(*(x[None, start:stop] for x in (q, k, v)), pattern, causal, **settings)
        torch.testing.assert_close(output[start:stop], alone[0])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 127, 128, 129, 300])
def test_the_block_mask_of_the_kernels_is_the_window_within_each_sequence(window: int, causal: bool) -> None:
    lengths = (300, 1, 255)
    seen = torch.block_diag(*(mask(n, "sliding-window", causal, window).float() for n in lengths)).bool()
    block_mask = window_block_mask(lengths, window, causal, torch.device("cpu"))
    in_blocks = torch.nn.functional.pad(seen, (0, 84, 0, 84)).view(5, 128, 5, 128).any(3).any(1)
    assert (block_mask.to_dense()[0, 0].bool() | ~in_blocks).all(), "a block with visible keys is left out"
    far = [(i, j) for i in range(5) for j in range(5) if abs(i - j) * 128 > window + 128]
    assert not any(block_mask.to_dense()[0, 0, i, j] for i, j in far), "a block that nothing sees is gone through"

    inputs = [x.detach() for x in qkv(1, 556, 2, 16)]  # on a CPU it has no backward
    output = flex_attention(*(x.transpose(1, 2) for x in inputs), block_mask=block_mask).transpose(1, 2)
    torch.testing.assert_close(output, plain(*inputs, seen))


@pytest.mark.parametrize(
    ("pattern", "settings"),
    [
        ("sliding-window", {"window": 64}),
        ("random", {"random_keys": 16, "window": 64, "global_tokens": 1}),
        ("learned", {"block_size": 32, "chosen_blocks": 4}),
    ],
)
def test_products_grow_with_the_tokens_and_not_with_their_square(pattern: str, settings: dict[str, int]) -> None:
    def products(tokens: int) -> int:
        inputs = qkv(1, tokens, 2, 4, dtype=torch.float32)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(attention(*inputs, pattern, **settings).sum(), inputs)
        return counter.get_total_flops()

    assert 3.9 < products(4096) / products(1024) < 4.2


def test_a_block_mask_made_without_gradients_serves_a_later_backward() -> None:
    with torch.inference_mode():
        block_mask = window_block_mask((7,), 2, False, torch.device("cpu"))
    assert not block_mask.kv_indices.is_inference()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "sparse"}, "'sparse' is none of dilated, dense, sliding-window, strided, random, learned"),
        ({"pattern": "sliding-window"}, "'sliding-window' needs a window of at least 1, not 0"),
        ({"pattern": "strided", "period": -2}, "'strided' needs a period of at least 1, not -2"),
        (
            {"pattern": "dense", "window": 5},
            "window 5 is for attention pattern 'sliding-window' or 'random', not 'dense'",
        ),
        ({"pattern": "random"}, "'random' needs random keys of at least 1, not 0"),
        ({"pattern": "random", "random_keys": 4, "window": -1}, "'random' needs a window of at least 0, not -1"),
        ({"pattern": "learned", "chosen_blocks": 4}, "'learned' needs a block size of at least 1, not 0"),
        ({"pattern": "learned", "block_size": 4}, "'learned' needs chosen blocks of at least 1, not 0"),
        ({"pattern": "learned", "random_keys": 4}, "random keys 4 is for attention pattern 'random', not 'learned'"),
        ({"period": 5}, "period 5 is for attention pattern 'strided', not 'dilated'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(LongslideError, match=message):
        check_pattern(**({"pattern": "dilated"} | settings))  # type: ignore[arg-type]


def encoder(**settings: object) -> SlideEncoder:
    small = {"layers": 2, "width": 64, "ffn_width": 64, "tile_dim": 8, "checkpoint": "random"}
    return create_slide_encoder("gigapath", **(small | settings))  # type: ignore[arg-type]


def test_the_encoders_configuration_selects_the_pattern() -> None:
    slides, bounds = torch.randn(70, 8), torch.tensor([0, 50, 70])
    cells = torch.stack([torch.arange(70), torch.zeros(70, dtype=torch.long)], dim=1)
    with torch.inference_mode():
        dilated, dense, wide, narrow, every, few, all_drawn, drawn, all_chosen, chosen = (
            encoder(**settings)(slides, cells, bounds)
            for settings in (
                {},
                {"pattern": "dense"},
                {"pattern": "sliding-window", "window": 51},
                {"pattern": "sliding-window", "window": 3},
                {"pattern": "strided", "period": 1},
                {"pattern": "strided", "period": 4},
                {"pattern": "random", "random_keys": 51},
                {"pattern": "random", "random_keys": 3},
                {"pattern": "learned", "block_size": 1, "chosen_blocks": 51},
                {"pattern": "learned", "block_size": 4, "chosen_blocks": 1},
            )
        )
    for same in (wide, every, all_drawn):
        torch.testing.assert_close(same, dense)
    for other in (dilated, narrow, few, drawn, all_chosen, chosen):  # of all blocks the means count once more
        assert (other - dense).abs().max() > 1e-3


def test_an_encoder_of_a_pattern_without_its_settings_is_refused() -> None:
    with pytest.raises(LongslideError, match="'strided' needs a period"):
        encoder(pattern="strided")


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="alike"):
        attention(torch.zeros(1, 4, 2, 8), torch.zeros(1, 5, 2, 8), torch.zeros(1, 4, 2, 8), "dense")
    with pytest.raises(ValueError, match=r"\(T, H, D\)"):
        attention(*qkv(1, 4, 2, 8), "dense", cu_seqlens=torch.tensor([0, 4]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("pattern", "settings"), CASES)
def test_on_the_gpu_the_same(pattern: str, settings: dict[str, int], causal: bool, dtype: torch.dtype) -> None:
    lengths = [300, 1, 129]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    inputs = qkv(430, 3, 48, device="cuda", dtype=dtype)
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    output = attention(*inputs, pattern, causal, cu_seqlens=bounds, **settings)
    seen = torch.block_diag(*(mask(n, pattern, causal, **settings).float() for n in lengths)).bool()
    expected = plain(*(x[None] for x in exact), seen)[0]
    bound = {torch.float64: 1e-12, torch.float32: 5e-3, torch.bfloat16: 4e-2}[dtype]  # float32: TF32 in FlexAttention
    direction = torch.randn(430, 3, 48, dtype=torch.float64)
    actual = [output, *torch.autograd.grad(output, inputs, direction.to("cuda", dtype))]
    wanted = [expected, *torch.autograd.grad(expected, exact, direction)]
    floor = 0.1 * direction.norm()  # of one key alone the gradient is 0
    for one, other in zip(actual, wanted, strict=True):
        assert (one.cpu().double() - other).norm() <= bound * torch.maximum(other.norm(), floor)

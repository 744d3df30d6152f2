"""The Triton kernels are the naive version: on a GPU as they are, without one in Triton's interpreter."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from longslide import dilated_attention
from longslide.models.slide_encoder.dilated_attention import triton_runs
from torch import Tensor

pytest.importorskip("triton")
from longslide.models.slide_encoder.dilated_attention.fused import fused_dilated_self_attention, schedule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFERENCE = Path(__file__).parent / "reference"
EXACT = 2e-6 if DEVICE == "cpu" else 5e-6
"""Error of float32, on a GPU by three TF32 products."""
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # rows that a mask takes out afterwards


def qkv(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for _ in range(3)]


def errors(inputs: list[Tensor], lengths: list[int], ratios: list[int], causal: bool) -> list[float]:
    """Of the output and the three gradients against float64, relative to their size (or to the gradient's that goes in)."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = dilated_attention(*exact, lengths, ratios, causal, backend="naive")
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    actual = dilated_attention(*inputs, lengths, ratios, causal, backend="fused")
    wanted = [expected, *torch.autograd.grad(expected, exact, direction)]
    found = [actual, *torch.autograd.grad(actual, inputs, direction.to(actual.dtype))]
    floor = 0.1 * direction.norm()
    pairs = zip(found, wanted, strict=True)
    return [((a.double() - b).norm() / torch.maximum(b.norm(), floor)).item() for a, b in pairs]


@pytest.mark.parametrize("name", ["aligned", "ragged_length", "causal_ragged", "length_not_multiple_of_ratio"])
def test_the_numbers_of_the_published_implementation_hold(name: str) -> None:
    with np.load(REFERENCE / f"dilated_attention_{name}.npz") as reference:
        q, k, v, out = (torch.from_numpy(reference[part]).to(DEVICE) for part in ("q", "k", "v", "out"))
        lengths, ratios = reference["segment_lengths"].tolist(), reference["dilated_ratios"].tolist()
        result = dilated_attention(q, k, v, lengths, ratios, bool(reference["is_causal"]), backend="fused")
    assert (result - out).abs().max() < 2e-6


@pytest.mark.parametrize("seed", range(9))
def test_outputs_and_gradients_are_those_of_naive_whatever_the_lengths_and_ratios(seed: int) -> None:
    rng = random.Random(seed)
    largest = rng.choice([1, 2, 4, 8])
    ratios = [largest, *rng.choices([r for r in range(1, largest + 1) if largest % r == 0], k=rng.randint(0, 3))]
    lengths = [rng.randint(1, 200) for _ in ratios]
    shape = (rng.choice([1, 2]), rng.choice([1, 2, 5, rng.randint(1, 250)]), rng.randint(1, 5), rng.choice([4, 16, 48]))
    assert max(errors(qkv(*shape, seed=seed), lengths, ratios, rng.random() < 0.3)) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("length", "lengths", "ratios", "head_dim"),
    [(600, [256, 600, 600], [1, 2, 8], 16), (300, [64, 128, 300], [1, 1, 2], 48), (130, [99] * 3, [2, 1, 2], 48)],
)
def test_keys_that_branches_share_count_once_for_each(
    length: int, lengths: list[int], ratios: list[int], head_dim: int, causal: bool
) -> None:
    """They are scored once: segments within segments, ratios that divide one another, and some that do not."""
    assert max(errors(qkv(1, length, 1, head_dim), lengths, ratios, causal)) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        (torch.float16, 2e-3),
        pytest.param(
            torch.bfloat16,
            1.5e-2,
            marks=pytest.mark.skipif(
                DEVICE == "cpu", reason="needs a GPU: Triton's interpreter has no bfloat16 products"
            ),
        ),
    ],
)
def test_half_precision_is_close_to_float64(
    dtype: torch.dtype, bound: float, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "LONG", 0 if long else schedule.LONG)  # in the blocks of long sequences
    assert max(errors(qkv(1, 150, 4, 48, dtype=dtype), [64, 100], [1, 2], False)) < bound


def test_views_of_one_packed_projection_are_read_where_they_are() -> None:
    packed = torch.randn(1, 70, 3, 4, 16, device=DEVICE)
    expected = dilated_attention(*(x.clone() for x in packed.unbind(2)), [16, 40], [1, 4], backend="naive")
    torch.testing.assert_close(
        dilated_attention(*packed.unbind(2), [16, 40], [1, 4], backend="fused"), expected, rtol=1e-5, atol=1e-5
    )


def test_it_is_a_well_behaved_torch_operation() -> None:
    from longslide.models.slide_encoder.dilated_attention.fused.op import attention_op

    cu_seqlens = torch.tensor([0, 12, 20], dtype=torch.int32, device=DEVICE)
    arguments = (*qkv(20, 2, 16), cu_seqlens, [8, 16], [1, 2], False, 0.25)
    torch.library.opcheck(
        attention_op, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


def test_float32_products_are_as_exact_as_torch_is_set_by_its_older_or_its_newer_way() -> None:
    from longslide.models.slide_encoder.dilated_attention.fused.schedule import settings

    def precision() -> str:
        bounds = torch.tensor([0, 8], dtype=torch.int32, device=DEVICE)
        return settings((8, 1, 16), torch.float32, bounds, "forward", [8], [1], False)[1].PRECISION

    assert precision() == "tf32x3"
    try:
        torch.set_float32_matmul_precision("high")
        assert precision() == "tf32"
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            torch.get_float32_matmul_precision()
        assert precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.slow
def test_two_runs_are_equal_to_the_last_bit() -> None:
    inputs = qkv(1, 100, 2, 16)
    results = []
    for _ in range(2):
        output = dilated_attention(*inputs, [32, 100], [1, 2], backend="fused")
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_the_kernels_do_not_take_is_said_or_left_to_plain_pytorch() -> None:
    q, k, v = qkv(1, 12, 2, 4)
    with pytest.raises(ValueError, match=r"do not take .* ratios \[2, 3\]"):
        dilated_attention(q, k, v, [4, 6], [2, 3], backend="fused")
    torch.testing.assert_close(
        dilated_attention(q, k, v, [4, 6], [2, 3]), dilated_attention(q, k, v, [4, 6], [2, 3], backend="naive")
    )


@pytest.mark.slow
def test_packed_sequences_are_those_one_at_a_time() -> None:
    lengths = [1, 33, 40, 7]
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    inputs = qkv(sum(lengths), 1, 16)
    direction = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    packed = dilated_attention(*inputs, [16, 50, 128], [1, 2, 4], cu_seqlens=cu_seqlens, backend="fused")
    alone = torch.cat(
        [
            dilated_attention(*(x[None] for x in parts), [16, 50, 128], [1, 2, 4], backend="fused")[0]
            for parts in zip(*(x.split(lengths) for x in inputs), strict=True)
        ]
    )
    assert torch.equal(packed, alone)
    grads = [torch.autograd.grad(output, inputs, direction) for output in (packed, alone)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [16, 48])
def test_rows_past_the_last_sequence_are_zero_and_so_are_their_gradients(head_dim: int) -> None:
    """CUDA graphs run a sequence as one a little longer; what its end holds must not reach any gradient."""
    lengths, ratios = [16, 50], [1, 4]
    qkv = torch.randn(120, 3, 1, head_dim, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    cu_seqlens = torch.tensor([0, 30, 71], dtype=torch.int32, device=DEVICE)
    padded, alone = (x.clone().requires_grad_() for x in (qkv, qkv[:71]))
    outputs = [fused_dilated_self_attention(x, cu_seqlens, lengths, ratios) for x in (padded, alone)]
    (grad,) = torch.autograd.grad(outputs[0][:71].square().sum(), padded)
    (wanted,) = torch.autograd.grad(outputs[1].square().sum(), alone)
    assert torch.equal(outputs[0][:71], outputs[1])
    assert torch.equal(grad[:71], wanted)
    assert outputs[0][71:].count_nonzero() == 0
    assert grad[71:].count_nonzero() == 0


@pytest.mark.slow
def test_one_projection_gives_what_its_three_parts_give() -> None:
    qkv = torch.randn(60, 3, 2, 48, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    cu_seqlens = torch.tensor([0, 60], dtype=torch.int32, device=DEVICE)
    together = fused_dilated_self_attention(qkv, cu_seqlens, [16, 60], [1, 2])
    apart = dilated_attention(*qkv.unbind(1), [16, 60], [1, 2], cu_seqlens=cu_seqlens, backend="fused")
    assert torch.equal(together, apart)
    grads = [torch.autograd.grad(x.square().sum(), qkv)[0] for x in (together, apart)]
    assert torch.equal(*grads)


def one_row(q: Tensor, k: Tensor, v: Tensor, token: int, head: int, lengths: list[int], ratios: list[int]) -> Tensor:
    """The output of one token and head of `(T, H, D)`, from the definition, in float64."""
    logits, values = [], []
    for segment_length, ratio in zip(lengths, ratios, strict=True):
        width, offset = min(segment_length, len(q)), head // -(-q.shape[1] // ratio)
        start = token // width * width
        if (token - start) % ratio != offset:
            continue
        keys = torch.arange(start + offset, min(start + width, len(q)), ratio, device=q.device)
        logits.append(k[keys, head].double() @ q[token, head].double() * q.shape[2] ** -0.5)
        values.append(v[keys, head].double())
        zeros = -(-width // ratio) - len(keys)
        logits.append(logits[-1].new_zeros(zeros))
        values.append(values[-1].new_zeros(zeros, q.shape[2]))
    if not logits:
        return torch.zeros(q.shape[2], dtype=torch.float64, device=q.device)
    return torch.cat(logits).softmax(0) @ torch.cat(values)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tokens",
    [
        200,
        pytest.param(1_000_000, marks=pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: a million tokens")),
    ],
)
def test_rows_of_long_sequences_are_those_of_the_definition(tokens: int) -> None:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    q, k, v = (x.detach() for x in qkv(tokens, 3, 48, dtype=dtype))
    lengths, ratios = [64, tokens // 7, tokens], [1, 4, 16]
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE)
    found = dilated_attention(q, k, v, lengths, ratios, cu_seqlens=cu_seqlens, backend="fused")
    for token in random.Random(0).sample(range(tokens), 40):
        for head in range(3):
            wanted = one_row(q, k, v, token, head, lengths, ratios)
            error = (found[token, head].double() - wanted).norm() / wanted.norm()
            assert error < (2e-2 if dtype == torch.bfloat16 else 2e-6), (token, head)


@pytest.mark.parametrize("head_dim", [16, 48])
@pytest.mark.parametrize("size", [1, 30, 300])
def test_extreme_logits_are_no_matter(size: float, head_dim: int) -> None:
    """A logit far above the token's own makes the kernel take the running maximum instead."""
    inputs = [size * x.detach() for x in qkv(1, 90, 2, head_dim)]
    inputs[1][:, 40] = 10 * inputs[0][:, 70]  # one key that one query likes far better than its own
    expected = dilated_attention(*(x.double() for x in inputs), [32, 90], [1, 2], backend="naive")
    found = dilated_attention(*inputs, [32, 90], [1, 2], backend="fused")
    assert torch.isfinite(found).all()
    assert (found.double() - expected).norm() < 1e-3 * expected.norm()


def test_without_a_c_compiler_triton_cannot_start_its_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not triton_runs.__wrapped__()
    (tmp_path / "gcc").touch(mode=0o755)
    assert triton_runs.__wrapped__()

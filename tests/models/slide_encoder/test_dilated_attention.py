"""Dilated attention: the published numbers hold, and the fast path is the readable one."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from longslide import dilated_attention
from longslide.models.slide_encoder.dilated_attention import attend
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

REFERENCE = sorted((Path(__file__).parent / "reference").glob("dilated_attention_*.npz"))


def qkv(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=dtype, generator=generator, requires_grad=grad) for _ in range(3)]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    # The floor: where the true gradient is zero (one key alone) only rounding is left to compare.
    return ((actual.double() - expected.double()).norm() / (expected.double().norm() + 1e-3)).item()


@pytest.mark.parametrize("backend", ["naive", "gather"])
@pytest.mark.parametrize("file", REFERENCE, ids=lambda file: file.stem.removeprefix("dilated_attention_"))
def test_the_numbers_of_the_published_implementation_hold(file: Path, backend: str) -> None:
    with np.load(file) as reference:
        q, k, v, out = (torch.from_numpy(reference[name]) for name in ("q", "k", "v", "out"))
        lengths, ratios = reference["segment_lengths"].tolist(), reference["dilated_ratios"].tolist()
        result = dilated_attention(q, k, v, lengths, ratios, bool(reference["is_causal"]), backend=backend)
    assert (result - out).abs().max() < 2e-6


def test_there_are_reference_files() -> None:
    assert len(REFERENCE) == 10


def configurations(count: int) -> list[tuple[int, int, int, int, list[int], list[int], bool]]:
    rng = random.Random(0)
    found = []
    for _ in range(count):
        branches = rng.randint(1, 4)
        found.append(
            (
                rng.choice([1, 2]),
                rng.choice([1, 2, 3, rng.randint(4, 90), rng.randint(4, 90)]),
                rng.randint(1, 9),
                rng.choice([1, 3, 8]),
                [rng.randint(1, 100) for _ in range(branches)],
                [rng.randint(1, 9) for _ in range(branches)],
                rng.random() < 0.4,
            )
        )
    return found


@pytest.mark.parametrize("kernel", ["fused", "plain"])
def test_gather_is_naive_in_outputs_and_gradients_whatever_the_lengths_and_ratios(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "plain":  # what runs where PyTorch has no fused kernel; in several blocks
        monkeypatch.setattr(attend, "_kernel", lambda q: "plain")
        monkeypatch.setattr(attend, "_MAX_LOGITS", 200)
    for batch, length, heads, dim, lengths, ratios, causal in configurations(250 if kernel == "fused" else 60):
        inputs = qkv(batch, length, heads, dim, seed=length, grad=True)
        direction = torch.randn(batch, length, heads, dim, dtype=torch.float64)
        results = []
        for backend in ("naive", "gather"):
            output = dilated_attention(*inputs, lengths, ratios, causal, backend=backend)
            results.append([output, *torch.autograd.grad(output, inputs, direction)])
        for expected, actual in zip(*results, strict=True):
            assert relative_error(actual, expected) < 1e-10, (batch, length, heads, dim, lengths, ratios, causal)


@pytest.mark.parametrize("backend", ["naive", "gather"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_gradient_is_the_true_one(backend: str, causal: bool) -> None:
    inputs = qkv(1, 11, 3, 2, grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v: dilated_attention(q, k, v, [4, 7], [2, 3], causal, backend=backend), inputs, fast_mode=True
    )


def test_one_dense_branch_over_everything_is_attention() -> None:
    q, k, v = qkv(2, 33, 4, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(dilated_attention(q, k, v, [64], [1]), expected)


def test_slots_past_the_end_are_zero_keys_with_logit_zero() -> None:
    q, k, v = qkv(1, 5, 1, 4)
    output = dilated_attention(q, k, v, [3], [1])
    logits = torch.cat([q[0, 3:, 0] @ k[0, 3:, 0].T / 2, torch.zeros(2, 1, dtype=q.dtype)], dim=1)
    torch.testing.assert_close(output[0, 3:, 0], logits.softmax(1)[:, :2] @ v[0, 3:, 0])


def test_a_token_no_branch_covers_is_zero_and_has_no_gradient() -> None:
    q, k, v = qkv(1, 8, 2, 4, grad=True)
    output = dilated_attention(q, k, v, [4], [2])
    assert (output[0, 1::2, 0] == 0).all()
    assert (output[0, 0::2, 1] == 0).all()
    output.sum().backward()
    assert v.grad is not None
    assert (v.grad[0, 1::2, 0] == 0).all()
    assert torch.isfinite(v.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_to_float32(dtype: torch.dtype) -> None:
    inputs = [x.to(dtype).requires_grad_() for x in qkv(1, 300, 4, 16)]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    output = dilated_attention(*inputs, [64, 150], [1, 2])
    expected = dilated_attention(*exact, [64, 150], [1, 2])
    assert output.dtype == dtype
    bound = 2e-3 if dtype == torch.float16 else 2e-2
    assert relative_error(output, expected) < bound
    for actual, wanted in zip(
        torch.autograd.grad(output.float().square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), exact),
        strict=True,
    ):
        assert relative_error(actual, wanted) < 3 * bound


def test_views_of_one_packed_projection_give_what_copies_give() -> None:
    packed = torch.randn(2, 70, 3, 4, 8, dtype=torch.float64)
    views = packed.unbind(2)
    copies = [view.clone() for view in views]
    torch.testing.assert_close(
        dilated_attention(*views, [16, 40], [1, 4]), dilated_attention(*copies, [16, 40], [1, 4])
    )


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for item in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(item, Tensor):
                self.numel = max(self.numel, item.numel())
        return result


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["fused", "plain"])
def test_memory_is_linear_in_the_number_of_tokens(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "plain":
        monkeypatch.setattr(attend, "_kernel", lambda q: "plain")
        monkeypatch.setattr(attend, "_MAX_LOGITS", 2**19)
    inputs = qkv(1, 30_001, 4, 8, dtype=torch.float32, grad=True)
    with LargestTensor() as largest:
        dilated_attention(*inputs, [1024, 2**20], [1, 16]).sum().backward()
    assert largest.numel <= inputs[0].numel(), "no padding, no table of logits"


def test_activation_checkpointing_and_shared_inputs_give_the_same_gradients() -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dilated_attention(dilated_attention(q, k, v, [16, 40], [1, 4]), k, v, [7], [2])

    inputs = qkv(1, 70, 4, 8, grad=True)
    expected = torch.autograd.grad(twice(*inputs).square().sum(), inputs)
    output: Tensor = checkpoint(twice, *inputs, use_reentrant=False)
    for actual, wanted in zip(torch.autograd.grad(output.square().sum(), inputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_a_call_without_gradients_does_not_spoil_a_later_one_with_them() -> None:
    inputs = qkv(1, 71, 4, 8, grad=True)
    with torch.inference_mode():  # what it makes cannot be saved for a backward
        before = dilated_attention(*inputs, [16, 40], [1, 4])
    output = dilated_attention(*inputs, [16, 40], [1, 4])
    output.sum().backward()
    assert torch.equal(output, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 5, 2, 4)}, "alike"),
        ({"q": torch.zeros(6, 2, 4)}, "alike"),
        ({"v": torch.zeros(1, 6, 2, 4, dtype=torch.float64)}, "one dtype"),
        ({"segment_lengths": [4, 5]}, "one of each"),
        ({"segment_lengths": [], "dilated_ratios": []}, "positive"),
        ({"dilated_ratios": [0]}, "positive"),
        ({"backend": "flash"}, "flash"),
    ],
)
def test_input_that_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {name: torch.zeros(1, 6, 2, 4) for name in "qkv"} | {"segment_lengths": [4], "dilated_ratios": [1]}
    with pytest.raises(ValueError, match=message):
        dilated_attention(**(arguments | change))  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("length", "dim", "causal"), [(1537, 48, False), (500, 8, True), (301, 6, False)])
@pytest.mark.parametrize("path", ["auto", "gather", "gather before Ampere"])
def test_on_the_gpu_the_same(
    path: str, dtype: torch.dtype, length: int, dim: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "gather before Ampere":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    backend = path.split()[0]
    inputs = [x.to("cuda", dtype).requires_grad_() for x in qkv(2, length, 8, dim)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    direction = torch.randn(2, length, 8, dim, dtype=torch.float64, device="cuda")
    output = dilated_attention(*inputs, [128, 400, 1000], [1, 2, 4], causal, backend=backend)
    expected = dilated_attention(*exact, [128, 400, 1000], [1, 2, 4], causal, backend="naive")
    bound = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert relative_error(output, expected) < bound
    for actual, wanted in zip(
        torch.autograd.grad(output, inputs, direction.to(dtype)),
        torch.autograd.grad(expected, exact, direction),
        strict=True,
    ):
        assert relative_error(actual, wanted) < bound

"""A LongNet layer in two steps by the kernels is the plain layer, outputs and gradients."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from unittest import mock

import pytest
import torch
from longslide.models.slide_encoder.longnet import LongNetLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")
from longslide.models.slide_encoder import layer_steps, longnet, norm_linear_fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # Triton's interpreter has no bfloat16
LENGTHS = [5, 1, 9]


def make_layer(width: int = 32, heads: int = 2, **options: float) -> LongNetLayer:
    torch.manual_seed(0)
    layer = LongNetLayer(width, heads, 2 * width, (8, 16), (1, 2), **options).to(DEVICE)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def inputs(width: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    x, update = torch.randn(2, sum(LENGTHS), width, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return x, update, torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0).int()


@contextmanager
def halves(taken: bool = True) -> Iterator[mock.Mock]:
    """Steps by the kernels, which run in their interpreter where there is no GPU; or the plain layers."""
    with (
        mock.patch.object(longnet, "has_kernels", return_value=taken),
        mock.patch.object(layer_steps, "_forward", side_effect=layer_steps._forward) as steps,
    ):
        yield steps


def results(
    layer: LongNetLayer, x: Tensor, update: Tensor | None, cu_seqlens: Tensor, recompute: bool = False
) -> dict[str, Tensor]:
    """Outputs, and the gradients of all that has one."""
    layer.zero_grad()
    leaves = {"x": x.detach().clone().requires_grad_()}
    if update is not None:
        leaves["update"] = update.detach().clone().requires_grad_()
    call = (lambda *inputs: checkpoint(layer, *inputs, use_reentrant=False)) if recompute else layer
    tokens, more = call(leaves["x"], cu_seqlens, None, leaves.get("update"))
    direction = torch.linspace(-1, 2, tokens.numel(), device=tokens.device).view(tokens.shape)
    ((tokens + 2 * more) * direction.to(tokens.dtype) + more * direction.flip(0).to(more.dtype)).sum().backward()
    named = dict(layer.named_parameters()) | leaves
    return {"tokens": tokens.detach(), "more": more.detach()} | {
        n: p.grad for n, p in named.items() if p.grad is not None
    }


def assert_alike(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].double() - value.double()).norm() <= bound * value.double().norm() + 1e-9, name


@pytest.mark.parametrize(
    ("width", "heads", "updated", "recompute"), [(32, 2, False, False), (32, 2, True, True), (40, 1, True, False)]
)
def test_outputs_and_gradients_are_those_of_the_plain_layer(
    width: int, heads: int, updated: bool, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_linear_fused, "PROGRAMS", 3)  # so that a program takes many rows
    prepared = lru_cache(layer_steps._launches.__wrapped__)
    monkeypatch.setattr(layer_steps, "_launches", prepared)  # other tests' are for other numbers of programs
    layer = make_layer(width, heads)
    x, update, cu_seqlens = inputs(width)
    with halves(False):
        exact = results(
            copy.deepcopy(layer).double(), x.double(), update.double() if updated else None, cu_seqlens, recompute
        )
    for _ in range(2):  # launches are prepared, then repeated
        with halves() as steps:
            found = results(layer, x, update if updated else None, cu_seqlens, recompute)
        assert steps.call_count == 2 + 2 * recompute
        assert_alike(found, exact, 1e-5)


def test_gradients_of_what_is_frozen_are_not_asked_for() -> None:
    layer = make_layer()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in ("qkv.weight", "ffn_norm.bias"))
    with halves(False):
        wanted = results(layer, *inputs())
    with halves():
        assert_alike(results(layer, *inputs()), wanted, 1e-5)
    assert wanted.keys() == {"tokens", "more", "x", "update", "qkv.weight", "ffn_norm.bias"}


def test_an_output_that_nobody_uses_has_no_gradient() -> None:
    layer = make_layer()
    x, update, cu_seqlens = inputs()
    for output in range(2):
        grads = []
        for taken in (False, True):
            with halves(taken):
                leaf = x.clone().requires_grad_()
                found = layer(leaf, cu_seqlens, update=update)[output]
                grads.append(torch.autograd.grad(found[::2].square().sum(), leaf)[0])
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_weights_of_full_precision_take_half_under_autocast_and_keep_their_gradients_dtype() -> None:
    layer = make_layer()
    with halves(False):
        exact = results(copy.deepcopy(layer).double(), *(x.double() for x in inputs()[:2]), inputs()[2])
    with halves(), torch.autocast(DEVICE, HALF):
        found = results(layer, *inputs())
    assert found["more"].dtype == HALF
    assert {value.dtype for name, value in found.items() if name != "more"} == {torch.float32}
    assert_alike(found, exact, 5e-2)


def test_parameters_of_several_dtypes_have_gradients_of_their_own() -> None:
    layer = make_layer().to(HALF)
    layer.ffn_inner_norm.float()
    with halves(False):
        exact = results(copy.deepcopy(layer).double(), *(x.double() for x in inputs()[:2]), inputs()[2])
    x, update, cu_seqlens = inputs()
    with halves():
        found = results(layer, x.to(HALF), update.to(HALF), cu_seqlens)
    for name, parameter in layer.named_parameters():
        assert found[name].dtype == parameter.dtype
    assert_alike(found, exact, 6e-2)


def test_memory_that_is_not_aligned_or_in_order_does_not_matter() -> None:
    layer = make_layer()
    x, update, cu_seqlens = inputs()
    with halves(False):
        wanted = results(layer, x, update, cu_seqlens)
    odd = torch.empty(1 + 32, device=DEVICE)
    odd[1:] = layer.ffn_norm.weight.detach()
    layer.ffn_norm.weight = torch.nn.Parameter(odd[1:])
    places = torch.zeros(1 + len(cu_seqlens), dtype=torch.int32, device=DEVICE)
    places[1:] = cu_seqlens
    with halves():
        for _ in range(2):
            assert_alike(results(layer, x.t().contiguous().t(), update, places[1:]), wanted, 1e-5)


def test_a_second_derivative_is_refused() -> None:
    layer = make_layer()
    x, _, cu_seqlens = inputs()
    x.requires_grad_()
    with halves():
        (grad,) = torch.autograd.grad(torch.add(*layer(x, cu_seqlens)).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.sum().backward()


def test_dropout_and_dropped_paths_come_between_the_steps() -> None:
    layer = make_layer(dropout=0.5, drop_path=0.5)
    found = []
    for taken in (False, True):
        torch.manual_seed(3)
        with halves(taken):
            found.append(results(layer, *inputs()))
    assert_alike(found[1], found[0], 1e-5)
    layer.dropout.p = 1.0
    with halves():
        assert not results(layer, *inputs())["more"].any()


def test_without_gradients_nothing_is_kept() -> None:
    layer = make_layer()
    x, update, cu_seqlens = inputs()
    with halves(False), torch.no_grad():
        wanted = layer(x, cu_seqlens, update=update)
    with halves(), torch.no_grad():
        found = layer(x, cu_seqlens, update=update)
    for one, other in zip(found, wanted, strict=True):
        assert one.grad_fn is None
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_a_compiled_layer_is_the_eager_one() -> None:
    layer = make_layer(64, 4)
    wanted = results(layer, *inputs(64))
    layer.compile(dynamic=True)
    for _ in range(2):
        assert_alike(results(layer, *inputs(64)), wanted, 1e-4)


@needs_gpu
def test_many_tokens_take_their_norms_and_linear_layers_one_by_one_for_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = make_layer(64, 4)
    tokens = layer_steps.MAX_TOKENS + 5
    x, update = torch.randn(2, tokens, 64, device=DEVICE)
    cu_seqlens = torch.tensor([0, 9000, tokens], dtype=torch.int32, device=DEVICE)
    wanted = results(layer, x, update, cu_seqlens)
    monkeypatch.setattr(layer_steps, "MAX_TOKENS", tokens)
    with mock.patch.object(layer_steps, "_forward", side_effect=layer_steps._forward) as steps:
        found = results(layer, x, update, cu_seqlens)
    assert steps.call_count == 2
    assert_alike(found, wanted, 1e-5)

"""Norms and the linear layers behind them: the Triton kernels are the plain layers, outputs and gradients."""

import pytest
import torch
from longslide.models.slide_encoder.norm_linear import norm_linear
from torch import nn

pytest.importorskip("triton")
from longslide.models.slide_encoder import norm_linear_fused
from longslide.models.slide_encoder.norm_linear_fused import fused_norm_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("residual", [None, torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(1, 48), (9, 64), (70, 20)])
def test_outputs_and_gradients_are_those_of_the_plain_layers(
    rows: int, width: int, residual: torch.dtype | None, gelu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_linear_fused, "PROGRAMS", 3)  # so that a program takes many rows
    torch.manual_seed(rows)
    norm, linear = nn.LayerNorm(width, device=DEVICE), nn.Linear(width, 24, device=DEVICE)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    exact = nn.ModuleList([nn.LayerNorm(width), nn.Linear(width, 24)]).double().to(DEVICE)
    exact.load_state_dict(nn.ModuleList([norm, linear]).state_dict())
    inputs = [3 * torch.randn(rows, width, device=DEVICE) + 1]
    if residual is not None:
        inputs.append(torch.randn(rows, width, device=DEVICE).to(residual))
    for x in inputs:
        x.requires_grad_()
    same = [x.detach().double().requires_grad_() for x in inputs]
    other = same[1] if residual is not None else None
    wanted = norm_linear(same[0], exact[0], exact[1], residual=other, gelu=gelu)
    found = fused_norm_linear(inputs[0], norm, linear, inputs[1] if residual is not None else None, gelu)
    direction = [torch.randn(x.shape, dtype=torch.float64, device=DEVICE) for x in wanted]
    (wanted[0] * direction[0] + 0).sum().add((wanted[1] * direction[1]).sum()).backward()
    (found[0].double() * direction[0]).sum().add((found[1].double() * direction[1]).sum()).backward()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    parameters = zip([*norm.parameters(), *linear.parameters()], exact.parameters(), strict=True)
    for a, b in [*zip(inputs, same, strict=True), *parameters]:
        bound = 1e-5 if a.dtype == torch.float32 else 2e-3
        assert (a.grad.double() - b.grad).norm() <= bound * b.grad.norm().clamp(min=1), a.shape


def test_gradients_that_are_summed_under_autocast_keep_their_bits() -> None:
    """As where a CUDA graph of the backward is made within the forward's autocast."""
    x = torch.full((3, 1), 1 + 2**-12, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert norm_linear_fused.column_sums((x, x), torch.float32)[1] == 3 * (1 + 2**-12)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("rows", [1, 130, 1024, 1025, 5000])
def test_columns_are_summed_in_float32_and_rounded_once(rows: int, count: int) -> None:
    torch.manual_seed(rows)
    matrices = [torch.randn(rows // part + 1, 150 // part, device=DEVICE).bfloat16() for part in range(1, count + 1)]
    matrices[0] = matrices[0].float()
    found = norm_linear_fused.column_sums(matrices, torch.bfloat16)
    for x, sums in zip(matrices, found.split([x.shape[1] for x in matrices]), strict=True):
        assert sums.dtype == torch.bfloat16
        torch.testing.assert_close(
            sums, x.double().sum(0).bfloat16(), rtol=2**-7, atol=1e-3
        )  # the interpreter truncates

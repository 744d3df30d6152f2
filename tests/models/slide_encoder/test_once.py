"""A backward written by hand gives a first derivative, and refuses a second one instead of giving a wrong one."""

from typing import Any

import pytest
import torch
from longslide.models.slide_encoder.once import differentiable_once
from torch import Tensor


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def test_the_first_derivative_is_given_and_the_second_refused() -> None:
    x = torch.randn(3, requires_grad=True)
    (grad,) = torch.autograd.grad(Double.apply(x).square().sum(), x)
    torch.testing.assert_close(grad, 8 * x)
    (grad,) = torch.autograd.grad(Double.apply(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()

"""Attention to gathered keys, held against that of torch in half precision."""

import pytest
import torch
from longslide.models.slide_encoder.attention_pattern import attention
from torch.nn.functional import scaled_dot_product_attention

EVERY_KEY = {
    "sliding-window": {"window": 599},
    "random": {"random_keys": 600},
    "learned": {"block_size": 32, "chosen_blocks": 18},
}
"""Settings with which each of 600 tokens sees all."""

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", EVERY_KEY)
def test_in_half_precision_sharp_attention_is_as_near_as_that_of_torch(
    pattern: str, dtype: torch.dtype, device: str
) -> None:
    """Logits of about 60, rounded to half precision, would make weights that are wrong by a tenth."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (gain * torch.randn(1, 600, 2, 48, generator=generator) for gain in (3, 3, 1))
    inputs = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found = attention(*inputs, pattern, **EVERY_KEY[pattern])
    theirs, wanted = (
        scaled_dot_product_attention(*(x.transpose(1, 2) for x in given)).transpose(1, 2) for given in (inputs, exact)
    )
    direction = torch.randn(wanted.shape, generator=generator, dtype=torch.float64).to(device)
    assert found.dtype == dtype
    of_each = [
        [output, *torch.autograd.grad(output, given, direction.to(output.dtype))]
        for output, given in ((found, inputs), (theirs, inputs), (wanted, exact))
    ]
    for ours, torchs, right in zip(*of_each, strict=True):
        assert (ours.double() - right).norm() < 2 * (torchs.double() - right).norm()

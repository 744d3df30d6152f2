"""A kernel launched again is the one compiled for such arguments: Triton makes others for other dtypes and alignments."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from longslide.models.slide_encoder.launch import Repeated, launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _double(x, y, count, factor, BLOCK: tl.constexpr):
    where = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + where, (tl.load(x + where, mask=where < count) * factor).to(y.dtype.element_ty), mask=where < count)


@pytest.mark.parametrize("block", [32, 64])
def test_launches_follow_dtypes_alignments_and_numbers(block: int) -> None:
    for _ in range(2):
        for dtype in (torch.float32, torch.float16, torch.int32):
            for start in (0, 1, 8):
                for count in (1, 31, 64, 320):
                    x = torch.arange(400, device=DEVICE).to(dtype)[start:]
                    y = torch.zeros_like(x)
                    launch(_double, (-(-count // block),), (x, y, count, 2.0), (block,))
                    assert torch.equal(y[:count], 2 * x[:count])
                    assert not y[count:].any()


def test_repeated_launches_take_the_arguments_they_are_given() -> None:
    again = Repeated()
    for number in range(4):
        x = torch.arange(64.0, device=DEVICE) + number
        y = torch.zeros_like(x)
        again(_double, (2,), (x, y, 48, 2.0 + number), (32,))
        assert torch.equal(y[:48], (2 + number) * x[:48])
        assert not y[48:].any()

"""Rows of the arrangement from rank to rank, where sequences are spread over several: see `windows`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from ..windows import Windows

BLOCK = 64
"""Rows that a program of `move_rows` moves."""


@triton.jit
def move_rows(
    rows, packed, index, count, STRIDE: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, PACK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of WIDTH numbers, chosen by `index`, into columns from FIRST on of packed rows of STRIDE numbers, or back."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = (i < count)[:, None]
    row = tl.load(index + i, mask=i < count, other=0)
    column = tl.arange(0, WIDTH)[None, :]
    here = rows + row[:, None] * WIDTH + column
    there = packed + i.to(tl.int64)[:, None] * STRIDE + FIRST + column
    if PACK:
        tl.store(there, tl.load(here, mask=valid), mask=valid)
    else:
        tl.store(here, tl.load(there, mask=valid), mask=valid)


@dataclass(frozen=True)
class Fetch:
    """Rows of other ranks on their way."""

    tensors: Sequence[Tensor]
    windows: Windows
    received: Tensor
    work: dist.Work

    def wait(self) -> None:
        """Put them where they belong. On a GPU the stream waits, not the process."""
        self.work.wait()
        _move(self.tensors, self.received, self.windows.receive, pack=False)


def fetch(windows: Windows, *tensors: Tensor) -> Fetch | None:
    """Begin to fetch the other ranks' rows of tensors `(H, rows, columns)`. All ranks call it together.

    Returns:
        What to wait for; None where nothing travels.
    """
    if not windows.travels:
        return None
    numbers = [x.flatten(0, 1).view(torch.int64) for x in tensors]  # fewer and larger ones to move
    width = sum(x.shape[1] for x in numbers)
    sent, received = (numbers[0].new_empty(len(index), width) for index in (windows.send, windows.receive))
    _move(numbers, sent, windows.send, pack=True)
    sizes = (windows.receive_sizes, windows.send_sizes)
    work = dist.all_to_all_single(received, sent, *sizes, group=windows.group, async_op=True)
    assert work is not None
    return Fetch(numbers, windows, received, work)


def _move(tensors: Sequence[Tensor], packed: Tensor, index: Tensor, pack: bool) -> None:
    first = 0
    for x in tensors:
        if len(index):
            grid = (triton.cdiv(len(index), BLOCK),)
            move_rows[grid](x, packed, index, len(index), packed.shape[1], first, x.shape[1], pack, BLOCK)
        first += x.shape[1]

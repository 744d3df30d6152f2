"""Which rows of the kernels' arrangement a rank holds of sequences spread over ranks, and which of others it fetches.

The kernels take tokens by head and residue class. Of a class a rank needs the positions of the segments that meet its part
of the sequence and whose branch covers the class: an interval, for each of them meets that part. This interval is the
class's window, and what lies outside the part comes from the ranks that hold it. Short segments reach a little over the
border in many classes, long ones far in a few: of L tokens 2 L / r or so travel for each head, for the smallest ratio r of a
long branch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """The windows of a rank, for sequences of certain lengths.

    Attributes:
        table: `(B, 2 + H * S)` int32: of each sequence the tokens, the first position here, and where the classes of each
            head begin: position p of class c is row `table[c] + p // S` of its head.
        rows: Rows of a head.
        longest: Tokens of the longest sequence.
        send: Rows to send, by the rank that wants them: `head * rows + row`.
        send_sizes: Their number for each rank.
        receive: Where the rows received go, by the rank that sends them.
        receive_sizes: Their number from each rank.
        travels: Whether any rank receives anything.
        group: The ranks.
    """

    table: Tensor
    rows: int
    longest: int
    send: Tensor
    send_sizes: list[int]
    receive: Tensor
    receive_sizes: list[int]
    travels: bool
    group: dist.ProcessGroup


@lru_cache(maxsize=8)  # every layer asks for the same ones
def make_windows(
    lengths: tuple[tuple[int, ...], ...],
    group: dist.ProcessGroup,
    heads: int,
    segment_lengths: tuple[int, ...],
    dilated_ratios: tuple[int, ...],
    device: torch.device,
) -> Windows:
    """The windows of this rank, by arithmetic alone: no rank asks another.

    Args:
        lengths: Tokens of each sequence on each rank: `lengths[rank][sequence]`.
        group: The ranks.
        heads: Attention heads.
        segment_lengths: Tokens of a segment, for each branch.
        dilated_ratios: Every how many-th token takes part, for each branch: powers of two.
        device: Where the indices go.
    """
    rank = group.rank()
    counts = torch.tensor(lengths)  # (P, B)
    ends = counts.cumsum(0)
    starts, total = ends - counts, ends[-1]
    low, high = class_windows(counts, heads, segment_lengths, dilated_ratios)
    stride = low.shape[3]
    residue = torch.arange(stride)

    def slots(bound: Tensor) -> Tensor:
        """Positions of each class before a bound: position p of class c is its p // S-th."""
        return -((residue - bound) // stride)

    first, after = slots(low), slots(high)
    sizes = (after - first).transpose(1, 2).flatten(2)  # (P, H, B * S)
    begin = (sizes.cumsum(2) - sizes).view(*sizes.shape[:2], -1, stride).transpose(1, 2) - first
    rows = -(-sizes.sum(2).amax(1).clamp(min=1) // 32) * 32  # multiples, for which kernels are compiled once
    table = torch.cat([torch.stack([total, starts[rank]], 1), begin[rank].flatten(1)], 1)

    own_first, own_after = slots(starts[..., None, None]), slots(ends[..., None, None])  # (P, B, 1, S)
    at = begin[rank] + torch.arange(heads)[:, None] * rows[rank]
    parts = []
    for start, stop in (
        (torch.maximum(first, own_first[rank]), torch.minimum(after, own_after[rank])),  # what others want of this one
        (torch.maximum(own_first, first[rank]), torch.minimum(own_after, after[rank])),  # what it wants of them
    ):
        count = (stop - start).clamp(min=0)
        count[rank] = 0
        parts.append((_ranges((start + at).flatten(), count.flatten(), device), count.flatten(1).sum(1).tolist()))
    (send, send_sizes), (receive, receive_sizes) = parts
    travels = bool((low < starts[..., None, None]).any() or (high > ends[..., None, None]).any())
    with torch.inference_mode(False):  # kept for later calls, which may save it for their backward
        return Windows(
            table.int().to(device), int(rows[rank]), int(total.max()), send, send_sizes, receive, receive_sizes, travels,
            group,
        )  # fmt: skip


def class_windows(
    counts: Tensor, heads: int, segment_lengths: Sequence[int], dilated_ratios: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The interval of positions that each rank needs of each class.

    Args:
        counts: `(P, B)` tokens of each rank and sequence.
        heads: Attention heads.
        segment_lengths: Tokens of a segment, for each branch.
        dilated_ratios: Every how many-th token takes part, for each branch.

    Returns:
        `(P, B, H, S)` the first position of each window, and the one after its last.
    """
    stride = max(1, max(dilated_ratios) // 2)
    ends = counts.cumsum(0)
    starts, total = ends - counts, ends[-1]
    low, high = (x[..., None, None].repeat(1, 1, heads, stride) for x in (starts, ends))
    for segment_length, ratio in zip(segment_lengths, dilated_ratios, strict=True):
        width = total.clamp(max=segment_length)
        offset = torch.arange(heads)[:, None] // -(-heads // ratio)
        segments = (starts // width * width, (ends - 1) // width * width)  # those in which the parts begin and end
        covers = [
            (counts > 0)[..., None, None]
            & ((torch.arange(stride) - segment[..., None, None] - offset) % min(ratio, stride) == 0)
            for segment in segments
        ]
        low = torch.where(covers[0], torch.minimum(low, segments[0][..., None, None]), low)
        stop = torch.minimum(segments[1] + width, total)[..., None, None]
        high = torch.where(covers[1], torch.maximum(high, stop), high)
    return low, high


def _ranges(starts: Tensor, counts: Tensor, device: torch.device) -> Tensor:
    """`counts[i]` numbers from `starts[i]` on, for each i, end to end."""
    total = int(counts.sum())
    shift = (starts - counts.cumsum(0) + counts).to(device)
    return torch.arange(total, device=device) + shift.repeat_interleave(counts.to(device), output_size=total)

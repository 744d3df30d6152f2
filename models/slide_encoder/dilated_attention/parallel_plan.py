"""Which keys and values travel between ranks that share a sequence: by arithmetic, that of every rank known to all."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .gather import Piece, branch_pieces


@dataclass(frozen=True)
class Part:
    """Queries of this rank that attend to keys of others.

    Attributes:
        queries: Flat indices `token * heads + head` among this rank's tokens, in the order (slot, head).
        query_shape: (1, slots, heads).
        keys: Indices among the rows received, in the order (slot, head).
        key_shape: (1, slots, heads).
    """

    queries: Tensor
    query_shape: tuple[int, int, int]
    keys: Tensor
    key_shape: tuple[int, int, int]


@dataclass(frozen=True)
class Plan:
    """What a rank computes, sends and receives. A row is one token and head, with its key and value.

    Attributes:
        own: Pieces whose queries and keys are this rank's.
        others: Pieces whose keys are received.
        send: Flat indices of the rows to send, by the receiving rank.
        send_sizes: Rows for each rank.
        receive_sizes: Rows from each rank.
    """

    own: list[Piece]
    others: list[Part]
    send: Tensor
    send_sizes: list[int]
    receive_sizes: list[int]


@lru_cache(maxsize=4)  # every layer asks for the same one
def make_plan(
    lengths: tuple[int, ...],
    rank: int,
    heads: int,
    branches: tuple[tuple[int, int], ...],
    is_causal: bool,
    device: torch.device,
) -> Plan:
    """Plan a layer by arithmetic alone: no rank asks another.

    Args:
        lengths: Tokens on each rank.
        rank: This rank.
        heads: Attention heads.
        branches: Segment length, at most the sequence's, and ratio of each branch.
        is_causal: Whether later keys are hidden.
        device: Where the indices go.

    Returns:
        The plan.
    """
    bounds = [0, *itertools.accumulate(lengths)]
    shards = list(itertools.pairwise(bounds))
    first, stop = shards[rank]

    own: list[Piece] = []
    for width, ratio in branches:
        whole, after = -(-first // width), stop // width  # the segments that lie within the shard
        if after > whole:
            shift = (whole * width - first) * heads
            pieces = branch_pieces((after - whole) * width, heads, width, ratio, device)
            own += [(index + shift, shape, zero_slots) for index, shape, zero_slots in pieces]
    borders = list(_borders(shards[rank], bounds[-1], heads, branches))
    for border in borders:
        slots = torch.arange(border.first_query, border.after_query)
        queries = (border.rows(slots) - first * heads).to(device)
        own.append((queries, (1, len(slots), len(border.heads)), border.zero_slots))

    wanted = [
        _wanted(borders, owner, is_causal) if i != rank and _meet(shards[rank], owner, branches) else _NONE
        for i, owner in enumerate(shards)
    ]
    received = torch.cat(wanted)  # in order: shards are in a row
    others = []
    for border in borders:
        slots = border.other_slots(is_causal)
        if len(slots):
            keys = torch.searchsorted(received, border.rows(slots)).to(device)
            queries = torch.arange(border.first_query, border.after_query)
            index = (border.rows(queries) - first * heads).to(device)
            count = len(border.heads)
            others.append(Part(index, (1, len(queries), count), keys, (1, len(slots), count)))

    sent = [
        _wanted(_borders(reader, bounds[-1], heads, branches), shards[rank], is_causal)
        if i != rank and _meet(reader, shards[rank], branches)
        else _NONE
        for i, reader in enumerate(shards)
    ]
    send = (torch.cat(sent) - first * heads).to(device)
    return Plan(own, others, send, [len(rows) for rows in sent], [len(rows) for rows in wanted])


_NONE = torch.zeros(0, dtype=torch.int64)


def _meet(shard: tuple[int, int], other: tuple[int, int], branches: tuple[tuple[int, int], ...]) -> bool:
    """Whether a segment lies in both shards: of thousands of ranks only a few need a closer look."""
    first, stop = shard
    return any(other[0] < -(-stop // width) * width and other[1] > first // width * width for width, _ in branches)


@dataclass(frozen=True)
class _Border:
    """Heads that have the same slots in a segment of which a shard holds a part.

    Attributes:
        start: First token of the segment.
        ratio: Ratio of the branch.
        heads: The heads.
        offsets: Their offsets.
        all_heads: Number of heads of the layer.
        real_slots: Slots with a token.
        zero_slots: Slots without.
        first_query: First slot whose token is in the shard.
        after_query: The slot after the last of these.
    """

    start: int
    ratio: int
    heads: Tensor
    offsets: Tensor
    all_heads: int
    real_slots: int
    zero_slots: int
    first_query: int
    after_query: int

    def rows(self, slots: Tensor) -> Tensor:
        """Flat indices `token * heads + head` of these slots, in the order (slot, head)."""
        return ((self.start + slots[:, None] * self.ratio + self.offsets) * self.all_heads + self.heads).flatten()

    def other_slots(self, is_causal: bool, first: int = 0, stop: int | None = None) -> Tensor:
        """Slots that the shard's queries see and other shards hold, from `first` to before `stop`."""
        stop = self.real_slots if stop is None else stop
        before = torch.arange(max(0, first), max(0, first, min(self.first_query, stop)))
        if is_causal:
            return before
        begin = max(first, self.after_query)
        return torch.cat([before, torch.arange(begin, max(begin, min(self.real_slots, stop)))])


def _borders(
    shard: tuple[int, int], total: int, heads: int, branches: tuple[tuple[int, int], ...]
) -> Iterator[_Border]:
    """The segments of which the shard holds a part, and a short last one."""
    first, stop = shard
    if first == stop:
        return
    for width, ratio in branches:
        offsets = [head // math.ceil(heads / ratio) for head in range(heads)]
        for segment in sorted({first // width, (stop - 1) // width}):
            start, end = segment * width, min(segment * width + width, total)
            if first <= start and start + width <= stop:
                continue
            alike: dict[tuple[int, int, int], list[int]] = {}
            for head, offset in enumerate(offsets):
                counts = [
                    max(0, -(-(token - start - offset) // ratio)) for token in (max(first, start), min(stop, end), end)
                ]
                if counts[1] > counts[0]:
                    alike.setdefault((counts[0], counts[1], counts[2]), []).append(head)
            for (first_query, after_query, real), chosen in alike.items():
                yield _Border(
                    start, ratio, torch.tensor(chosen), torch.tensor([offsets[head] for head in chosen]), heads,
                    real, math.ceil(width / ratio) - real, first_query, after_query,
                )  # fmt: skip


def _wanted(borders: Iterator[_Border] | list[_Border], owner: tuple[int, int], is_causal: bool) -> Tensor:
    """Rows (token * heads + head) that a shard with these borders wants of another one, sorted, each once."""
    first, stop = owner
    found = [_NONE]
    for border in borders:
        # Slots that may lie in the owner's shard for one of the heads; then exactly those that do.
        low = (first - border.start - int(border.offsets.max())) // border.ratio
        high = (stop - border.start) // border.ratio + 1
        slots = border.other_slots(is_causal, max(0, low), max(0, high))
        rows = border.rows(slots)
        found.append(rows[(rows >= first * border.all_heads) & (rows < stop * border.all_heads)])
    once: Tensor = torch.unique(torch.cat(found))
    return once

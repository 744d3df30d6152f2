"""The walk over branches: which keys a block of rows meets, branch by branch and segment by segment.

Forward and backward differ only in what they do with the keys. `walk` is handed that as a function, which Triton inlines,
and its accumulators as a tuple: the code is that of loops written out in each kernel.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .layout import class_row, extent, find_sequence


class Sizes(NamedTuple):
    """What is known when a kernel is compiled; the legend is in this package's docstring."""

    H: int
    D: int
    DP: int
    SPARE: bool
    R: int
    S: int
    NB: int
    LARGEST: int
    CAUSAL: bool
    MERGE: bool
    BM: int
    BN: int
    PRECISION: str
    SHARDED: bool


class Block(NamedTuple):
    """The rows of a program: BM tokens of one class of one sequence.

    Attributes:
        begin: The token at position 0 of their sequence, or where it would be.
        length: Positions of the sequence.
        here: The first position that this rank holds.
        stop: The position after the last one that this rank holds.
        end: End of what is to be written: rows past the last sequence are written too, zeros.
        origin: First row of the sequence in the arrangement.
        classes: Where its classes are in there, as `class_row` takes it.
        step: Tokens from one row to the next.
        rows: (BM,) positions in the sequence.
        valid: (BM,) which of them this rank holds.
        own: (BM,) rows of the arrangement.
        first: The first position that this rank holds; `end` for none.
        last: The last position that this rank holds.
    """

    begin: Any
    length: Any
    here: Any
    stop: Any
    end: Any
    origin: Any
    classes: Any
    step: Any
    rows: Any
    valid: Any
    own: Any
    first: Any
    last: Any


class Keys(NamedTuple):
    """Keys of one segment, `count` of them; BN are taken at a time.

    Attributes:
        slot: (BN,) which of BN keys each one is.
        lane: (BN,) rows of the arrangement of the first BN.
        stride: Rows from BN keys to the next BN.
        log_times: (BN,) log2 of how many branches have each.
        start: Position of the first.
        ratio: Positions from one to the next.
        count: How many there are.
        inside: (BM,) which rows the segment's branch covers.
    """

    slot: Any
    lane: Any
    stride: Any
    log_times: Any
    start: Any
    ratio: Any
    count: Any
    inside: Any


@triton.jit
def place(cu_seqlens, shards, sequences, tokens, plan, head, z: tl.constexpr):
    """This program's `Block`. Two neighbouring programs share 2 * BM rows of one class of S.

    Of a sequence spread over ranks blocks begin where they would in the whole one: at borders of segments, mostly.
    """
    span = 2 * z.BM * z.S
    pair = tl.program_id(0) // 2
    half = tl.program_id(0) % 2
    MORE: tl.constexpr = 2 if z.SHARDED else 1
    sequence, begin, count = find_sequence(cu_seqlens, sequences, pair, span, MORE)
    length, here, origin, classes = extent(shards, sequence, begin, count, head, z)
    stop = here + count
    end = here + tl.where(sequence == sequences - 1, tokens - begin, count)
    residue = tl.load(plan + z.NB * (2 + z.H) + head * z.S + tl.program_id(2))  # the classes with most keys first
    first = residue + span * (here // span + pair - begin // span - MORE * sequence)
    width = tl.maximum(tl.minimum(tl.load(plan + 2 * z.LARGEST), length), 1)
    offset = tl.load(plan + z.NB * 2 + z.LARGEST * z.H + head)
    alternate = (z.S < z.R) & (((residue - first // width * width - offset) & (z.S - 1)) == 0)
    first += half * tl.where(alternate, z.S, z.S * z.BM)
    step = tl.where(alternate, z.R, z.S)
    rows = first + step * tl.arange(0, z.BM)
    last = first + step * (z.BM - 1)
    valid = rows < stop
    if z.SHARDED:
        valid = valid & (rows >= here)
        first = tl.maximum(first, here + ((first - here) & (step - 1)))
        first = tl.where(first > last, end, first)
    own = class_row(classes, residue, z.SHARDED) + rows // z.S
    last = tl.minimum(last, stop - 1)
    return Block(begin - here, length, here, stop, end, origin, classes, step, rows, valid, own, first, last)


@triton.jit
def written(block, z: tl.constexpr):
    """(BM,) which rows of a block are to be written."""
    rows = block.rows < block.end
    if z.SHARDED:
        rows = rows & (block.rows >= block.here)
    return rows


@triton.jit
def look_up(plan, branch, head, block, z: tl.constexpr):
    """What a branch is to a block: (segment length, log2 of the ratio, offset of the head, start of the first row's
    segment, whether that segment holds and the branch covers all rows, whether it holds all and covers none)."""
    width = tl.minimum(tl.load(plan + 2 * branch), block.length)
    shift = tl.load(plan + 2 * branch + 1)
    offset = tl.load(plan + z.NB * 2 + branch * z.H + head)
    start = block.first // width * width
    one = block.last < start + width
    ratio = 1 << shift
    covers = ((block.first - start - offset) & (tl.minimum(ratio, block.step) - 1)) == 0
    return width, shift, offset, start, one & covers & (ratio <= block.step), one & (covers == 0)


@triton.jit
def meets_others(plan, head, block, z: tl.constexpr):
    """Whether a branch has keys for a block that other ranks may hold."""
    meets = block.first < 0
    for branch in range(z.NB):
        width, _, _, start, _, none = look_up(plan, branch, head, block, z)
        after = tl.minimum(block.last // width * width + width, block.length)
        meets = meets | ((none == 0) & ((start < block.here) | (after > block.stop)))
    return meets


@triton.jit
def look_up_earlier(plan, branch, head, block, z: tl.constexpr):
    """The nearest earlier branch that has keys for a block, as `look_up` after its number; -1 for none."""
    before = branch - 1
    width, shift, offset, start, whole, none = look_up(plan, tl.maximum(before, 0), head, block, z)
    while none & (before > 0):
        before -= 1
        width, shift, offset, start, whole, none = look_up(plan, before, head, block, z)
    return before, width, shift, offset, start, whole & (before >= 0)


@triton.jit
def hole_of(merges, real, key, shift, start, end):
    """(first, end) of a segment's slots that lie within start..end; `real` for both where a branch does not merge."""
    round_up = (1 << shift) - 1
    low = tl.minimum(tl.maximum((start - key + round_up) >> shift, 0), real)
    high = tl.minimum(tl.maximum((end - key + round_up) >> shift, low), real)
    return tl.where(merges, low, real), tl.where(merges, high, real)


@triton.jit
def log_of_times(position, first, merged, R: tl.constexpr):
    """Log2 of how many branches have the key at a position: this one, and of the merged ones those whose ratio divides its
    distance from the rows. Four bits of `merged` for each power of two say how many have that ratio or a smaller one."""
    distance = (position - first) | R
    lowest = (distance & -distance).to(tl.float32)
    exponent = (lowest.to(tl.int32, bitcast=True) >> 23) - 127
    return tl.log2((1 + ((merged >> (4 * exponent)) & 15)).to(tl.float32))


@triton.jit
def segment_of(block, start, width, shift, offset, z: tl.constexpr):
    """(number of real slots, which rows the segment's branch covers, whether it covers all of them)."""
    ratio = 1 << shift
    real = (tl.minimum(width, block.length - start) - offset + ratio - 1) >> shift
    inside = (block.rows >= start) & (block.rows < start + width)
    whole = (block.first >= start) & (block.last < start + width) & (ratio <= block.step)
    if z.S < z.R:
        inside = inside & ((ratio <= block.step) | (((block.rows - start - offset) & (ratio - 1)) == 0))
    return real, inside, whole


@triton.jit
def lanes_of(key, shift, classes, S: tl.constexpr, BN: tl.constexpr, SHARDED: tl.constexpr):
    """(slot, row in the arrangement, position) of each of BN keys of a segment, of which the first is at position `key`.

    They are taken class by class, so that neighbours lie together. The next BN are BN * ratio / S rows further.
    """
    lane = tl.arange(0, BN)
    groups = tl.maximum(S >> shift, 1)
    group = lane * groups // BN
    within = lane - group * (BN // groups)
    position = key + (group << shift)
    row = class_row(classes, position % S, SHARDED) + position // S + within * tl.maximum((1 << shift) // S, 1)
    return group + within * groups, row, key + ((group + within * groups) << shift)


@triton.jit
def hold(x, mask, BN: tl.constexpr):
    """A left factor of products in registers rather than in shared memory, and zeros (rows, 1) without which it is not.

    Triton keeps what was loaded in shared memory; and what was computed it copies to registers in every step of a loop, to
    spare them, unless a product outside the loop takes it too.
    """
    if x.dtype.primitive_bitwidth == 16 and x.shape[1] <= 64:
        x = tl.where(mask[:, None], x, 0.0)
        none = tl.zeros((x.shape[1], BN), x.dtype)
        return x, tl.sum(tl.dot(x, none), 1)[:, None]
    return x, tl.full((x.shape[0], 1), 0.0, tl.float32)


@triton.jit
def walk(take: tl.constexpr, state, held, block, plan, head, z: tl.constexpr, ROWS: tl.constexpr, ZEROS: tl.constexpr):
    """Take a block through the keys of all branches, the last one first.

    Args:
        take: `take(state, held, keys, block, low, high, MASK, z)` gives the state after the slots low .. high of `Keys`;
            with MASK some of them may not exist, or be hidden from some rows.
        state: A tuple of what the kernel accumulates.
        held: A tuple of what its `take` needs besides.
        block: This program's rows.
        plan: See `schedule.plan`.
        head: This program's head.
        z: The sizes.
        ROWS: What the rows are, `queries` that go through keys or `keys` that go through queries. The queries of a segment
            are the positions of its keys, so that the loops are the same; a causal mask looks the other way.
        ZEROS: Whether the zero-key slots are counted.

    Returns:
        The state, and the zero-key slots of each row, `(BM,)`.
    """
    zeros = tl.full((z.BM,), 0, tl.int32)
    branch = z.NB - 1
    width, shift, offset, start, whole, _ = look_up(plan, branch, head, block, z)
    merged = 0
    while branch >= 0:
        before, before_width, before_shift, before_offset, before_start, before_whole = look_up_earlier(
            plan, branch, head, block, z
        )  # fmt: skip
        hole, hole_end = before_start, tl.minimum(before_start + before_width, block.length)
        merges = (
            z.MERGE & whole & before_whole & (before_shift <= shift) & (hole >= start) & (hole_end <= start + width)
        )
        ratio = 1 << shift
        while start <= block.last:
            if ((block.first - start - offset) & (tl.minimum(ratio, block.step) - 1)) == 0:  # it covers rows here
                real, inside, all_rows = segment_of(block, start, width, shift, offset, z)
                key = start + offset
                unmasked = tl.where(all_rows, real, 0)
                if z.CAUSAL and ROWS == "queries":
                    real = tl.minimum(real, ((block.last - key) >> shift) + 1)
                    unmasked = tl.minimum(unmasked, ((block.first - key) >> shift) + 1)
                if ZEROS:
                    zeros += tl.where(inside, ((width + ratio - 1) >> shift) - real, 0)
                low, high = hole_of(merges, real, key, shift, hole, hole_end)
                for piece in range(2):
                    skip = piece * high
                    count = tl.where(piece == 0, low, real - high)
                    if count > 0:
                        slot, lane, position = lanes_of(
                            key + (skip << shift), shift, block.classes, z.S, z.BN, z.SHARDED
                        )  # fmt: skip
                        log_times = log_of_times(position, block.first, merged, z.R)
                        keys = Keys(
                            slot, lane, z.BN * ratio // z.S, log_times, key + (skip << shift), ratio, count, inside
                        )  # fmt: skip
                        begin = 0
                        if ROWS == "queries":
                            full = tl.maximum(tl.minimum(count, unmasked - skip), 0) // z.BN * z.BN
                            rest = full
                        else:
                            full = tl.where(all_rows, count // z.BN * z.BN, 0)
                            if z.CAUSAL:  # masked up to the last row, then whole
                                begin = tl.maximum((tl.maximum(block.first - key, 0) >> shift) - skip, 0) // z.BN * z.BN
                                seam = tl.maximum(((block.last - key) >> shift) + z.BN - skip, 0) // z.BN * z.BN
                                seam = tl.minimum(seam, full)
                                state = take(state, held, keys, block, begin, seam, True, z)
                                begin = tl.maximum(begin, seam)
                            rest = tl.maximum(begin, full)
                        state = take(state, held, keys, block, begin, full, False, z)
                        if rest < count:
                            state = take(state, held, keys, block, rest, count, True, z)
            start += width
        merged = tl.where(merges, merged + (0x1111111 << (4 * shift)), 0)
        branch, width, shift, offset = before, before_width, before_shift, before_offset
        start, whole = before_start, before_whole
    return state, zeros

"""What the picture of an attention pattern shows: each pair of a short sequence, shares of pairs of one of any length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

MOST_POINTS = 256
"""Tokens that are drawn one by one. More would be smaller than the picture's pixels, and regular patterns moire: a point is
then a block of queries and keys."""

WINDOW = 64
"""Tokens of the stretch in which heads are drawn where a point is a block, in which all heads look alike."""

SAMPLE = 256
"""Queries of a long sequence whose keys are counted, for the share that all heads see together."""

QUERIES_AT_A_TIME = 65_536
"""Of random keys, which take memory."""

DIM = 16
"""Width of the random tokens for which the pattern `learned` chooses."""


@dataclass(frozen=True)
class Seen:
    """Which keys queries see.

    Attributes:
        tokens: Tokens of the sequence.
        block: Tokens of a point; 1 for a short sequence.
        heads: `(branches, heads, P, P)` float32 share of a point's pairs, of queries (third) and keys (last), that a branch
            shows; or each pair of a stretch of `WINDOW` tokens.
        stretch: The first token of that stretch; None where `heads` shows the whole sequence.
        together: `(branches, P, P)` float32, the same for what some head is shown.
        kept: `(branches, L)` bool, the tokens that take part, for head 0.
        query: The query to explain by.
        keys: `(branches, L)` bool, the keys that it sees, in head 0.
        pairs: `(branches,)` pairs that are seen, over all heads.
        share: Pairs that some head sees, as a share of dense attention's; of a long sequence counted for `SAMPLE` queries.
    """

    tokens: int
    block: int
    heads: np.ndarray
    stretch: int | None
    together: np.ndarray
    kept: np.ndarray
    query: int
    keys: np.ndarray
    pairs: np.ndarray
    share: float


class Rule(Protocol):
    """A pattern by its rule, for sequences too long for a matrix of pairs."""

    tokens: int
    heads: int
    branches: int

    def counts(self, branch: int, head: int | None, block: int) -> np.ndarray:
        """`(P, P)` pairs of blocks of queries and keys that a head sees, or some head."""
        ...

    def row(self, branch: int, head: int | None, query: int) -> np.ndarray:
        """`(L,)` bool, the keys that a query sees in a head, or in some head."""
        ...


def see_every_pair(seen: np.ndarray, causal: bool) -> Seen:
    """Of a short sequence, from the matrix of its pairs.

    Args:
        seen: `(branches, heads, L, L)` bool, as `visible_keys` gives them.
        causal: Whether later keys are hidden.
    """
    tokens = seen.shape[2]
    kept = seen[:, 0].diagonal(axis1=1, axis2=2)  # a token that takes part sees itself
    query = _telling_query(kept, seen[:, 0].any(0).sum(1)[tokens // 2 :])
    return Seen(
        tokens=tokens,
        block=1,
        heads=seen.astype(np.float32),
        stretch=None,
        together=np.asarray(seen.any(1), np.float32),
        kept=kept,
        query=query,
        keys=seen[:, 0, query],
        pairs=seen.sum((1, 2, 3)),
        share=float(seen.any((0, 1)).sum()) / dense_pairs(tokens, causal),
    )


def see_blocks(rule: Rule, causal: bool, period: int = 1) -> Seen:
    """Of a sequence of any length, by its rule.

    Args:
        rule: The pattern.
        causal: Whether later keys are hidden.
        period: Tokens after which the pattern repeats itself within a segment: blocks hold whole ones, where there are
            enough of them, so that all look alike.
    """
    tokens = rule.tokens
    block = math.ceil(tokens / MOST_POINTS)
    if tokens >= 64 * period:
        block = period * math.ceil(block / period)
    sizes = np.full(math.ceil(tokens / block), block)
    sizes[-1] = tokens - block * (len(sizes) - 1)
    area = np.outer(sizes, sizes)
    branches = range(rule.branches)
    counts = np.stack(
        [np.stack([rule.counts(branch, head, block) for head in range(rule.heads)]) for branch in branches]
    )
    pairs = counts.sum((1, 2, 3))
    together = np.stack([rule.counts(branch, None, block) for branch in branches])
    kept = np.stack([_kept(rule, branch) for branch in branches])
    query = _telling_query(kept)
    heads, stretch = (counts / area).astype(np.float32), None
    if isinstance(rule, Classes):
        stretch = max(0, min(query // WINDOW * WINDOW, tokens - WINDOW))
        heads = rule.stretch(stretch, min(WINDOW, tokens)).astype(np.float32)
    sample = np.unique(np.linspace(0, tokens - 1, SAMPLE).astype(np.int64)).tolist()
    found = sum(np.any([rule.row(branch, None, one) for branch in branches], axis=0).sum() for one in sample)
    among = sum(one + 1 if causal else tokens for one in sample)
    return Seen(
        tokens=tokens,
        block=block,
        heads=heads,
        stretch=stretch,
        together=(together / area).astype(np.float32),
        kept=kept,
        query=query,
        keys=np.stack([rule.row(branch, 0, query) for branch in branches]),
        pairs=pairs,
        share=float(found / among),
    )


def dense_pairs(tokens: int, causal: bool) -> int:
    """Pairs that dense attention sees."""
    return tokens * (tokens + 1) // 2 if causal else tokens * tokens


def _kept(rule: Rule, branch: int) -> np.ndarray:
    return rule.classes(branch, 0) >= 0 if isinstance(rule, Classes) else np.ones(rule.tokens, bool)


def _telling_query(kept: np.ndarray, sees: np.ndarray | None = None) -> int:
    """The query to explain by: in the later half, where a causal one sees something too, one that most branches cover."""
    tokens = kept.shape[1]
    covered = kept.sum(0)[tokens // 2 :] * tokens
    if sees is not None:
        covered = covered + sees  # of these, one that sees the most keys
    best = np.flatnonzero(covered == covered.max())
    return int(tokens // 2 + best[len(best) // 3])


class Classes:
    """Attention among tokens of one class: dilated attention, dense and strided.

    Args:
        tokens: Tokens of the sequence.
        heads: Attention heads.
        branches: Segment length and ratio of each branch of dilated attention; empty for one class every `period` tokens.
        causal: Whether later keys are hidden.
        period: Of strided attention; 1 for dense.
    """

    def __init__(
        self, tokens: int, heads: int, branches: Sequence[tuple[int, int]], causal: bool, period: int = 1
    ) -> None:
        self.tokens, self.heads, self.branches = tokens, heads, len(branches) or 1
        self._segments, self._causal, self._period = branches, causal, period
        self._place = np.arange(tokens)
        self._known: dict[tuple[int, int, int], np.ndarray] = {}

    def classes(self, branch: int, offset: int) -> np.ndarray:
        """`(L,)` int64 class of each token; -1 for those that take no part."""
        if not self._segments:
            return self._place % self._period
        length, ratio = self._segments[branch]
        return np.where(self._place % length % ratio == offset, self._place // length, -1)

    def counts(self, branch: int, head: int | None, block: int) -> np.ndarray:
        """See `Rule`."""
        if head is None:  # heads of other offsets keep other tokens
            each = [self._of_offset(branch, offset, block) for offset in set(self._offsets(branch))]
            return np.asarray(np.sum(each, axis=0))
        return self._of_offset(branch, self._offsets(branch)[head], block)

    def row(self, branch: int, head: int | None, query: int) -> np.ndarray:
        """See `Rule`."""
        offsets = self._offsets(branch) if head is None else [self._offsets(branch)[head]]
        seen = np.zeros(self.tokens, bool)
        for offset in set(offsets):
            if self._segments and query % self._segments[branch][0] % self._segments[branch][1] != offset:
                continue
            of = self.classes(branch, offset)
            seen |= of == of[query]
        if self._causal:
            seen[query + 1 :] = False
        return seen

    def stretch(self, first: int, tokens: int) -> np.ndarray:
        """`(branches, heads, tokens, tokens)` bool, the pairs within a stretch of the sequence."""
        within = slice(first, first + tokens)
        seen = np.zeros((self.branches, self.heads, tokens, tokens), bool)
        for branch in range(self.branches):
            of = {offset: self.classes(branch, offset)[within] for offset in set(self._offsets(branch))}
            for head, offset in enumerate(self._offsets(branch)):
                seen[branch, head] = (of[offset][:, None] == of[offset]) & (of[offset] >= 0)
        return np.tril(seen) if self._causal else seen

    def _offsets(self, branch: int) -> list[int]:
        ratio = self._segments[branch][1] if self._segments else 1
        return [head // math.ceil(self.heads / ratio) for head in range(self.heads)]

    def _of_offset(self, branch: int, offset: int, block: int) -> np.ndarray:
        from scipy import sparse

        key = (branch, offset, block)
        if key not in self._known:
            of = self.classes(branch, offset)
            kept = np.flatnonzero(of >= 0)
            shape = (math.ceil(self.tokens / block), int(of.max(initial=0)) + 1)
            held = sparse.csr_array((np.ones(len(kept)), (kept // block, of[kept])), shape=shape)
            held.sum_duplicates()  # tokens of each class in each block
            counts = (held @ held.T).toarray()
            if self._causal:
                within = (held.power(2).sum(1) + held.sum(1)) / 2
                counts = np.tril(counts, -1) + np.diag(np.asarray(within).ravel())
            self._known[key] = counts
        return self._known[key]


class Near:
    """Attention to neighbours, to the first tokens, and to random keys.

    Args:
        tokens: Tokens of the sequence.
        heads: Attention heads.
        window: Neighbours on either side.
        causal: Whether later keys are hidden.
        global_tokens: First tokens that see all and that all see.
        random_keys: Random keys of each query.
        seed: Which ones.
    """

    branches = 1

    def __init__(
        self,
        tokens: int,
        heads: int,
        window: int,
        causal: bool,
        global_tokens: int = 0,
        random_keys: int = 0,
        seed: int = 0,
    ) -> None:
        self.tokens, self.heads = tokens, heads
        self._causal, self._random_keys, self._seed = causal, random_keys, seed
        query = np.arange(tokens)
        self._first, self._last = np.maximum(query - window, 0), np.minimum(query + window, tokens - 1)
        self._first[:global_tokens], self._last[:global_tokens] = 0, tokens - 1
        if causal:
            self._last = query
        self._global = np.minimum(self._first, global_tokens)  # of the first tokens those before the neighbours

    def counts(self, branch: int, head: int | None, block: int) -> np.ndarray:
        """See `Rule`."""
        near: np.ndarray = self._intervals(self._first, self._last, block)
        near += self._intervals(np.zeros_like(self._first), self._global - 1, block)
        for start in range(0, self.tokens, QUERIES_AT_A_TIME):
            query, key = self._random(head, np.arange(start, min(start + QUERIES_AT_A_TIME, self.tokens)))
            np.add.at(near, (query // block, key // block), 1)
        return near

    def row(self, branch: int, head: int | None, query: int) -> np.ndarray:
        """See `Rule`."""
        seen = np.zeros(self.tokens, bool)
        seen[self._first[query] : self._last[query] + 1] = True
        seen[: self._global[query]] = True
        seen[self._random(head, np.array([query]))[1]] = True
        return seen

    def _random(self, head: int | None, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Query and key of each random pair that is no other pair too; of several heads each pair once."""
        if not self._random_keys:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        import torch

        from ...models.slide_encoder.random_attention import random_key_positions

        position, is_one = random_key_positions(
            torch.from_numpy(queries), self.heads, self.tokens, self._random_keys, self._seed, self._causal
        )
        chosen = slice(None) if head is None else slice(head, head + 1)
        key, valid = position[chosen].numpy(), is_one[chosen].numpy()
        query = np.broadcast_to(queries[None, :, None], key.shape)
        new = valid & ((key < self._first[query]) | (key > self._last[query])) & (key >= self._global[query])
        pairs = np.unique(query[new] * self.tokens + key[new])
        return pairs // self.tokens, pairs % self.tokens

    def _intervals(self, first: np.ndarray, last: np.ndarray, block: int) -> np.ndarray:
        """`(P, P)` pairs of queries with the keys from `first` to `last` of each."""
        starts = np.arange(0, self.tokens, block)
        ends = np.minimum(starts + block, self.tokens)
        rows = []
        for start, end in zip(starts, ends, strict=True):
            of = slice(start, end)
            overlap = np.minimum(last[of, None] + 1, ends) - np.maximum(first[of, None], starts)
            rows.append(overlap.clip(0).sum(0))
        return np.stack(rows)


class Chosen:
    """Attention to a token's own block and to chosen ones: the pattern `learned`, for random tokens.

    Args:
        tokens: Tokens of the sequence.
        heads: Attention heads.
        block_size: Tokens of a block.
        chosen_blocks: Blocks that each one chooses.
        causal: Whether later keys are hidden.
    """

    branches = 1

    def __init__(self, tokens: int, heads: int, block_size: int, chosen_blocks: int, causal: bool) -> None:
        import torch

        from ...models.slide_encoder.learned_attention import choose_blocks

        self.tokens, self.heads = tokens, heads
        self._size, self._causal = block_size, causal
        self._own = Classes(tokens, 1, [(block_size, 1)], causal)
        number = math.ceil(tokens / block_size)
        self._chosen = np.zeros((heads, number, number), bool)
        source = torch.Generator().manual_seed(0)
        for head in range(heads):
            queries, keys = torch.randn(2, 1, tokens, 1, DIM, generator=source)
            chosen, is_one = choose_blocks(queries, keys, block_size, chosen_blocks, causal)
            by = np.broadcast_to(np.arange(number)[:, None], chosen.shape[2:])
            valid = is_one[0, 0].numpy()
            self._chosen[head, by[valid], chosen[0, 0].numpy()[valid]] = True

    def counts(self, branch: int, head: int | None, block: int) -> np.ndarray:
        """See `Rule`."""
        place = np.arange(self.tokens)
        held = np.zeros((math.ceil(self.tokens / block), self._chosen.shape[1]))
        np.add.at(held, (place // block, place // self._size), 1)
        chosen = self._chosen.any(0) if head is None else self._chosen[head]
        return np.asarray(self._own.counts(0, 0, block) + held @ chosen @ held.T)

    def row(self, branch: int, head: int | None, query: int) -> np.ndarray:
        """See `Rule`."""
        chosen = np.asarray(self._chosen.any(0)) if head is None else self._chosen[head]
        others = chosen[query // self._size].repeat(self._size)[: self.tokens]
        return np.asarray(self._own.row(0, 0, query) | others)

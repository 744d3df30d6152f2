"""What is drawn of a long sequence by the rule of its pattern is what the attention function does, pair by pair."""

from pathlib import Path

import numpy as np
import pytest
from longslide.pipeline.attention_map.attention_map import attention_map, scored_pairs, visible_keys
from longslide.pipeline.attention_map.seen import (
    MOST_POINTS,
    Chosen,
    Classes,
    Near,
    Rule,
    dense_pairs,
    see_blocks,
    see_every_pair,
)
from PIL import Image

BRANCHES = ((10, 1), (24, 3), (1000, 6))
TOKENS, HEADS = 131, 5


def rules(causal: bool) -> list[tuple[str, dict, Rule]]:
    random = {"random_keys": 7, "window": 2, "global_tokens": 3, "pattern_seed": 4}
    return [
        ("dilated", {"branches": BRANCHES}, Classes(TOKENS, HEADS, BRANCHES, causal)),
        ("dense", {}, Classes(TOKENS, HEADS, (), causal)),
        ("strided", {"period": 6}, Classes(TOKENS, HEADS, (), causal, 6)),
        ("sliding-window", {"window": 9}, Near(TOKENS, HEADS, 9, causal)),
        ("random", random, Near(TOKENS, HEADS, 2, causal, 3, 7, 4)),
    ]


def by_blocks(seen: np.ndarray, block: int) -> np.ndarray:
    starts = np.arange(0, seen.shape[-1], block)
    return np.add.reduceat(np.add.reduceat(seen.astype(int), starts, -1), starts, -2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_the_pairs_of_a_block_are_those_of_the_attention_function(block: int, causal: bool) -> None:
    for pattern, settings, rule in rules(causal):
        seen = visible_keys(TOKENS, HEADS, pattern, causal, **settings)
        for branch in range(len(seen)):
            for head in range(HEADS):
                counts = rule.counts(branch, head, block)
                assert (counts == by_blocks(seen[branch, head], block)).all(), (pattern, branch, head)
                for query in (0, 2, 77, TOKENS - 1):
                    if seen[branch, head, query].any():
                        assert (rule.row(branch, head, query) == seen[branch, head, query]).all(), (pattern, query)
            together = seen[branch].any(0)
            assert (rule.counts(branch, None, block) == by_blocks(together, block)).all(), pattern
            assert (rule.row(branch, None, 77) == together[77]).all(), pattern


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_that_are_chosen_are_as_many_as_are_scored_and_never_later(causal: bool) -> None:
    tokens, heads, size, chosen = 130, 3, 10, 2
    rule = Chosen(tokens, heads, size, chosen, causal)
    blocks = tokens // size
    means = blocks * (blocks - 1) // 2 if causal else blocks**2  # scored to choose by, and not seen
    pairs_of = scored_pairs(tokens, heads, "learned", causal, block_size=size, chosen_blocks=chosen)[0] / heads - means
    for head in range(heads):
        pairs = np.stack([rule.row(0, head, query) for query in range(tokens)])
        assert pairs.sum() == pairs_of
        assert (by_blocks(pairs, 7) == rule.counts(0, head, 7)).all()
        if causal:
            assert not np.triu(pairs, 1).any()


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_drawn_of_a_long_sequence_adds_up(causal: bool) -> None:
    """At 1,000 tokens both ways are possible: the counted one and the one by pairs."""
    tokens, heads = 1000, 4
    branches = ((100, 1), (300, 2), (1000, 4))
    exact = see_every_pair(visible_keys(tokens, heads, "dilated", causal, branches=branches), causal)
    seen = see_blocks(Classes(tokens, heads, branches, causal), causal, 4)
    assert (seen.block, exact.block) == (4, 1)
    first = seen.stretch
    assert (first, seen.heads.shape) == (seen.query // 64 * 64, (3, 4, 64, 64))
    assert (seen.heads == exact.heads[:, :, first : first + 64, first : first + 64]).all(), "every pair of a stretch"
    assert len({seen.heads[:, head].tobytes() for head in range(heads)}) == heads, "heads that differ do not look alike"
    assert seen.pairs.tolist() == exact.pairs.tolist()
    assert seen.pairs.tolist() == scored_pairs(tokens, heads, "dilated", causal, branches=branches)
    assert seen.share == pytest.approx(exact.share, abs=0.02), "counted for some of the queries"
    assert (seen.kept == exact.kept).all()
    inner = seen.together[1, 10:20, 10:20]  # within one segment, above and below the diagonal
    assert np.unique(inner[np.tril_indices(10, -1)]).tolist() == [0.5], "blocks hold whole periods: no moire"
    assert dense_pairs(tokens, causal) == sum(scored_pairs(tokens, 1, "dense", causal))


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 1024},
        {"tokens": 100_000, "heads": 16, "segment_lengths": [1024, 5792, 32768], "dilated_ratios": [1, 2, 4]},
        {"tokens": 20_000, "heads": 2, "pattern": "sliding-window", "window": 900, "causal": True},
        {"tokens": 3000, "heads": 17, "pattern": "random", "random_keys": 20, "window": 50, "global_tokens": 10},
        {"tokens": 3000, "heads": 3, "pattern": "learned", "block_size": 64, "chosen_blocks": 5},
        {"tokens": 5001, "pattern": "strided", "period": 50},
    ],
)
def test_a_sequence_of_any_length_is_drawn(tmp_path: Path, options: dict) -> None:
    drawn = attention_map(tmp_path / "map.png", **options)
    assert 0 < drawn.seen <= 1
    with Image.open(drawn.output) as picture:
        assert picture.width == 1690
    assert options["tokens"] > MOST_POINTS

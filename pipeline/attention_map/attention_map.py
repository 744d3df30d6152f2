"""The attention map: a picture of which keys each query sees, made by asking the attention function itself."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ...data.whole_file import write_whole
from ...errors import LongslideError
from ...ranges import checked

if TYPE_CHECKING:
    from ...models.slide_encoder.attention_pattern import Pattern

MAX_TOKENS = 1024
"""More would be smaller than the picture's pixels."""


@dataclass(frozen=True)
class AttentionMap:
    """A picture that was drawn.

    Attributes:
        output: The PNG file.
        share: Query-key pairs that are scored, as a share of dense attention's.
        seen: Query-key pairs that some head sees, as a share of dense attention's.
        ok: Whether it was drawn, as the command line asks of every result.
    """

    output: Path
    share: float
    seen: float
    ok: bool = True


@checked
def attention_map(
    output: str | Path = Path("attention-map.png"),
    pattern: Literal["dilated", "dense", "sliding-window", "strided"] = "dilated",
    tokens: int = 64,
    heads: int = 4,
    segment_lengths: list[int] = [16, 32, 64],  # noqa: B006  the command line shows it; never changed
    dilated_ratios: list[int] = [1, 2, 4],  # noqa: B006
    window: int = 0,
    period: int = 0,
    causal: bool = False,
) -> AttentionMap:
    """Draw which keys each query sees: for each head, for all heads together, and what it costs beside dense attention.

    Args:
        output: The PNG file to write.
        pattern: Which attention.
        tokens: Tokens of the sequence; a small model of the real thing shows most.
        heads: Attention heads.
        segment_lengths: Tokens of a segment for each branch of dilated attention, such as [16,32,64].
        dilated_ratios: Every how many-th token takes part for each branch, such as [1,2,4].
        window: Tokens seen on either side, for the sliding window.
        period: Distance of the keys from one another, for the strided pattern.
        causal: Whether later keys are hidden.

    Returns:
        What was drawn.

    Raises:
        LongslideError: The configuration does not fit, or the picture cannot be written.
    """
    from .figure import MAX_BRANCHES, draw_attention_map

    output = Path(output)

    branches = tuple(zip(segment_lengths, dilated_ratios, strict=False)) if pattern == "dilated" else ()
    if pattern == "dilated" and (
        len(segment_lengths) != len(dilated_ratios) or min([*segment_lengths, *dilated_ratios], default=0) < 1
    ):
        raise LongslideError(
            f"--segment-lengths {segment_lengths} and --dilated-ratios {dilated_ratios} must be positive, one of each a "
            "branch, such as [16,32,64] and [1,2,4]"
        )
    if len(branches) > MAX_BRANCHES:
        raise LongslideError(f"{len(branches)} branches are more than the {MAX_BRANCHES} that can be distinguished")
    if not 1 <= tokens <= MAX_TOKENS or heads < 1:
        raise LongslideError(
            f"--tokens {tokens} and --heads {heads}: a picture takes 1 to {MAX_TOKENS:,} tokens and a head or more; draw "
            "longer sequences with tokens and segments divided by one number"
        )
    seen = visible_keys(tokens, heads, pattern, causal, branches=branches, window=window, period=period)

    def pairs(length: int) -> int:
        return sum(scored_pairs(length, heads, pattern, causal, branches=branches, window=window, period=period))

    dense = sum(scored_pairs(tokens, 1, "dense", causal))
    result = AttentionMap(output, pairs(tokens) / (heads * dense), float(seen.any((0, 1)).sum()) / dense)

    names = {"dilated": "Dilated attention (LongNet)", "sliding-window": "Sliding-window attention"}
    title = names.get(pattern, f"{pattern.capitalize()} attention")
    labels = {
        "dilated": [f"segments of {length}, {_every(ratio)}" for length, ratio in branches],
        "dense": [_every(1)],
        "sliding-window": [f"within {window} tokens"],
        "strided": [_every(period)],
    }[pattern]
    lengths = [length for length, _ in branches]
    figure = draw_attention_map(seen, title, labels, lengths, causal, result.share, result.seen, pairs)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_whole(output, picture.getbuffer())
    print(
        f"{output}: each head scores {result.share:.1%} of dense attention's query-key pairs; all heads together see "
        f"{result.seen:.1%} of them"
    )
    return result


def visible_keys(
    tokens: int,
    heads: int,
    pattern: "Pattern",
    is_causal: bool,
    *,
    branches: Sequence[tuple[int, int]] = (),
    window: int = 0,
    period: int = 0,
) -> np.ndarray:
    """Ask the attention function which keys each query sees.

    With equal logits, and for values the unit vectors, the output of a query is its weights: not zero for the keys it sees.

    Args:
        tokens: Tokens of the sequence.
        heads: Attention heads.
        pattern: The pattern.
        is_causal: Whether later keys are hidden.
        branches: Segment length and ratio of each branch of dilated attention.
        window: See `attention`.
        period: See `attention`.

    Returns:
        `(branches, heads, tokens, tokens)` bool, of query and key; one branch for the patterns without branches.
    """
    import torch

    from ...models.slide_encoder.attention_pattern import attention

    nothing = torch.zeros(1, tokens, heads, tokens)
    units = torch.eye(tokens)[None, :, None].expand(1, tokens, heads, tokens)
    outputs = []
    for segment_length, ratio in branches or [(1, 1)]:
        weights = attention(
            nothing,
            nothing,
            units,
            pattern,
            is_causal,
            segment_lengths=[segment_length],
            dilated_ratios=[ratio],
            window=window,
            period=period,
        )
        outputs.append((weights[0] > 0).transpose(0, 1).numpy())
    return np.stack(outputs)


def scored_pairs(
    tokens: int,
    heads: int,
    pattern: "Pattern",
    is_causal: bool,
    *,
    branches: Sequence[tuple[int, int]] = (),
    window: int = 0,
    period: int = 0,
) -> list[int]:
    """Query-key pairs whose logit is computed, by arithmetic: the work of attention, for sequences too long to draw.

    A pair that several branches score counts for each. Zero keys cost nothing.

    Args:
        tokens: Tokens of the sequence.
        heads: Attention heads.
        pattern: The pattern.
        is_causal: Whether later keys are hidden.
        branches: Segment length and ratio of each branch of dilated attention.
        window: See `attention`.
        period: See `attention`.

    Returns:
        The pairs of each branch; one number for the patterns without branches.
    """

    def within(slots: int) -> int:
        return slots * (slots + 1) // 2 if is_causal else slots * slots

    if pattern == "dilated":
        counts = []
        for segment_length, ratio in branches:
            width = min(segment_length, tokens)
            offsets = [head // math.ceil(heads / ratio) for head in range(heads)]
            whole, tail = divmod(tokens, width)
            counts.append(
                sum(
                    segments * within(max(0, math.ceil((extent - offset) / ratio)))
                    for offset in offsets
                    for segments, extent in ((whole, width), (1, tail))
                )
            )
        return counts
    if pattern == "sliding-window":
        reach = min(window, tokens - 1)
        one_side = tokens * reach - reach * (reach + 1) // 2
        return [heads * (tokens + one_side * (1 if is_causal else 2))]
    if pattern == "strided":
        rounds, longer = divmod(tokens, period)
        return [heads * (longer * within(rounds + 1) + (period - longer) * within(rounds))]
    return [heads * within(tokens)]


def _every(count: int) -> str:
    if count == 1:
        return "every token"
    ending = {1: "st", 2: "nd", 3: "rd"}.get(count % 10, "th") if count % 100 not in (11, 12, 13) else "th"
    return f"every {count}{ending} token"

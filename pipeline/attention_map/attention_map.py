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
    from matplotlib.figure import Figure

    from ...data.features.feature_file import Features
    from ...models.slide_encoder.attention_pattern import Pattern

FORMATS = (".png", ".svg", ".pdf")

MAX_TOKENS = 1024
"""More would be smaller than the picture's pixels."""


@dataclass(frozen=True)
class AttentionMap:
    """A picture that was drawn.

    Attributes:
        output: The picture.
        share: Query-key pairs that are scored, as a share of dense attention's.
        seen: Query-key pairs that some head sees, as such a share; of a slide the share of tiles that the tile sees.
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
    tokens: int | None = None,
    heads: int | None = None,
    segment_lengths: list[int] | None = None,
    dilated_ratios: list[int] | None = None,
    window: int = 0,
    period: int = 0,
    causal: bool = False,
    slide: str | Path | None = None,
    tile: str | None = None,
    slide_encoder: str | Path = "gigapath",
) -> AttentionMap:
    """Draw which keys each query sees, or with `--slide` which tiles of a slide one tile sees.

    The first shows each head, all heads together, and what it costs beside dense attention. The second shows the tiles of
    each branch, of each head and of all heads at their places on the slide, and those that reach the tile within all layers.

    Args:
        output: The picture to write: .png, .svg or .pdf.
        pattern: Which attention.
        tokens: Tokens of the sequence; 64, for a small model of the real thing shows most.
        heads: Attention heads; 4, or with --slide those of the slide encoder.
        segment_lengths: Tokens of a segment for each branch of dilated attention; [16,32,64], or the slide encoder's.
        dilated_ratios: Every how many-th token takes part for each branch; [1,2,4], or the slide encoder's.
        window: Tokens seen on either side, for the sliding window.
        period: Distance of the keys from one another, for the strided pattern.
        causal: Whether later keys are hidden.
        slide: A feature file, whose tiles are drawn at their places.
        tile: x,y in level-0 pixels, within the tile that looks; without it, one in the middle of the sequence.
        slide_encoder: With --slide: the slide encoder by name, or the path of a YAML file.

    Returns:
        What was drawn.

    Raises:
        LongslideError: The configuration does not fit, no tile is there, or the picture cannot be written.
    """
    output = Path(output)
    if output.suffix.lower() not in FORMATS:
        raise LongslideError(f"{output}: a picture is written as {', '.join(FORMATS)}; give the file such a suffix")
    if slide is not None:
        if pattern != "dilated" or causal:
            raise LongslideError(
                "--slide draws dilated attention that sees both ways; leave --pattern and --causal out"
            )
        if tokens is not None or window or period:
            raise LongslideError("--slide has tokens of its own; leave --tokens, --window and --period out")
        return _of_slide(output, Path(slide), tile, slide_encoder, heads, segment_lengths, dilated_ratios)
    if tile is not None:
        raise LongslideError("--tile is a tile of a slide: give its feature file as --slide")
    from .figure import MAX_BRANCHES, draw_attention_map

    tokens, heads = 64 if tokens is None else tokens, 4 if heads is None else heads
    segment_lengths, dilated_ratios = segment_lengths or [16, 32, 64], dilated_ratios or [1, 2, 4]
    branches = _branches(segment_lengths, dilated_ratios) if pattern == "dilated" else ()
    if len(branches) > MAX_BRANCHES:
        raise LongslideError(f"{len(branches)} branches are more than the {MAX_BRANCHES} that can be distinguished")
    if not 1 <= tokens <= MAX_TOKENS or heads < 1:
        raise LongslideError(
            f"--tokens {tokens} and --heads {heads}: a picture takes 1 to {MAX_TOKENS:,} tokens and a head or more; draw "
            "longer sequences with tokens and segments divided by one number, or a whole slide with --slide"
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
    _save(draw_attention_map(seen, title, labels, lengths, causal, result.share, result.seen, pairs), output)
    print(
        f"{output}: each head scores {result.share:.1%} of dense attention's query-key pairs; all heads together see "
        f"{result.seen:.1%} of them"
    )
    return result


def _branches(segment_lengths: Sequence[int], dilated_ratios: Sequence[int]) -> tuple[tuple[int, int], ...]:
    if len(segment_lengths) != len(dilated_ratios) or min([*segment_lengths, *dilated_ratios], default=0) < 1:
        raise LongslideError(
            f"--segment-lengths {segment_lengths} and --dilated-ratios {dilated_ratios} must be positive, one of each a "
            "branch, such as [16,32,64] and [1,2,4]"
        )
    return tuple(zip(segment_lengths, dilated_ratios, strict=True))


def _of_slide(
    output: Path,
    path: Path,
    place: str | None,
    slide_encoder: str | Path,
    heads: int | None,
    segment_lengths: list[int] | None,
    dilated_ratios: list[int] | None,
) -> AttentionMap:
    """Draw what one tile of a feature file sees."""
    from ...data.features.feature_file import read_features
    from ...models.slide_encoder.spec import load_slide_encoder_spec
    from .figure import MAX_BRANCHES
    from .slide_map import CLS_TOKENS, draw_slide_map, keys_seen

    features, spec = read_features(path, embeddings=False), load_slide_encoder_spec(slide_encoder)
    if not len(features.coords):
        raise LongslideError(f"{path}: has no tiles to draw; give the feature file of another slide")
    heads = heads or spec.heads
    branches = _branches(segment_lengths or list(spec.segment_lengths), dilated_ratios or list(spec.dilated_ratios))
    if len(branches) > MAX_BRANCHES:
        raise LongslideError(f"{len(branches)} branches are more than the {MAX_BRANCHES} that can be distinguished")
    number = len(features.coords) // 2 if place is None else _tile_at(path, features, place)
    x, y = features.coords[number].tolist()
    title = f"{features.slide_id}: which tiles the tile at {x:,}, {y:,} sees ({spec.name}, {heads} heads)"
    _save(draw_slide_map(features.cells, number, heads, branches, spec.layers, title), output)
    tokens = len(features.coords) + CLS_TOKENS
    seen = keys_seen(np.arange(tokens) == number + CLS_TOKENS, heads, branches)[:, :, CLS_TOKENS:]
    pairs = sum(scored_pairs(tokens, heads, "dilated", False, branches=branches))
    result = AttentionMap(output, pairs / (heads * tokens**2), float(seen.any((0, 1)).mean()))
    print(
        f"{output}: the tile at {x:,}, {y:,} sees {result.seen:.1%} of the {len(features.coords):,} tiles in one layer; "
        f"each head scores {result.share:.1%} of dense attention's query-key pairs"
    )
    return result


def _tile_at(path: Path, features: "Features", tile: str) -> int:
    """The number of the tile that a level-0 pixel lies in; of several that overlap, the one whose middle is nearest."""
    size = features.tile_size_level0 or features.step_level0
    try:
        x, y = map(int, tile.strip("[]").split(","))
    except ValueError as error:
        raise LongslideError(f"--tile {tile}: give x and y in level-0 pixels, such as 20480,10240") from error
    place = np.array([x, y])
    inside = ((features.coords <= place) & (features.coords + size > place)).all(1)
    distance = np.abs(features.coords + size / 2 - place).sum(1)
    nearest = int(distance.argmin())
    if not inside.any():
        x, y = features.coords[nearest].tolist()
        raise LongslideError(
            f"{path}: no tile holds the pixel {place[0]:,}, {place[1]:,}; the nearest begins at {x}, {y}"
        )
    return int(np.flatnonzero(inside)[distance[inside].argmin()])


def _save(figure: "Figure", output: Path) -> None:
    """Write a figure by its suffix; text stays text."""
    import matplotlib

    picture = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "pdf.fonttype": 42}):
        figure.savefig(picture, format=output.suffix[1:].lower())
    write_whole(output, picture.getbuffer())


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

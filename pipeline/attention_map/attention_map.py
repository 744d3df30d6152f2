"""The attention map: a picture of which keys each query sees, made by asking the attention function itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...data.whole_file import write_whole
from ...errors import LongslideError
from ...plurals import count
from ...ranges import checked
from ..report.figure_files import drawn

if TYPE_CHECKING:
    from ...data.features.features import Features
    from ...models.slide_encoder.attention_pattern import Pattern
    from .seen import Rule

FORMATS: dict[str, Literal["png", "svg", "pdf"]] = {".png": "png", ".svg": "svg", ".pdf": "pdf"}

MOST_TOKENS = 2**20
"""More would take minutes and gigabytes to count."""

MORE_THAN_ALL = {
    "dilated": "; a pair that several branches see is scored by each",
    "random": "; a random key that is near or global too is scored twice",
    "learned": "; the pairs of blocks, by which it chooses, count too",
}
"""Why a head may score more pairs than there are."""


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
    pattern: Literal["dilated", "dense", "sliding-window", "strided", "random", "learned"] = "dilated",
    tokens: int | None = None,
    heads: int | None = None,
    segment_lengths: list[int] | None = None,
    dilated_ratios: list[int] | None = None,
    window: int = 0,
    period: int = 0,
    random_keys: int = 0,
    global_tokens: int = 0,
    pattern_seed: int = 0,
    block_size: int = 0,
    chosen_blocks: int = 0,
    causal: bool = False,
    slide: str | Path | None = None,
    tile: str | None = None,
    slide_encoder: str | Path = "gigapath",
    checkpoint: str | Path | None = None,
) -> AttentionMap:
    """Draw which keys each query sees, or with `--slide` which tiles of a slide one tile sees.

    The first shows each head, all heads together, and what it costs beside dense attention. The second shows the tiles of
    each branch, of each head and of all heads at their places on the slide, and those that reach the tile within all layers.
    Which blocks of keys the pattern `learned` chooses depends on the tokens: the first draws it for random ones, the second
    for the tiles of the slide by the model that has learned it, of `--checkpoint`.

    Args:
        output: The picture to write: .png, .svg or .pdf.
        pattern: Attention pattern.
        tokens: Tokens of the sequence; 64, which shows the pattern best.
        heads: Attention heads; 4, or with --slide those of the slide encoder.
        segment_lengths: Tokens of a segment for each branch of dilated attention; [16,32,64], or the slide encoder's.
        dilated_ratios: Dilated ratio of each branch, which keeps one token in so many; [1,2,4], or the slide encoder's.
        window: Tokens seen on either side, for the sliding window, and if wanted for random keys.
        period: Distance between keys, for the strided pattern.
        random_keys: Random keys of each query, for the pattern `random`.
        global_tokens: First tokens that see all and that all see, for the pattern `random`.
        pattern_seed: Which random keys.
        block_size: Tokens of a block, for the pattern `learned`.
        chosen_blocks: Blocks that each block chooses to see besides itself, for the pattern `learned`.
        causal: Whether later keys are hidden.
        slide: A feature file, whose tiles are drawn at their places.
        tile: x,y in level-0 pixels of a point within the tile that attends. Default: the tile in the middle of the
            sequence.
        slide_encoder: With --slide: the slide encoder by name, or the path of a YAML file.
        checkpoint: With --slide, in place of --slide-encoder: a .ckpt of `fit` or `pretrain` whose model is LongNet.

    Returns:
        What was drawn.

    Raises:
        LongslideError: The configuration does not fit, no tile is there, or the picture cannot be written.
    """
    output = Path(output)
    if output.suffix.lower() not in FORMATS:
        raise LongslideError(f"{output}: a picture is written as {', '.join(FORMATS)}; name the file so")
    settings = {
        "window": window,
        "period": period,
        "random_keys": random_keys,
        "global_tokens": global_tokens,
        "pattern_seed": pattern_seed,
        "block_size": block_size,
        "chosen_blocks": chosen_blocks,
    }
    if slide is not None:
        if pattern != "dilated" or causal or any(settings.values()):
            raise LongslideError(
                "--slide draws the attention of a slide encoder or a checkpoint, which sees both ways; leave --pattern, its "
                "settings and --causal out"
            )
        if tokens is not None:
            raise LongslideError("--slide has tokens of its own; leave --tokens out")
        if checkpoint is not None and (slide_encoder != "gigapath" or heads or segment_lengths or dilated_ratios):
            raise LongslideError(
                "--checkpoint says which slide encoder; leave --slide-encoder, --heads, --segment-lengths and "
                "--dilated-ratios out"
            )
        model = None if checkpoint is None else Path(checkpoint)
        return _of_slide(output, Path(slide), tile, slide_encoder, model, heads, segment_lengths, dilated_ratios)
    if tile is not None or checkpoint is not None:
        name, what = ("tile", "tile of a slide") if tile is not None else ("checkpoint", "model that looks at a slide")
        raise LongslideError(f"--{name} is a {what}: give its feature file as --slide")
    from ...models.slide_encoder.attention_pattern import check_pattern
    from .figure import MAX_BRANCHES, draw_attention_map
    from .seen import MOST_POINTS, dense_pairs, see_blocks, see_every_pair

    tokens, heads = 64 if tokens is None else tokens, 4 if heads is None else heads
    segment_lengths, dilated_ratios = segment_lengths or [16, 32, 64], dilated_ratios or [1, 2, 4]
    branches = _branches(segment_lengths, dilated_ratios) if pattern == "dilated" else ()
    if len(branches) > MAX_BRANCHES:
        raise LongslideError(f"{len(branches)} branches are more than the {MAX_BRANCHES} that can be distinguished")
    if not 1 <= tokens <= MOST_TOKENS or heads < 1:
        raise LongslideError(
            f"--tokens {tokens} and --heads {heads}: a picture takes 1 to {MOST_TOKENS:,} tokens and a head or more"
        )
    check_pattern(pattern, **settings)
    if tokens <= MOST_POINTS:
        seen = see_every_pair(visible_keys(tokens, heads, pattern, causal, branches=branches, **settings), causal)
    else:
        period_of = {"dilated": math.lcm(*(ratio for _, ratio in branches)), "strided": max(period, 1)}
        seen = see_blocks(_rule(tokens, heads, pattern, causal, branches, settings), causal, period_of.get(pattern, 1))

    def pairs(length: int) -> int:
        return sum(scored_pairs(length, heads, pattern, causal, branches=branches, **settings))

    result = AttentionMap(output, pairs(tokens) / (heads * dense_pairs(tokens, causal)), seen.share)

    names = {
        "dilated": "Dilated attention (LongNet)",
        "sliding-window": "Sliding-window attention",
        "random": "Random attention (BigBird)" if window and global_tokens else "Random attention",
        "learned": "Learned sparsity, for random tokens",
    }
    blocks = math.ceil(tokens / max(block_size, 1))
    title = names.get(pattern, f"{pattern.capitalize()} attention")
    labels = {
        "dilated": [f"segments of {length:,}, {_every(ratio)}" for length, ratio in branches],
        "dense": [_every(1)],
        "sliding-window": [f"within {count(window, 'token')}"],
        "strided": [_every(period or 1)],
        "random": [_random_words(min(random_keys, tokens), window, global_tokens)],
        "learned": [f"its block of {block_size}, {min(chosen_blocks, blocks - 1)} of {blocks - 1} others chosen"],
    }[pattern]
    lengths = [length for length, _ in branches]
    write_whole(
        output,
        drawn(
            draw_attention_map(seen, title, labels, lengths, causal, result.share, pairs),
            FORMATS[output.suffix.lower()],
        ),
    )
    print(
        f"{output}: each head scores {result.share:.1%} of dense attention's query-key pairs; all heads together see "
        f"{'about ' * (seen.block > 1)}{result.seen:.1%} of them{MORE_THAN_ALL[pattern] if result.share > 1 else ''}"
    )
    return result


def _rule(
    tokens: int,
    heads: int,
    pattern: str,
    causal: bool,
    branches: Sequence[tuple[int, int]],
    settings: dict[str, int],
) -> "Rule":
    """A pattern by its rule."""
    from .seen import Chosen, Classes, Near

    window = settings["window"]
    if pattern == "sliding-window":
        return Near(tokens, heads, window, causal)
    if pattern == "random":
        random = (settings["global_tokens"], settings["random_keys"], settings["pattern_seed"])
        return Near(tokens, heads, window, causal, *random)
    if pattern == "learned":
        return Chosen(tokens, heads, settings["block_size"], settings["chosen_blocks"], causal)
    return Classes(tokens, heads, branches, causal, settings["period"] if pattern == "strided" else 1)


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
    checkpoint: Path | None,
    heads: int | None,
    segment_lengths: list[int] | None,
    dilated_ratios: list[int] | None,
) -> AttentionMap:
    """Draw what one tile of a feature file sees."""
    from ...data.features.feature_file import read_features
    from ...models.slide_encoder.spec import load_longnet_spec
    from .figure import MAX_BRANCHES
    from .sight import sight_of_model, sight_of_spec
    from .slide_map import draw_slide_map

    features = read_features(path, embeddings=checkpoint is not None)
    if not len(features.coords):
        raise LongslideError(f"{path}: has no tiles to draw; give the feature file of another slide")
    if checkpoint is not None:
        sight = sight_of_model(checkpoint, features)
    else:
        spec = load_longnet_spec(slide_encoder)
        lengths, ratios = segment_lengths or list(spec.segment_lengths), dilated_ratios or list(spec.dilated_ratios)
        sight = sight_of_spec(spec, heads or spec.heads, _branches(lengths, ratios), len(features.coords))
    if len(sight.branches) > MAX_BRANCHES:
        raise LongslideError(
            f"{len(sight.branches)} branches are more than the {MAX_BRANCHES} that can be distinguished"
        )
    number = len(features.coords) // 2 if place is None else _tile_at(path, features, place)
    x, y = features.coords[number].tolist()
    title = (
        f"{features.slide_id}: which tiles the tile at {x:,}, {y:,} sees ({sight.name}, {count(sight.heads, 'head')})"
    )
    write_whole(output, drawn(draw_slide_map(features.cells, number, sight, title), FORMATS[output.suffix.lower()]))
    result = AttentionMap(output, sight.pairs / (sight.heads * sight.tokens**2), sight.share_seen(number))
    print(
        f"{output}: the tile at {x:,}, {y:,} sees {result.seen:.1%} of the {len(features.coords):,} tiles in one layer; "
        f"each head scores {result.share:.1%} of dense attention's query-key pairs"
        f"{MORE_THAN_ALL.get(sight.pattern, '') if result.share > 1 else ''}"
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


def visible_keys(
    tokens: int,
    heads: int,
    pattern: "Pattern",
    is_causal: bool,
    *,
    branches: Sequence[tuple[int, int]] = (),
    **settings: int,
) -> np.ndarray:
    """Ask the attention function which keys each query sees.

    With the unit vectors for values the output of a query is its weights: not zero for the keys it sees. Queries and keys
    are random, with a fixed seed: it is for them that the pattern `learned` chooses.

    Args:
        tokens: Tokens of the sequence.
        heads: Attention heads.
        pattern: The pattern.
        is_causal: Whether later keys are hidden.
        branches: Segment length and ratio of each branch of dilated attention.
        **settings: The pattern's, as `attention` takes them.

    Returns:
        `(branches, heads, tokens, tokens)` bool, of query and key; one branch for the patterns without branches.
    """
    import torch

    from ...models.slide_encoder.attention_pattern import attention

    queries, keys = torch.randn(2, 1, tokens, heads, tokens, generator=torch.Generator().manual_seed(0))
    units = torch.eye(tokens)[None, :, None].expand(1, tokens, heads, tokens)
    given: Any = settings
    outputs = []
    for segment_length, ratio in branches or [(1, 1)]:
        weights = attention(
            queries,
            keys,
            units,
            pattern,
            is_causal,
            segment_lengths=[segment_length],
            dilated_ratios=[ratio],
            **given,
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
    random_keys: int = 0,
    global_tokens: int = 0,
    pattern_seed: int = 0,
    block_size: int = 0,
    chosen_blocks: int = 0,
) -> list[int]:
    """Query-key pairs whose logit is computed, by arithmetic: the work of attention, for sequences too long to draw.

    A pair that several branches score counts for each, and a random key that is a neighbour too. Zero keys cost nothing. Of
    the pattern `learned` the pairs of blocks, by which it chooses, count too.

    Args:
        tokens: Tokens of the sequence.
        heads: Attention heads.
        pattern: The pattern.
        is_causal: Whether later keys are hidden.
        branches: Segment length and ratio of each branch of dilated attention.
        window: See `attention`.
        period: See `attention`.
        random_keys: See `attention`.
        global_tokens: See `attention`.
        pattern_seed: See `attention`; makes no difference.
        block_size: See `attention`.
        chosen_blocks: See `attention`.

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
    if pattern == "random":
        query = np.arange(tokens)
        first, last = np.maximum(query - window, 0), query if is_causal else np.minimum(query + window, tokens - 1)
        near = last - first + 1 + np.minimum(first, global_tokens)
        if not is_causal:
            near += np.maximum(min(global_tokens, tokens) - last - 1, 0)
        among = query + 1 if is_causal else np.full(tokens, tokens)
        each = near + np.minimum(random_keys, among)
        each[:global_tokens] = among[:global_tokens]
        return [heads * int(each.sum())]
    if pattern == "learned":
        blocks, rest = divmod(tokens, block_size)
        sizes = np.array([block_size] * blocks + [rest] * (rest > 0))
        number = np.arange(len(sizes))
        chosen = np.minimum(number if is_causal else len(sizes) - 1, chosen_blocks)
        own = sum(within(int(size)) for size in sizes)
        means = len(sizes) * (len(sizes) - 1) // 2 if is_causal else len(sizes) ** 2
        return [heads * (own + int((sizes * chosen * block_size).sum()) + means)]
    return [heads * within(tokens)]


def _random_words(random_keys: int, window: int, global_tokens: int) -> str:
    """What a query sees of the pattern `random`."""
    words = [f"{random_keys} random keys" if random_keys > 1 else "a random key"]
    words += [f"{window} on either side"] * (window > 0)
    words += [f"{global_tokens} global"] * (global_tokens > 0)
    return ", ".join(words)


def _every(count: int) -> str:
    if count == 1:
        return "every token"
    ending = {1: "st", 2: "nd", 3: "rd"}.get(count % 10, "th") if count % 100 not in (11, 12, 13) else "th"
    return f"every {count}{ending} token"

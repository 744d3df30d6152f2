"""The picture of the attention map: one query, each head, all heads together, and the work."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from ...plurals import count
from .seen import Seen, dense_pairs

MAX_HEADS_SHOWN = 16

# Okabe and Ito's colours, distinguishable to colour-blind readers too; the nearest branch first.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C6D31", "#555555")
MAX_BRANCHES = len(COLOURS)
NOTHING = "#F0F0F0"
INK = "#222222"


def draw_attention_map(
    seen: Seen,
    pattern: str,
    labels: Sequence[str],
    segment_lengths: Sequence[int],
    causal: bool,
    share: float,
    pairs: Callable[[int], int],
) -> Figure:
    """Draw which keys each query sees.

    Args:
        seen: Which keys queries see.
        pattern: The pattern's name, for the title.
        labels: What each branch sees, in words.
        segment_lengths: Tokens of a segment of each branch of dilated attention; else empty.
        causal: Whether later keys are hidden.
        share: Query-key pairs that are scored, as a share of dense attention's.
        pairs: The pairs that all heads score at a number of tokens.

    Returns:
        The figure.
    """
    heads, tokens = seen.heads.shape[1], seen.tokens
    groups = _alike(seen.heads)
    rows = math.ceil(min(len(groups), MAX_HEADS_SHOWN) / 4) if len(groups) > 1 else 0  # heads that are alike: no row
    heights = [0.75, 1.15 + 0.34 * len(labels), 3.35 * rows + 0.5 * (rows > 0), 6.1]
    layout = ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.08)
    figure = Figure(figsize=(13, sum(heights)), dpi=130, layout=layout, facecolor="white")
    strips: Any = figure.subfigures(3 + (rows > 0), 1, height_ratios=[height for height in heights if height])
    head, top, *middle, bottom = strips
    title = f"{pattern}: which keys each query sees"
    head.text(0.5, 0.66, title, fontsize=16, fontweight="bold", color=INK, ha="center", va="center")
    facts = f"{count(tokens, 'token')}, {count(heads, 'head')}, " + (
        "causal: no query sees a later key" if causal else "not causal: queries see later keys too"
    )
    if seen.block > 1:
        facts += f"; a point is {seen.block:,} x {seen.block:,} pairs, the stronger the more of them are seen"
    head.text(0.5, 0.2, facts, fontsize=11.5, color=INK, ha="center", va="center")
    _draw_one_query(top, seen, labels, segment_lengths, causal)
    if rows:
        _draw_heads(middle[0], seen, groups, rows, segment_lengths)
    _draw_together(bottom, seen, labels, share, pairs, causal, 2 + (rows > 0))
    return figure


def _alike(seen: np.ndarray) -> list[list[int]]:
    """Heads that see the same, together."""
    groups: dict[bytes, list[int]] = {}
    for head in range(seen.shape[1]):
        groups.setdefault(seen[:, head].tobytes(), []).append(head)
    return list(groups.values())


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def _picture(shares: np.ndarray) -> np.ndarray:
    """(branches, ...) -> (..., 3): where all is seen the colour of the first branch that sees it, else a paler one.

    Colours are as strong as the root of the share: one pair of 256, of every 16th token, is still to be seen.
    """
    picture = np.broadcast_to(_rgb(NOTHING), (*shares.shape[1:], 3)).copy()
    for branch in reversed(range(len(shares))):
        strength = np.sqrt(shares[branch])[..., None]
        picture += strength * (_rgb(COLOURS[branch]) - picture)
    return picture


def _draw_one_query(
    figure: Any, seen: Seen, labels: Sequence[str], segment_lengths: Sequence[int], causal: bool
) -> None:
    """A strip of tokens for each branch: those kept, and those that one query sees."""
    tokens, query = seen.tokens, seen.query
    axes: Axes = figure.subplots()
    for row, label in enumerate(labels):
        keys, kept = (_blocks(one[row], seen.block)[:, None] for one in (seen.keys, seen.kept))
        strip = np.broadcast_to(_rgb(NOTHING), (len(keys), 3)).copy()
        if segment_lengths:
            strip += np.sqrt(kept) * (0.72 + 0.28 * _rgb(COLOURS[row]) - strip)
        strip += np.sqrt(keys) * (_rgb(COLOURS[row]) - strip)
        axes.imshow(
            strip[None], extent=(-0.5, tokens - 0.5, row + 0.36, row - 0.36), aspect="auto", interpolation="none"
        )
        if segment_lengths:
            bars = np.arange(0, tokens + 1, min(segment_lengths[row], tokens)) - 0.5
            axes.vlines(bars, row - 0.46, row + 0.46, color=INK, linewidth=min(1.6, 300 / len(bars)))
        axes.text(-0.022 * tokens - 0.5, row, label, ha="right", va="center", fontsize=10.5, color=INK)
        axes.plot(-0.012 * tokens - 0.5, row, marker="s", markersize=8, color=COLOURS[row], clip_on=False)
    if tokens <= 128:
        axes.vlines(np.arange(tokens - 1) + 0.5, -0.5, len(labels) - 0.5, color="white", linewidth=0.8, zorder=1.5)
    axes.plot([query], [-0.62], marker="v", color=INK, markersize=8, clip_on=False)
    axes.text(query, -0.86, f"query {query:,}", ha="center", va="bottom", fontsize=10, color=INK)
    axes.set_xlim(-0.5, tokens - 0.5)
    axes.set_ylim(len(labels) - 0.45, -1.15)
    axes.set_yticks([])
    axes.tick_params(labelsize=9)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("token", fontsize=10)
    for side in axes.spines.values():
        side.set_visible(False)
    if segment_lengths:
        others = "those before them" if causal else "one another"
        text = (
            "1   A branch cuts the tokens into segments (black bars) and keeps every r-th token of each (tinted; here for "
            f"head 0). The kept tokens\n     of a segment see {others}: in full colour the keys that one query sees. One "
            "softmax runs over the keys of all branches."
        )
    else:
        text = "1   The keys that one query sees"
    figure.suptitle(text, x=0.012, ha="left", fontsize=11.5, color=INK)


def _draw_heads(figure: Any, seen: Seen, groups: list[list[int]], rows: int, segment_lengths: Sequence[int]) -> None:
    """The matrix of each kind of heads."""
    shown = groups[:MAX_HEADS_SHOWN]
    grid = figure.subplots(rows, 4, squeeze=False)
    for axes, group in zip(grid.flat, shown, strict=False):
        name = f"heads {group[0]} to {group[-1]}" if len(group) > 1 else f"head {group[0]}"
        _draw_matrix(
            axes, seen, seen.heads[:, group[0]], name, seen.stretch, marked=0 in group, labelled=axes in grid[:, 0]
        )
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    text = "2   Each head: a row is a query, a column a key. "
    if segment_lengths:
        text += "Heads start at other offsets: each keeps tokens others skip."
    else:
        text += "Each has keys of its own."
    if seen.stretch is not None:
        text += f" Here of tokens {seen.stretch:,} to {seen.stretch + seen.heads.shape[2] - 1:,}."
    if len(groups) > len(shown):
        text += f"  ({len(shown)} of {len(groups)} kinds of heads shown)"
    figure.suptitle(text, x=0.012, ha="left", fontsize=11.5, color=INK)


def _draw_together(
    figure: Any,
    seen: Seen,
    labels: Sequence[str],
    share: float,
    pairs: Callable[[int], int],
    causal: bool,
    number: int,
) -> None:
    """The matrix of all heads, and the work beside dense attention's."""
    heads, tokens = seen.heads.shape[1], seen.tokens
    matrix, side = figure.subfigures(1, 2, width_ratios=[6.4, 6.6])
    axes = matrix.subplots()
    _draw_matrix(axes, seen, seen.together, "", None, marked=True, labelled=True)
    title = "All heads together" if number > 2 or seen.block > 1 else "Every head: a row is a query, a column a key"
    if len(labels) > 1:
        title += ": dense nearby, sparser farther away"
    matrix.suptitle(f"{number}   {title}", x=0.024, ha="left", fontsize=11.5, color=INK)
    bars, growth = side.subplots(2, 1, height_ratios=[1, 1.5])
    side.suptitle(
        f"{number + 1}   The work: query-key pairs that are scored", x=0.012, ha="left", fontsize=11.5, color=INK
    )

    dense = dense_pairs(tokens, causal)
    left = 0.0
    for branch in range(len(labels)):
        part = seen.pairs[branch] / (heads * dense)
        bars.barh(0, part, left=left, color=COLOURS[branch], edgecolor="white")
        left += part
    bars.barh(1, 1, color="#BBBBBB", edgecolor="white")
    bars.text(left + 0.01, 0, f"{share:.1%}", va="center", fontsize=11, fontweight="bold", color=INK)
    bars.text(1.01, 1, "100%", va="center", fontsize=11, color=INK)
    bars.set_yticks([0, 1], ["a head here", "a dense head"], fontsize=10)
    bars.set_xlim(0, max(1.12, 1.12 * left))
    bars.set_ylim(1.6, -0.6)
    bars.set_xticks([])
    about = "about " if seen.block > 1 else ""
    bars.set_title(
        f"at {tokens:,} tokens; all heads together see {about}{seen.share:.1%} of all pairs",
        loc="left",
        fontsize=10,
        color=INK,
    )
    for spine in bars.spines.values():
        spine.set_visible(False)

    lengths = [tokens * 2**step for step in range(11)]
    here = [pairs(length) / heads for length in lengths]
    all_pairs = [length * (length + 1) // 2 if causal else length**2 for length in lengths]
    growth.loglog(lengths, all_pairs, color="#999999", linewidth=2)
    growth.loglog(lengths, here, color=COLOURS[0], linewidth=2.5)
    growth.text(lengths[5], all_pairs[5] * 1.6, "dense  ", ha="right", va="bottom", fontsize=10.5, color="#777777")
    growth.text(
        0.98, 0.05, f"{100 * here[-1] / all_pairs[-1]:.2g}% of dense attention's\nat {lengths[-1]:,} tokens",
        ha="right", va="bottom", fontsize=10.5, color=COLOURS[0], transform=growth.transAxes,
    )  # fmt: skip
    growth.set_xlim(lengths[0], lengths[-1])
    growth.set_xlabel("tokens, with the same settings", fontsize=10)
    growth.set_ylabel("pairs a head", fontsize=10)
    growth.grid(True, color="#E5E5E5")
    growth.tick_params(labelsize=9)
    for side_name in ("top", "right"):
        growth.spines[side_name].set_visible(False)


def _draw_matrix(
    axes: Axes, seen: Seen, shares: np.ndarray, title: str, stretch: int | None, *, marked: bool, labelled: bool
) -> None:
    """A matrix of shares, of all tokens or of a stretch of them, the query to explain by marked at its edge."""
    first, block, tokens = (0, seen.block, seen.tokens) if stretch is None else (stretch, 1, shares.shape[1])
    left, right = first - 0.5, first + tokens - 0.5
    last = first + shares.shape[1] * block - 0.5
    axes.imshow(_picture(shares), extent=(left, last, last, left), interpolation="antialiased")
    if marked:
        axes.plot(right + 0.012 * tokens, seen.query, marker="<", color=INK, markersize=6, clip_on=False)
    axes.set_xlim(left, right)
    axes.set_ylim(right, left)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    axes.set_title(title, fontsize=10.5, color=INK)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("key", fontsize=10)
    if labelled:
        axes.set_ylabel("query", fontsize=10)


def _blocks(flags: np.ndarray, size: int) -> np.ndarray:
    """`(L,)` bool -> the share that is true in each block of so many."""
    starts = np.arange(0, len(flags), size)
    return np.asarray(np.add.reduceat(flags.astype(np.float64), starts) / np.minimum(size, len(flags) - starts))

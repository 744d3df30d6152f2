"""Which tiles of a slide one tile sees: for each branch, each head, all heads, and after several layers."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ...plurals import count
from .figure import COLOURS, INK, MAX_HEADS_SHOWN, NOTHING
from .sight import CLS_TOKENS, Sight, layers_to_reach

MAX_ASPECT = 4.0
"""A panel is so many times as high as wide at most: the picture of a long strip of tissue would pass all limits."""

LAYER_COLOURS = ("#08306B", "#2171B5", "#6BAED6", "#C6DBEF")


def draw_slide_map(cells: np.ndarray, tile: int, sight: Sight, title: str) -> Figure:
    """Draw which tiles one tile sees, each at its place on the slide.

    Args:
        cells: `(N, 2)` column and row of each tile, in the order in which LongNet reads them.
        tile: Number of the tile that looks.
        sight: What tokens see.
        title: What is drawn.

    Returns:
        The figure.
    """
    tokens, query = len(cells) + CLS_TOKENS, tile + CLS_TOKENS
    heads, branches, layers = sight.heads, sight.branches, sight.layers
    seen = sight.seen_by(tile)
    reached = layers_to_reach(query, tokens, layers, sight.sees)[CLS_TOKENS:]
    places = cells - cells.min(0)
    width, height = (places.max(0) + 1).tolist()
    aspect = min(height / width, MAX_ASPECT)
    columns = min(8, heads)
    shown = min(heads, MAX_HEADS_SHOWN)
    rows = [*[len(branches)] * (len(branches) > 0), *[columns] * math.ceil(shown / columns), 2]
    heights = [13 / count * aspect + 0.75 for count in rows[:-1]] + [min(6.0, 6.2 * aspect) + 0.8]
    figure = Figure(figsize=(13, sum(heights) + 0.9), dpi=110, layout="constrained", facecolor="white")
    panels: Any = figure.subfigures(len(rows) + 1, 1, height_ratios=[0.9, *heights])
    head, *strips = panels
    head.text(0.5, 0.62, title, fontsize=15, fontweight="bold", color=INK, ha="center", va="center")
    order = "Tiles are read row by row, so a segment is a band of rows." if branches else "Tiles are read row by row."
    head.text(
        0.5, 0.16, order + " The circle is the tile that looks.",
        fontsize=11, color=INK, ha="center", va="center",
    )  # fmt: skip

    def canvas(colour_of: np.ndarray) -> np.ndarray:
        picture = np.ones((height, width, 3))
        picture[places[:, 1], places[:, 0]] = colour_of
        return picture

    def draw(axes: Axes, colour_of: np.ndarray, name: str) -> None:
        axes.imshow(canvas(colour_of), interpolation="none")
        for colour, width in (("white", 4.0), (INK, 1.6)):  # to be seen on every colour
            axes.plot(*places[tile], "o", markersize=8, mfc="none", markeredgecolor=colour, markeredgewidth=width)
        axes.set_title(name, fontsize=9, color=INK)
        axes.set_axis_off()

    def of_branches(visible: np.ndarray) -> np.ndarray:
        """(branches, N) -> (N, 3): each tile in the colour of the first branch that sees it."""
        colour_of = np.tile(np.array(to_rgb(NOTHING)), (len(cells), 1))
        for branch in reversed(range(len(visible))):
            colour_of[visible[branch]] = to_rgb(COLOURS[branch])
        return colour_of

    tiles_seen = seen[:, :, CLS_TOKENS:]
    segments = np.arange(CLS_TOKENS, tokens)
    if branches:
        strips[0].suptitle("1   Each branch: the segment of the tile (tinted) and what some head sees of it", **_LEFT)
    for branch, axes in enumerate(np.atleast_1d(strips[0].subplots(1, len(branches))) if branches else ()):
        length, _ = branches[branch]
        colour_of = np.tile(np.array(to_rgb(NOTHING)), (len(cells), 1))
        colour_of[segments // length == query // length] = 0.8 + 0.2 * np.array(to_rgb(COLOURS[branch]))
        colour_of[tiles_seen[branch].any(0)] = to_rgb(COLOURS[branch])
        taking_part = np.flatnonzero(tiles_seen[branch].any(1) | seen[branch].any(1))
        draw(axes, colour_of, f"{sight.labels[branch]}\nseen by {_heads(taking_part, heads)}")
    first = int(len(branches) > 0)
    for row in range(first, len(rows) - 1):
        if row == first:
            more = f" ({shown} of {heads} shown)" if shown < heads else ""
            what = "a colour is a branch" if branches else "what the tile sees in the last layer"
            strips[row].suptitle(f"{first + 1}   Each head{more}: {what}", **_LEFT)
        grid = np.atleast_1d(strips[row].subplots(1, columns))
        for axes, number in zip(grid, range((row - first) * columns, (row - first + 1) * columns), strict=True):
            if number < shown:
                draw(axes, of_branches(tiles_seen[:, number]), f"head {number}")
            else:
                axes.set_visible(False)
    together, deep = strips[-1].subplots(1, 2)
    strips[-1].suptitle(f"{first + 2}   All heads of one layer, and all layers", **_LEFT)
    share = tiles_seen.any((0, 1)).mean()
    draw(together, of_branches(np.asarray(tiles_seen.any(1))), f"all heads: {share:.1%} of {len(cells):,} tiles")
    colour_of = np.tile(np.array(to_rgb(NOTHING)), (len(cells), 1))
    deepest = int(reached[reached <= layers].max(initial=1))
    steps = range(1, min(deepest, len(LAYER_COLOURS)) + 1)
    for layer in steps:  # the last colour is that of all further layers too
        colour_of[(reached >= layer - (layer == 1)) & (reached <= layers)] = to_rgb(LAYER_COLOURS[layer - 1])
    draw(
        deep,
        colour_of,
        f"what reaches the tile within {count(layers, 'layer')}: {(reached <= layers).mean():.1%} of the tiles",
    )
    labels = [f"after {count(layer, 'layer')}: {(reached <= layer).mean():.1%}" for layer in steps]
    patches = [Patch(color=LAYER_COLOURS[number], label=label) for number, label in enumerate(labels)]
    deep.legend(handles=patches, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9, frameon=False)
    return figure


_LEFT = {"x": 0.012, "ha": "left", "fontsize": 11.5, "color": INK}


def _heads(numbers: np.ndarray, heads: int) -> str:
    if len(numbers) == heads:
        return "every head"
    if not len(numbers):
        return "no head"
    if len(numbers) == 1:
        return f"head {numbers[0]}"
    return f"heads {numbers[0]} to {numbers[-1]}"

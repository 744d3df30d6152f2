"""The overlay of a slide: its thumbnail, beside it a score for each tile in colour, a legend, a scale bar and a title."""

from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from ...data.tissue.base import Tissue
from ..report.picture_parts import TEXT_COLOUR, Align, Pen
from ..report.slide_picture import SlidePicture, closed_rings, fitted, legend_rows

SIGNED_MAP = "coolwarm"
"""Colour map of signed scores: blue, light grey, red. Its steps look alike (https://doi.org/10.1007/978-3-642-10520-3_9),
and its ends differ for people of every kind of colour vision."""

UNSIGNED_MAP = "cividis"
"""Colour map of scores from 0 up: the same for people with and without red-green colour blindness
(https://doi.org/10.1371/journal.pone.0199239)."""

OPACITY = 0.25, 0.6
"""Share of the colour where the score is 0 and where the map ends: the rest is the thumbnail in grey, whose own colours
would shift the map's. The stain is to be seen in the picture beside it."""

STRONG = 0.5
"""Tiles of at least this share of the score at which the colours end are outlined, and merged to regions."""

FOR_COLOUR = (180, 4, 38)
AGAINST_COLOUR = (59, 76, 192)
"""Both ends of the map of signed scores."""

GAP = 16
"""Pixels between the two pictures."""

CONTOUR_WIDTH = 700
"""A line is a pixel wide in a picture of so many."""


def score_limit(scores: np.ndarray) -> float:
    """The magnitude at which the colours end: the 99th percentile, so that one tile does not take all the contrast.

    Args:
        scores: `(N,)` scores.

    Returns:
        The limit; 1 where all scores are 0.
    """
    magnitude = np.abs(scores)
    # The next score up, not one between two: among few tiles the strongest one keeps the end of the map to itself.
    limit = float(np.quantile(magnitude, 0.99, method="higher")) if len(magnitude) else 0.0
    return limit or float(magnitude.max(initial=0)) or 1.0


def tile_raster(
    coords: np.ndarray,
    tile_size_level0: int,
    scores: np.ndarray,
    bounds: tuple[int, int, int, int],
    size: tuple[int, int],
) -> np.ndarray:
    """Scores of tiles as a raster over a slide's thumbnail; where tiles overlap, their mean.

    Args:
        coords: `(N, 2)` top-left corner (x, y) of each tile in level-0 pixels.
        tile_size_level0: Edge of a tile in level-0 pixels.
        scores: `(N,)` score of each tile.
        bounds: `Slide.bounds`, which the thumbnail shows.
        size: (width, height) of the raster.

    Returns:
        `(height, width)` float64; NaN where there is no tile.
    """
    width, height = size
    coords = coords - bounds[:2]
    shown = ((coords + tile_size_level0 > 0) & (coords < bounds[2:])).all(1)
    coords, scores = coords[shown], scores[shown]
    scale = np.array(size) / bounds[2:]
    # Edges are rounded, not sizes: neighbours meet without a gap. A tile smaller than a pixel still shows.
    first = np.clip(np.rint(coords * scale).astype(int), 0, np.array(size) - 1)
    last = np.maximum(np.rint((coords + tile_size_level0) * scale).astype(int), first + 1)
    total, count = np.zeros((height, width)), np.zeros((height, width))
    for (x0, y0), (x1, y1), score in zip(first.tolist(), last.tolist(), scores.tolist(), strict=True):
        total[y0:y1, x0:x1] += score
        count[y0:y1, x0:x1] += 1
    mean: np.ndarray = np.divide(total, count, out=np.full((height, width), np.nan), where=count > 0)
    return mean


def score_layers(
    thumbnail: np.ndarray, raster: np.ndarray, limit: float, *, signed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """A raster of scores as colours to lay over a thumbnail.

    Args:
        thumbnail: `(h, w, 3)` uint8 RGB, `Slide.thumbnail`.
        raster: `(h, w)` scores; NaN leaves the thumbnail as it is.
        limit: Magnitude at which the colours end.
        signed: Whether scores go from -limit to limit, or from 0.

    Returns:
        The thumbnail, grey where there are scores, `(h, w, 3)` uint8 RGB; and the colours, `(h, w, 4)` uint8 RGBA.
    """
    from matplotlib import colormaps

    covered = ~np.isnan(raster)
    share = raster[covered] / limit
    grey, colours = thumbnail.copy(), np.zeros((*raster.shape, 4), np.uint8)
    grey[covered] = cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY)[covered][:, None]
    map_of = colormaps[SIGNED_MAP if signed else UNSIGNED_MAP]
    colours[covered, :3] = map_of(0.5 + share / 2 if signed else share, bytes=True)[:, :3]
    opacity = OPACITY[0] + (OPACITY[1] - OPACITY[0]) * np.abs(share).clip(0, 1)
    colours[covered, 3] = np.rint(255 * opacity)
    return grey, colours


def paint_tiles(thumbnail: np.ndarray, raster: np.ndarray, limit: float, *, signed: bool) -> np.ndarray:
    """Paint a raster of scores over a thumbnail: both of `score_layers`, `(h, w, 3)` uint8 RGB."""
    grey, colours = score_layers(thumbnail, raster, limit, signed=signed)
    opacity = colours[..., 3:] / 255
    painted: np.ndarray = np.rint(opacity * colours[..., :3] + (1 - opacity) * grey).astype(np.uint8)
    return painted


def draw_overlay(
    thumbnail: np.ndarray,
    raster: np.ndarray,
    *,
    title: str,
    mm_per_px: float | None,
    limit: float,
    ends: tuple[str, str],
    unit: str = "",
    signed: bool = True,
    tissue: Sequence[np.ndarray] = (),
) -> SlidePicture:
    """The thumbnail with outlines of tissue and of the strongest tiles, and beside it (below it, if it is wide) the painted
    one; above them a title, below them a scale bar and a legend.

    Args:
        thumbnail: `(h, w, 3)` uint8 RGB, `Slide.thumbnail`.
        raster: `(h, w)` scores from `tile_raster`.
        title: The slide and its prediction; a line may be broken with a newline.
        mm_per_px: Millimetres per pixel of the thumbnail; None leaves the scale bar out.
        limit: Magnitude at which the colours end.
        ends: What the low and the high end of the colours mean.
        unit: What a score is measured in.
        signed: Whether scores go from -limit to limit, or from 0.
        tissue: Closed rings `(n, 2)` of the tissue's contours, (x, y) in pixels of the thumbnail.

    Returns:
        A picture at least 480 pixels wide; the two are centred in it, unscaled.
    """
    height, width = thumbnail.shape[:2]
    below_one_another = width > 1.5 * height
    step = (0, height + GAP) if below_one_another else (width + GAP, 0)
    canvas_width = max(width + step[0], 480)
    size = max(13, round(canvas_width / 70))  # to be read where the picture is as wide as a page
    line_width = max(1.0, max(height, width) / CONTOUR_WIDTH)
    lines = title.split("\n")
    legend = [(Pen(TEXT_COLOUR, line_width), "tissue")] if tissue else []
    strong = list(_strong(raster, limit, line_width, ends, signed))
    legend += [(pen, text) for pen, text, _ in strong]
    room = canvas_width - 2 * size
    top = round((len(lines) * 1.35 + 0.8) * size)
    bottom = top + height + step[1]
    picture = SlidePicture(canvas_width, bottom + round((5.6 + 1.6 * len(legend_rows(legend, room, size))) * size))
    for number, line in enumerate(lines):
        picture.text((size, (1.35 + 1.35 * number) * size), *fitted(line, room, size))
    left = (canvas_width - width - step[0]) // 2
    panels = [picture.image((left, top), thumbnail)]
    grey, colours = score_layers(thumbnail, raster, limit, signed=signed)
    panels.append(picture.image((left + step[0], top + step[1]), grey))
    picture.image(panels[1].at, colours)
    for panel in panels:
        panel.draw(tissue, Pen(TEXT_COLOUR, line_width))
    for pen, _, area in strong:
        panels[0].draw(closed_rings(area), pen)
    below = bottom + size
    if mm_per_px is not None:
        picture.scale_bar((size, below + size), 0.3 * canvas_width, mm_per_px, size)
    _draw_colours(picture, below, size, limit, ends, unit, signed)
    picture.legend((size, below + 4.4 * size), room, legend, size)
    return picture


def _strong(
    raster: np.ndarray, limit: float, line_width: float, ends: tuple[str, str], signed: bool
) -> Iterator[tuple[Pen, str, Tissue]]:
    """The areas of the strongest tiles: how they are drawn, what they are, where they are."""
    for sign, colour, end in ((1, FOR_COLOUR, ends[1]), (-1, AGAINST_COLOUR, ends[0]))[: 1 + signed]:
        area = np.nan_to_num(sign * raster) >= STRONG * limit
        if area.any():
            bound = f"{sign * STRONG * limit:+.2g}" if signed else f"{STRONG * limit:.2g}"
            text = f"{end}: {bound} or {'more' if sign > 0 else 'less'}"
            yield Pen(colour, 2 * line_width, dashed=sign < 0), text, Tissue(area, (1, 1), "")


def _draw_colours(
    picture: SlidePicture, top: int, size: int, limit: float, ends: tuple[str, str], unit: str, signed: bool
) -> None:
    """A bar of the colours as they look over a middle grey, its ends named and numbered, at the right."""
    bar = round(0.5 * picture.width)
    left = picture.width - size - bar
    values = np.broadcast_to(np.linspace(-limit if signed else 0, limit, bar), (size, bar))
    picture.image((left, top), paint_tiles(np.full((size, bar, 3), 200, np.uint8), values, limit, signed=signed))
    low, middle, high = (f"{-limit:.2g}", "0", f"+{limit:.2g}") if signed else ("0", "", f"{limit:.2g}")
    places: tuple[tuple[float, Align], ...] = ((left, "left"), (left + bar / 2, "center"), (left + bar, "right"))
    for (x, align), text in zip(places, (low, middle, high), strict=True):
        picture.text((x, top + 2.1 * size), text, size, align)
    for (x, align), text, room in zip(places, (ends[0], unit, ends[1]), (0.36, 0.26, 0.36), strict=True):
        shown, smaller = fitted(text, room * bar, size)
        picture.text((x, top + 3.4 * size), shown, smaller, align)

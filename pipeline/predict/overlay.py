"""The overlay of a slide: its thumbnail, beside it a score for each tile in colour, a legend, a scale bar and a title."""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..embed.qc import TEXT_COLOUR, draw_scale_bar

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


def paint_tiles(thumbnail: np.ndarray, raster: np.ndarray, limit: float, *, signed: bool) -> np.ndarray:
    """Paint a raster of scores over a thumbnail.

    Args:
        thumbnail: `(h, w, 3)` uint8 RGB, `Slide.thumbnail`.
        raster: `(h, w)` scores; NaN leaves the thumbnail as it is.
        limit: Magnitude at which the colours end.
        signed: Whether scores go from -limit to limit, or from 0.

    Returns:
        `(h, w, 3)` uint8 RGB.
    """
    from matplotlib import colormaps

    covered = ~np.isnan(raster)
    share = raster[covered] / limit
    colours = colormaps[SIGNED_MAP if signed else UNSIGNED_MAP](0.5 + share / 2 if signed else share)[:, :3] * 255
    grey = cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY)[covered][:, None]
    opacity = OPACITY[0] + (OPACITY[1] - OPACITY[0]) * np.abs(share).clip(0, 1)[:, None]
    painted = thumbnail.copy()
    painted[covered] = np.rint(opacity * colours + (1 - opacity) * grey).astype(np.uint8)
    return painted


def outline(
    picture: np.ndarray, raster: np.ndarray, limit: float, tissue: Sequence[np.ndarray], *, signed: bool
) -> np.ndarray:
    """Draw the tissue's contours, and around the strongest tiles lines in the colours of the map's ends.

    Args:
        picture: `(h, w, 3)` uint8 RGB.
        raster: `(h, w)` scores; NaN where there is no tile.
        limit: Magnitude at which the colours end.
        tissue: Rings `(n, 2)` of (x, y) in pixels of the picture.
        signed: Whether scores below 0 are outlined too.

    Returns:
        `(h, w, 3)` uint8 RGB, another picture.
    """
    drawn = picture.copy()
    width = max(1, round(max(drawn.shape[:2]) / CONTOUR_WIDTH))
    rings = [np.rint(ring).astype(np.int32) for ring in tissue]
    cv2.polylines(drawn, rings, isClosed=True, color=TEXT_COLOUR, thickness=width, lineType=cv2.LINE_AA)
    for sign, colour in ((1, FOR_COLOUR), (-1, AGAINST_COLOUR))[: 1 + signed]:
        strong = (np.nan_to_num(sign * raster) >= STRONG * limit).astype(np.uint8)
        around, _ = cv2.findContours(strong, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, around, -1, colour, 2 * width)
    return drawn


def draw_overlay(
    thumbnail: np.ndarray,
    raster: np.ndarray,
    *,
    title: str,
    mm_per_px: float | None,
    limit: float,
    ends: tuple[str, str],
    signed: bool = True,
    tissue: Sequence[np.ndarray] = (),
) -> Image.Image:
    """The thumbnail with outlines of tissue and of the strongest tiles, and beside it (below it, if it is wide) the painted
    one; above them a title, below them a scale bar and a legend.

    Args:
        thumbnail: `(h, w, 3)` uint8 RGB, `Slide.thumbnail`.
        raster: `(h, w)` scores from `tile_raster`.
        title: The slide and its prediction; a line may be broken with a newline.
        mm_per_px: Millimetres per pixel of the thumbnail; None leaves the scale bar out.
        limit: Magnitude at which the colours end.
        ends: What the low and the high end of the colours mean.
        signed: Whether scores go from -limit to limit, or from 0.
        tissue: Rings `(n, 2)` of the tissue's contours, (x, y) in pixels of the thumbnail.

    Returns:
        An RGB picture, at least 480 pixels wide; the two are centred in it, unscaled.
    """
    plain = outline(thumbnail, raster, limit, tissue, signed=signed)
    painted = outline(
        paint_tiles(thumbnail, raster, limit, signed=signed), np.full_like(raster, np.nan), limit, tissue, signed=signed
    )
    below_one_another = thumbnail.shape[1] > 1.5 * thumbnail.shape[0]
    gap = np.full_like(thumbnail[:GAP] if below_one_another else thumbnail[:, :GAP], 255)
    both = np.concatenate([plain, gap, painted], axis=0 if below_one_another else 1)
    height, width = both.shape[:2]
    canvas_width = max(width, 480)
    size = max(12, round(canvas_width / 70))  # to be read where the picture is as wide as a page
    title_font, lines = _fit(title, canvas_width - 2 * size, size)
    top = round((len(lines) * 1.35 + 0.8) * size)
    bottom = round(5.2 * size)
    canvas = Image.new("RGB", (canvas_width, top + height + bottom), "white")
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((size, (0.5 + 1.35 * number) * size), line, fill=TEXT_COLOUR, font=title_font)
    canvas.paste(Image.fromarray(both), ((canvas_width - width) // 2, top))
    below = top + height + round(0.9 * size)
    if mm_per_px is not None:
        draw_scale_bar(draw, (size, below + size), 0.3 * canvas_width, mm_per_px, size)
    _draw_legend(canvas, below, size, limit, ends, signed)
    return canvas


def _fit(text: str, width: float, size: int) -> tuple[ImageFont.ImageFont | ImageFont.FreeTypeFont, Sequence[str]]:
    """A font in which the longest line fits, as long as it can still be read; else the line is cut."""
    lines = text.split("\n")
    font = ImageFont.load_default(size)
    while size > 9 and max(font.getlength(line) for line in lines) > width:
        size -= 1
        font = ImageFont.load_default(size)
    for number, line in enumerate(lines):
        while font.getlength(line) > width and len(line) > 4:
            line = line.removesuffix("...")[:-1] + "..."
        lines[number] = line
    return font, lines


def _draw_legend(canvas: Image.Image, top: int, size: int, limit: float, ends: tuple[str, str], signed: bool) -> None:
    """A bar of the colours as they look over a middle grey, its ends named and numbered, at the right."""
    draw = ImageDraw.Draw(canvas)
    bar = round(0.5 * canvas.width)
    left = canvas.width - size - bar
    values = np.linspace(-limit if signed else 0, limit, bar)
    grey = np.full((size, bar, 3), 200, np.uint8)
    painted = paint_tiles(grey, np.broadcast_to(values, (size, bar)), limit, signed=signed)
    canvas.paste(Image.fromarray(painted), (left, top))
    numbers = ImageFont.load_default(max(10, round(0.85 * size)))
    below = top + round(1.25 * size)
    low, middle, high = (f"{-limit:.2g}", "0", f"+{limit:.2g}") if signed else ("0", "", f"{limit:.2g}")
    draw.text((left, below), low, fill=TEXT_COLOUR, font=numbers, anchor="la")
    draw.text((left + bar / 2, below), middle, fill=TEXT_COLOUR, font=numbers, anchor="ma")
    draw.text((left + bar, below), high, fill=TEXT_COLOUR, font=numbers, anchor="ra")
    below += round(1.2 * size)
    for text, x, anchor in ((ends[0], left, "la"), (ends[1], left + bar, "ra")):
        font, [line] = _fit(text, 0.48 * bar, size)
        draw.text((x, below), line, fill=TEXT_COLOUR, font=font, anchor=anchor)

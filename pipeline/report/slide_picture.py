"""Pictures of a slide: its pixels with outlines, text, a scale bar and a legend over and around them.

A picture is a list of images, lines and texts in pixels of its thumbnail. It is written as pixels, and as SVG and PDF, where
only the slide and the colours of scores are pixels. Not by matplotlib, which took four times as long, and embeds no JPEG: a
slide of a cohort in 5 MB instead of 1.
"""

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ...data.tissue.base import Tissue
from .picture_parts import FONT, TEXT_COLOUR, Align, Pen, Pixels, Shape, Text, font_file, text_width

POINTS_PER_PX = 0.72
"""A hundred pixels are an inch of a PDF."""

UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
"""Characters that XML forbids; a file name may have them."""

LEAST_TILE_PX = 6
"""Tiles that are smaller in the picture are outlined together."""


class SlidePicture:
    """A white picture to draw on.

    Args:
        width: In pixels.
        height: In pixels.
    """

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._drawn: list[Pixels | Text | Shape] = []

    def image(self, at: tuple[int, int], pixels: np.ndarray) -> "Panel":
        """Put pixels on it, unscaled.

        Args:
            at: (x, y) of the top left corner.
            pixels: `(h, w, 3)` or `(h, w, 4)` uint8.

        Returns:
            The place, to draw on in its own pixels.
        """
        self._drawn.append(Pixels(at, pixels))
        return Panel(self, at, (pixels.shape[1], pixels.shape[0]))

    def text(self, at: tuple[float, float], text: str, size: float, align: Align = "left") -> None:
        """Write a line whose letters stand on `at`; `size` is that of the font in pixels."""
        self._drawn.append(Text(at, UNWRITABLE.sub("\ufffd", text), size, align))

    def shape(self, lines: Iterable[np.ndarray], pen: Pen, clip: "Panel | None" = None) -> None:
        """Draw lines `(n, 2)` of (x, y), as one shape: rings within others are holes."""
        if given := [line for line in lines if len(line)]:
            box = (0, 0, self.width, self.height) if clip is None else (*clip.at, *clip.size)
            self._drawn.append(Shape(given, pen, box))

    def scale_bar(self, at: tuple[float, float], most_px: float, mm_per_px: float, size: float) -> None:
        """Draw a scale bar of a round length with its label to the right.

        Args:
            at: (x, y) of its bottom left corner.
            most_px: Longest it may be.
            mm_per_px: Millimetres per pixel of the picture.
            size: Size of the label's font in pixels.
        """
        x, y = at
        bar_mm = _round_length(most_px * mm_per_px)
        label = f"{bar_mm:g} mm" if bar_mm >= 0.1 else f"{bar_mm * 1000:g} µm"
        bar_px = bar_mm / mm_per_px
        height = max(2, size // 5)
        self.shape([_box(x, y - height, bar_px, height)], Pen(TEXT_COLOUR, filled=True, width=0))
        self.text((x + bar_px + size, y), label, size)

    def legend(self, at: tuple[float, float], width: float, entries: Sequence[tuple[Pen, str]], size: float) -> None:
        """Draw what each pen stands for, in rows of at most `width`; see `legend_rows`. What is longer is fitted."""
        left, top = at
        for number, row in enumerate(legend_rows(entries, width, size)):
            x, y = left, top + size * (1 + 1.6 * number)
            for pen, text in row:
                box = _box(x, y - 0.8 * size, 1.4 * size, 0.9 * size)
                self.shape([box, *([box[[0, 2]], box[[1, 3]]] if pen.crossed else [])], pen)
                self.text((x + 2 * size, y), *fitted(text, width - 2 * size, size))
                x += _entry_width(text, size)

    def pixels(self) -> Image.Image:
        """The picture as RGB."""
        canvas = np.full((self.height, self.width, 3), 255, np.uint8)
        for part in self._drawn:
            part.paint(canvas)
        return Image.fromarray(canvas)

    def svg(self) -> bytes:
        """The picture as SVG, whose text a drawing program can edit."""
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{self.width}" '
            f'height="{self.height}" viewBox="0 0 {self.width} {self.height}" '
            'font-family="DejaVu Sans, Verdana, sans-serif">',
            '<rect width="100%" height="100%" fill="#fff"/>',
        ]
        for number, part in enumerate(self._drawn):
            parts += part.svg(number)
        return "\n".join([*parts, "</svg>\n"]).encode()

    def pdf(self) -> bytes:
        """The picture as PDF, whose text a drawing program can edit."""
        from reportlab.pdfbase import pdfmetrics
        from reportlab.pdfbase.ttfonts import TTFont
        from reportlab.pdfgen.canvas import Canvas

        content = io.BytesIO()
        size = (self.width * POINTS_PER_PX, self.height * POINTS_PER_PX)
        canvas = Canvas(content, size, pageCompression=1, invariant=1, initialFontName="Helvetica")
        pdfmetrics.registerFont(TTFont(FONT, str(font_file())))
        canvas.scale(POINTS_PER_PX, POINTS_PER_PX)
        for part in self._drawn:
            part.pdf(canvas, self.height)
        canvas.save()
        return content.getvalue()


@dataclass(frozen=True)
class Panel:
    """A place of a picture that holds pixels; what is drawn on it ends at its edges.

    Attributes:
        picture: The picture.
        at: (x, y) of its top left corner.
        size: (width, height).
    """

    picture: SlidePicture
    at: tuple[int, int]
    size: tuple[int, int]

    def draw(self, rings: Iterable[np.ndarray], pen: Pen) -> None:
        """Draw lines `(n, 2)` of (x, y) in pixels of this place."""
        self.picture.shape([ring + np.array(self.at) for ring in rings], pen, self)

    def tiles(self, corners: np.ndarray, size: np.ndarray, pen: Pen) -> None:
        """Outline tiles: each, or where they are too small for that the area that they cover, filled if they are crossed.

        Args:
            corners: `(N, 2)` top left corners (x, y) in pixels of this place.
            size: (width, height) of a tile.
            pen: How.
        """
        if not len(corners):
            return
        if min(size) >= LEAST_TILE_PX:
            self.draw(tile_lines(corners, size, pen.crossed), pen)
            return
        covered = Tissue(covered_pixels(corners, size, self.size[::-1]), (1, 1), "")
        self.draw(closed_rings(covered), replace(pen, filled=pen.crossed))


def tile_lines(corners: np.ndarray, size: np.ndarray, crossed: bool = False) -> list[np.ndarray]:
    """The outlines of tiles; a line that several share, or that goes on in the next tile, is there once.

    Args:
        corners: `(N, 2)` top left corners (x, y).
        size: (width, height) of a tile.
        crossed: Whether the tiles' diagonals are wanted too.

    Returns:
        Lines `(2, 2)`.
    """
    lines: list[np.ndarray] = []
    far = corners + size
    for along in (0, 1):
        across = np.concatenate([corners[:, 1 - along], far[:, 1 - along]]).round(6)
        begin, end = np.tile(corners[:, along], 2).round(6), np.tile(far[:, along], 2).round(6)
        order = np.lexsort((begin, across))
        across, begin, end = across[order], begin[order], end[order]
        first = np.flatnonzero(np.r_[True, (across[1:] != across[:-1]) | (begin[1:] > end[:-1] + 1e-3)])
        points = np.empty((len(first), 2, 2))
        points[:, 0, along], points[:, 1, along] = begin[first], end[np.r_[first[1:] - 1, len(end) - 1]]
        points[:, :, 1 - along] = across[first, None]
        lines += [*points]
    if crossed:
        lines += [*np.stack([corners, far], 1)]
        lines += [*np.stack([np.c_[corners[:, 0], far[:, 1]], np.c_[far[:, 0], corners[:, 1]]], 1)]
    return lines


def covered_pixels(corners: np.ndarray, size: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The pixels that small tiles cover, each at least one.

    Args:
        corners: `(N, 2)` top left corners (x, y).
        size: (width, height) of a tile.
        shape: (height, width) of the raster.

    Returns:
        `(height, width)` bool.
    """
    covered = np.zeros(shape, bool)
    first = np.rint(corners).astype(int)
    last = np.maximum(np.rint(corners + size).astype(int), first + 1)
    for step in np.ndindex(*(last - first).max(0, initial=0)):
        x, y = (first + step).T
        inside = (first + step < last).all(1) & (x >= 0) & (y >= 0) & (x < shape[1]) & (y < shape[0])
        covered[y[inside], x[inside]] = True
    return covered


def closed_rings(tissue: Tissue) -> list[np.ndarray]:
    """Outlines and holes, `(n, 2)` each, that end where they begin."""
    return [np.r_[ring, ring[:1]] for polygon in tissue.contours for ring in polygon]


def legend_rows(entries: Sequence[tuple[Pen, str]], width: float, size: float) -> list[list[tuple[Pen, str]]]:
    """The entries of a legend in rows; a row takes 1.6 times the size of the font.

    Args:
        entries: What each pen stands for.
        width: Of the legend, in pixels.
        size: Of the font, in pixels.
    """
    rows: list[list[tuple[Pen, str]]] = []
    taken = width
    for entry in entries:
        needed = _entry_width(entry[1], size)
        if taken + needed > width or not rows:
            rows.append([])
            taken = 0
        rows[-1].append(entry)
        taken += needed
    return rows


def _entry_width(text: str, size: float) -> float:
    return 2 * size + text_width(text, size) + 1.6 * size


def fitted(text: str, width: float, size: float, least: float = 10.0) -> tuple[str, float]:
    """A line and the size of its font, in pixels, so that it fits: smaller, and where that were too small cut."""
    while size > least and text_width(text, size) > width:
        size = max(least, size - 1)
    while text_width(text, size) > width and len(text) > 4:
        text = text.removesuffix("…")[:-1] + "…"
    return text, size


def _box(x: float, y: float, width: float, height: float) -> np.ndarray:
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]])


def _round_length(length: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not above `length`."""
    power = 10.0 ** np.floor(np.log10(length))
    return float(max(step * power for step in (1, 2, 5) if step * power <= length * (1 + 1e-9)))

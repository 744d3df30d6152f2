"""Pictures of a slide: its pixels with outlines, text, a scale bar and a legend over and around them.

A picture is a list of images, lines and texts in pixels of its thumbnail. It is written as pixels, and as SVG and PDF, where
only the slide and the colours of scores are pixels. Not by matplotlib, which took four times as long, and embeds no JPEG: a
slide of a cohort in 5 MB instead of 1.
"""

import base64
import html
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...data.tissue.base import Tissue

if TYPE_CHECKING:
    from reportlab.pdfgen.canvas import Canvas
    from reportlab.pdfgen.pathobject import PDFPathObject

Colour = tuple[int, int, int]
Align = Literal["left", "center", "right"]

TEXT_COLOUR = (30, 30, 30)
HATCH_PX = 12
"""Pixels between the lines of a hatch."""

POINTS_PER_PX = 0.72
"""A hundred pixels are an inch of a PDF."""

LEAST_TILE_PX = 6
"""Tiles that are smaller in the picture are outlined together."""


@dataclass(frozen=True)
class Pen:
    """How something is drawn; what differs in colour differs in something else too.

    Attributes:
        colour: RGB.
        width: Of the line, in pixels; 0 for none.
        opacity: 0 to 1.
        dashed: Whether the line is.
        hatch: Angles in degrees of the lines within the shape.
        filled: Whether the colour fills the shape.
        crossed: Whether tiles are crossed out.
    """

    colour: Colour
    width: float = 1.0
    opacity: float = 1.0
    dashed: bool = False
    hatch: tuple[float, ...] = ()
    filled: bool = False
    crossed: bool = False

    @property
    def dash(self) -> tuple[float, float]:
        """Pixels of a dashed line that are drawn, and that are not."""
        return max(8.0, 4 * self.width), max(5.0, 2.5 * self.width)


@dataclass(frozen=True)
class _Pixels:
    at: tuple[int, int]
    pixels: np.ndarray

    @cached_property
    def encoded(self) -> tuple[str, bytes]:
        """As JPEG; what is transparent as PNG."""
        kind = "jpeg" if self.pixels.shape[2] == 3 else "png"
        content = io.BytesIO()
        Image.fromarray(self.pixels).save(content, kind, quality=88)
        return kind, content.getvalue()


@dataclass(frozen=True)
class _Text:
    at: tuple[float, float]
    text: str
    size: float
    align: Align


@dataclass(frozen=True)
class _Shape:
    lines: list[np.ndarray]  # (n, 2) each
    pen: Pen
    clip: tuple[int, int, int, int]  # x, y, width, height

    @cached_property
    def hatching(self) -> list[np.ndarray]:
        """The lines of the hatch, over the whole extent."""
        points = np.concatenate(self.lines)
        middle, radius = (points.min(0) + points.max(0)) / 2, np.linalg.norm(np.ptp(points, 0)) / 2
        found: list[np.ndarray] = []
        for angle in np.deg2rad(self.pen.hatch):
            along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
            first = np.ceil((middle @ across - radius) / HATCH_PX) * HATCH_PX  # shapes side by side share their lines
            for step in np.arange(first, middle @ across + radius, HATCH_PX):
                centre = middle + (step - middle @ across) * across
                found.append(np.array([centre - radius * along, centre + radius * along]))
        return found


class SlidePicture:
    """A white picture to draw on.

    Args:
        width: In pixels.
        height: In pixels.
    """

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._drawn: list[_Pixels | _Text | _Shape] = []

    def image(self, at: tuple[int, int], pixels: np.ndarray) -> "Panel":
        """Put pixels on it, unscaled.

        Args:
            at: (x, y) of the top left corner.
            pixels: `(h, w, 3)` or `(h, w, 4)` uint8.

        Returns:
            The place, to draw on in its own pixels.
        """
        self._drawn.append(_Pixels(at, pixels))
        return Panel(self, at, (pixels.shape[1], pixels.shape[0]))

    def text(self, at: tuple[float, float], text: str, size: float, align: Align = "left") -> None:
        """Write a line whose letters stand on `at`; `size` is that of the font in pixels."""
        self._drawn.append(_Text(at, text, size, align))

    def shape(self, lines: Iterable[np.ndarray], pen: Pen, clip: "Panel | None" = None) -> None:
        """Draw lines `(n, 2)` of (x, y), as one shape: rings within others are holes."""
        if given := [line for line in lines if len(line)]:
            box = (0, 0, self.width, self.height) if clip is None else (*clip.at, *clip.size)
            self._drawn.append(_Shape(given, pen, box))

    def scale_bar(self, at: tuple[float, float], most_px: float, mm_per_px: float, size: float) -> float:
        """Draw a scale bar of a round length with its label to the right.

        Args:
            at: (x, y) of its bottom left corner.
            most_px: Longest it may be.
            mm_per_px: Millimetres per pixel of the picture.
            size: Size of the label's font in pixels.

        Returns:
            x where the label ends.
        """
        x, y = at
        bar_mm = _round_length(most_px * mm_per_px)
        label = f"{bar_mm:g} mm" if bar_mm >= 0.1 else f"{bar_mm * 1000:g} µm"
        bar_px = bar_mm / mm_per_px
        height = max(2, size // 5)
        self.shape([_box(x, y - height, bar_px, height)], Pen(TEXT_COLOUR, filled=True, width=0))
        self.text((x + bar_px + size, y), label, size)
        return x + bar_px + size + text_width(label, size)

    def legend(self, at: tuple[float, float], width: float, entries: Sequence[tuple[Pen, str]], size: float) -> None:
        """Draw what each pen stands for, in rows of at most `width`; see `legend_rows`."""
        left, top = at
        for number, row in enumerate(legend_rows(entries, width, size)):
            x, y = left, top + size * (1 + 1.6 * number)
            for pen, text in row:
                box = _box(x, y - 0.8 * size, 1.4 * size, 0.9 * size)
                self.shape([box, *([box[[0, 2]], box[[1, 3]]] if pen.crossed else [])], pen)
                self.text((x + 2 * size, y), text, size)
                x += _entry_width(text, size)

    def pixels(self) -> Image.Image:
        """The picture as RGB."""
        canvas = np.full((self.height, self.width, 3), 255, np.uint8)
        for one in self._drawn:
            if isinstance(one, _Pixels):
                x, y = one.at
                place = canvas[y : y + one.pixels.shape[0], x : x + one.pixels.shape[1]]
                if one.pixels.shape[2] == 3:
                    place[:] = one.pixels
                else:
                    _blend(place, one.pixels[..., 3] / 255, one.pixels[..., :3])
            elif isinstance(one, _Shape):
                _paint(canvas, one)
            else:
                image = Image.fromarray(canvas)
                anchor = {"left": "ls", "center": "ms", "right": "rs"}[one.align]
                ImageDraw.Draw(image).text(one.at, one.text, fill=TEXT_COLOUR, font=_font(one.size), anchor=anchor)
                canvas = np.asarray(image).copy()
        return Image.fromarray(canvas)

    def svg(self) -> bytes:
        """The picture as SVG, whose text a drawing program can edit."""
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{self.width}" '
            f'height="{self.height}" viewBox="0 0 {self.width} {self.height}" '
            'font-family="DejaVu Sans, Verdana, sans-serif">',
            '<rect width="100%" height="100%" fill="#fff"/>',
        ]
        for number, one in enumerate(self._drawn):
            if isinstance(one, _Pixels):
                kind, content = one.encoded
                height, width = one.pixels.shape[:2]
                parts.append(
                    f'<image x="{one.at[0]}" y="{one.at[1]}" width="{width}" height="{height}" '
                    f'xlink:href="data:image/{kind};base64,{base64.b64encode(content).decode()}"/>'
                )
            elif isinstance(one, _Text):
                anchor = {"left": "start", "center": "middle", "right": "end"}[one.align]
                parts.append(
                    f'<text x="{one.at[0]:.2f}" y="{one.at[1]:.2f}" font-size="{one.size:g}" fill="{_hex(TEXT_COLOUR)}" '
                    f'text-anchor="{anchor}">{html.escape(one.text)}</text>'
                )
            else:
                parts += _svg_shape(one, number)
        return "\n".join([*parts, "</svg>\n"]).encode()

    def pdf(self) -> bytes:
        """The picture as PDF, whose text a drawing program can edit."""
        from reportlab.lib.utils import ImageReader
        from reportlab.pdfbase import pdfmetrics
        from reportlab.pdfbase.ttfonts import TTFont
        from reportlab.pdfgen.canvas import Canvas

        content = io.BytesIO()
        size = (self.width * POINTS_PER_PX, self.height * POINTS_PER_PX)
        canvas = Canvas(content, size, pageCompression=1, invariant=1, initialFontName="Helvetica")
        pdfmetrics.registerFont(TTFont("DejaVu Sans", str(_font_file())))
        canvas.scale(POINTS_PER_PX, POINTS_PER_PX)
        for one in self._drawn:
            if isinstance(one, _Pixels):
                height, width = one.pixels.shape[:2]
                image = ImageReader(io.BytesIO(one.encoded[1]))
                canvas.drawImage(image, one.at[0], self.height - one.at[1] - height, width, height, mask="auto")
            elif isinstance(one, _Text):
                canvas.setFont("DejaVu Sans", one.size)
                canvas.setFillColorRGB(*(value / 255 for value in TEXT_COLOUR), alpha=1)
                draw = {"left": "drawString", "center": "drawCentredString", "right": "drawRightString"}[one.align]
                getattr(canvas, draw)(one.at[0], self.height - one.at[1], one.text)
            else:
                _pdf_shape(canvas, one, self.height)
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


def text_width(text: str, size: float) -> float:
    """Width of a line in pixels, for a font of so many."""
    return _font(size).getlength(text)


def fitted(text: str, width: float, size: float, least: float = 10.0) -> tuple[str, float]:
    """A line and the size of its font, in pixels, so that it fits: smaller, and where that were too small cut."""
    while size > least and text_width(text, size) > width:
        size = max(least, size - 1)
    while text_width(text, size) > width and len(text) > 4:
        text = text.removesuffix("…")[:-1] + "…"
    return text, size


def _paint(canvas: np.ndarray, shape: _Shape) -> None:
    """Draw a shape in pixels."""
    x, y, width, height = shape.clip
    pen, place = shape.pen, canvas[y : y + height, x : x + width]

    def drawn(lines: Iterable[np.ndarray], fill: bool, thickness: float = 1) -> np.ndarray:
        mask = np.zeros(place.shape[:2], np.uint8)
        points = [np.rint(line - (x, y)).astype(np.int32) for line in lines]
        if fill:
            cv2.fillPoly(mask, points, 255)
        else:
            around = cv2.LINE_AA if thickness > 1 else cv2.LINE_8
            cv2.polylines(mask, points, isClosed=False, color=255, thickness=max(1, round(thickness)), lineType=around)
        return mask

    parts = [drawn(shape.lines, fill=True)] if pen.filled else []
    if pen.width:
        lines = [dash for line in shape.lines for dash in _dashes(line, pen.dash)] if pen.dashed else shape.lines
        parts.append(drawn(lines, False, pen.width))
    if pen.hatch:
        parts.append(np.minimum(drawn(shape.lines, fill=True), drawn(shape.hatching, False, pen.width)))
    _blend(place, np.maximum.reduce(parts) / 255 * pen.opacity, np.array(pen.colour))


def _blend(place: np.ndarray, opacity: np.ndarray, colour: np.ndarray) -> None:
    where = opacity > 0
    share = opacity[where][:, None]
    over = colour[where] if colour.ndim == 3 else colour
    place[where] = np.rint((1 - share) * place[where] + share * over).astype(np.uint8)


def _dashes(line: np.ndarray, dash: tuple[float, float]) -> Iterator[np.ndarray]:
    """The parts of a line that are drawn."""
    reached = np.r_[0, np.linalg.norm(np.diff(line, axis=0), axis=1).cumsum()]
    steps = np.arange(0, reached[-1], 1.0)
    points = np.stack([np.interp(steps, reached, line[:, axis]) for axis in (0, 1)], 1)
    for start in range(0, len(points), round(sum(dash))):
        yield points[start : start + round(dash[0])]


def _svg_shape(shape: _Shape, number: int) -> Iterator[str]:
    def path(lines: Iterable[np.ndarray]) -> str:
        return "".join("M" + "L".join(f"{x:.6g} {y:.6g}" for x, y in line.tolist()) for line in lines)

    x, y, width, height = shape.clip
    pen, colour = shape.pen, _hex(shape.pen.colour)
    stroke = f'stroke="{colour}" stroke-width="{pen.width:.3g}"'
    if pen.dashed:
        stroke += f' stroke-dasharray="{pen.dash[0]:g} {pen.dash[1]:g}"'
    fill = f'fill="{colour}" fill-rule="evenodd"' if pen.filled else 'fill="none"'
    yield f'<clipPath id="c{number}"><rect x="{x}" y="{y}" width="{width}" height="{height}"/></clipPath>'
    yield f'<g clip-path="url(#c{number})" opacity="{pen.opacity:g}"><path d="{path(shape.lines)}" {stroke} {fill}/>'
    if pen.hatch:
        yield f'<clipPath id="h{number}"><path d="{path(shape.lines)}" clip-rule="evenodd"/></clipPath>'
        yield f'<path d="{path(shape.hatching)}" {stroke} clip-path="url(#h{number})"/>'
    yield "</g>"


def _pdf_shape(canvas: "Canvas", shape: _Shape, page_height: int) -> None:
    def path(lines: Iterable[np.ndarray]) -> "PDFPathObject":
        drawn = canvas.beginPath()
        for line in lines:
            (x, y), *others = line.tolist()
            drawn.moveTo(x, page_height - y)
            for x, y in others:
                drawn.lineTo(x, page_height - y)
        return drawn

    x, y, width, height = shape.clip
    pen = shape.pen
    canvas.saveState()
    clip = canvas.beginPath()
    clip.rect(x, page_height - y - height, width, height)
    canvas.clipPath(clip, stroke=0)
    colour = tuple(value / 255 for value in pen.colour)
    canvas.setStrokeColorRGB(*colour, alpha=pen.opacity)
    canvas.setFillColorRGB(*colour, alpha=pen.opacity)
    canvas.setLineWidth(pen.width)
    if pen.dashed:
        canvas.setDash(pen.dash)
    even_odd = 0
    canvas.drawPath(path(shape.lines), stroke=int(pen.width > 0), fill=int(pen.filled), fillMode=even_odd)
    if pen.hatch:
        canvas.clipPath(path(shape.lines), stroke=0, fillMode=even_odd)
        canvas.drawPath(path(shape.hatching))
    canvas.restoreState()


@lru_cache
def _font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_file(), size)


@lru_cache
def _font_file() -> Path:
    """A font with the letters of most languages, which matplotlib brings along."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def _hex(colour: Colour) -> str:
    return "#" + "".join(f"{value:02x}" for value in colour)


def _box(x: float, y: float, width: float, height: float) -> np.ndarray:
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]])


def _round_length(length: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not above `length`."""
    power = 10.0 ** np.floor(np.log10(length))
    return float(max(step * power for step in (1, 2, 5) if step * power <= length * (1 + 1e-9)))

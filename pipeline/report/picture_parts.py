"""What a picture of a slide is made of: pixels, text and shapes, each drawn as pixels, as SVG and as PDF."""

import base64
import html
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from reportlab.pdfgen.canvas import Canvas
    from reportlab.pdfgen.pathobject import PDFPathObject

Colour = tuple[int, int, int]
Align = Literal["left", "center", "right"]

TEXT_COLOUR = (30, 30, 30)
FONT = "DejaVu Sans"
HATCH_PX = 12
"""Pixels between the lines of a hatch."""


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
class Pixels:
    """Pixels `(h, w, 3)`, or with opacity `(h, w, 4)`, whose top left corner is at `at`."""

    at: tuple[int, int]
    pixels: np.ndarray

    @cached_property
    def encoded(self) -> tuple[str, bytes]:
        """As JPEG; what is transparent as PNG."""
        kind = "jpeg" if self.pixels.shape[2] == 3 else "png"
        content = io.BytesIO()
        Image.fromarray(self.pixels).save(content, kind, quality=88)
        return kind, content.getvalue()

    def paint(self, canvas: np.ndarray) -> None:
        """Draw it on `(H, W, 3)` pixels."""
        x, y = self.at
        place = canvas[y : y + self.pixels.shape[0], x : x + self.pixels.shape[1]]
        if self.pixels.shape[2] == 3:
            place[:] = self.pixels
        else:
            _blend(place, self.pixels[..., 3] / 255, self.pixels[..., :3])

    def svg(self, number: int) -> Iterator[str]:
        """Its elements of an SVG, in which it is the part of that number."""
        kind, content = self.encoded
        height, width = self.pixels.shape[:2]
        yield (
            f'<image x="{self.at[0]}" y="{self.at[1]}" width="{width}" height="{height}" '
            f'xlink:href="data:image/{kind};base64,{base64.b64encode(content).decode()}"/>'
        )

    def pdf(self, canvas: "Canvas", page_height: int) -> None:
        """Draw it on a PDF, whose y goes up."""
        from reportlab.lib.utils import ImageReader

        height, width = self.pixels.shape[:2]
        image = ImageReader(io.BytesIO(self.encoded[1]))
        canvas.drawImage(image, self.at[0], page_height - self.at[1] - height, width, height, mask="auto")


@dataclass(frozen=True)
class Text:
    """A line whose letters stand on `at`; `size` is that of the font in pixels."""

    at: tuple[float, float]
    text: str
    size: float
    align: Align

    def paint(self, canvas: np.ndarray) -> None:
        """Draw it on `(H, W, 3)` pixels."""
        image = Image.fromarray(canvas)
        anchor = {"left": "ls", "center": "ms", "right": "rs"}[self.align]
        ImageDraw.Draw(image).text(self.at, self.text, fill=TEXT_COLOUR, font=_font(self.size), anchor=anchor)
        canvas[:] = np.asarray(image)

    def svg(self, number: int) -> Iterator[str]:
        """Its elements of an SVG, in which it is the part of that number."""
        anchor = {"left": "start", "center": "middle", "right": "end"}[self.align]
        yield (
            f'<text x="{self.at[0]:.2f}" y="{self.at[1]:.2f}" font-size="{self.size:g}" fill="{_hex(TEXT_COLOUR)}" '
            f'text-anchor="{anchor}">{html.escape(self.text)}</text>'
        )

    def pdf(self, canvas: "Canvas", page_height: int) -> None:
        """Draw it on a PDF, whose y goes up, and which has the font `FONT`."""
        canvas.setFont(FONT, self.size)
        canvas.setFillColorRGB(*(value / 255 for value in TEXT_COLOUR), alpha=1)
        draw = {"left": "drawString", "center": "drawCentredString", "right": "drawRightString"}[self.align]
        getattr(canvas, draw)(self.at[0], page_height - self.at[1], self.text)


@dataclass(frozen=True)
class Shape:
    """Lines `(n, 2)` each, drawn with a pen within `clip` (x, y, width, height); rings within others are holes."""

    lines: list[np.ndarray]
    pen: Pen
    clip: tuple[int, int, int, int]

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

    def paint(self, canvas: np.ndarray) -> None:
        """Draw it on `(H, W, 3)` pixels."""
        x, y, width, height = self.clip
        pen, place = self.pen, canvas[y : y + height, x : x + width]

        def drawn(lines: Iterable[np.ndarray], fill: bool, thickness: float = 1) -> np.ndarray:
            mask = np.zeros(place.shape[:2], np.uint8)
            points = [np.rint(line - (x, y)).astype(np.int32) for line in lines]
            if fill:
                cv2.fillPoly(mask, points, 255)
            else:
                around = cv2.LINE_AA if thickness > 1 else cv2.LINE_8
                cv2.polylines(
                    mask, points, isClosed=False, color=255, thickness=max(1, round(thickness)), lineType=around
                )
            return mask

        parts = [drawn(self.lines, fill=True)] if pen.filled else []
        if pen.width:
            lines = [dash for line in self.lines for dash in _dashes(line, pen.dash)] if pen.dashed else self.lines
            parts.append(drawn(lines, False, pen.width))
        if pen.hatch:
            parts.append(np.minimum(drawn(self.lines, fill=True), drawn(self.hatching, False, pen.width)))
        _blend(place, np.maximum.reduce(parts) / 255 * pen.opacity, np.array(pen.colour))

    def svg(self, number: int) -> Iterator[str]:
        """Its elements of an SVG, in which it is the part of that number."""

        def path(lines: Iterable[np.ndarray]) -> str:
            return "".join("M" + "L".join(f"{x:.6g} {y:.6g}" for x, y in line.tolist()) for line in lines)

        x, y, width, height = self.clip
        pen, colour = self.pen, _hex(self.pen.colour)
        stroke = f'stroke="{colour}" stroke-width="{pen.width:.3g}"'
        if pen.dashed:
            stroke += f' stroke-dasharray="{pen.dash[0]:g} {pen.dash[1]:g}"'
        fill = f'fill="{colour}" fill-rule="evenodd"' if pen.filled else 'fill="none"'
        yield f'<clipPath id="c{number}"><rect x="{x}" y="{y}" width="{width}" height="{height}"/></clipPath>'
        yield f'<g clip-path="url(#c{number})" opacity="{pen.opacity:g}"><path d="{path(self.lines)}" {stroke} {fill}/>'
        if pen.hatch:
            yield f'<clipPath id="h{number}"><path d="{path(self.lines)}" clip-rule="evenodd"/></clipPath>'
            yield f'<path d="{path(self.hatching)}" {stroke} clip-path="url(#h{number})"/>'
        yield "</g>"

    def pdf(self, canvas: "Canvas", page_height: int) -> None:
        """Draw it on a PDF, whose y goes up."""

        def path(lines: Iterable[np.ndarray]) -> "PDFPathObject":
            drawn = canvas.beginPath()
            for line in lines:
                (x, y), *others = line.tolist()
                drawn.moveTo(x, page_height - y)
                for x, y in others:
                    drawn.lineTo(x, page_height - y)
            return drawn

        x, y, width, height = self.clip
        pen = self.pen
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
        canvas.drawPath(path(self.lines), stroke=int(pen.width > 0), fill=int(pen.filled), fillMode=even_odd)
        if pen.hatch:
            canvas.clipPath(path(self.lines), stroke=0, fillMode=even_odd)
            canvas.drawPath(path(self.hatching))
        canvas.restoreState()


def text_width(text: str, size: float) -> float:
    """Width of a line in pixels, for a font of so many."""
    return _font(size).getlength(text)


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


@lru_cache
def _font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_file(), size)


@lru_cache
def font_file() -> Path:
    """A font with the letters of most languages, which matplotlib brings along."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def _hex(colour: Colour) -> str:
    return "#" + "".join(f"{value:02x}" for value in colour)

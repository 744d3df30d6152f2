"""The quality-control picture of a slide: thumbnail, tissue contours, tiles, what was left out, legend, scale bar."""

from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...data.slides.slide import Slide
from ...data.tiles.grid import Grid
from ...data.tissue.base import Tissue

Colour = tuple[int, int, int]

TILE_COLOUR = (0, 114, 178)
CONTOUR_COLOUR = (213, 94, 0)
BLURRED_COLOUR = (150, 20, 150)
UNREADABLE_COLOUR = (0, 0, 0)
LEFT_OUT_COLOURS = ((240, 190, 0), (0, 158, 115), (204, 60, 140), (86, 180, 233), (110, 110, 110))
TEXT_COLOUR = (30, 30, 30)


def draw_qc(
    slide: Slide,
    tissue: Tissue,
    grid: Grid | None,
    blur: np.ndarray | None = None,
    max_blur: float = 1.0,
    *,
    max_px: int = 1600,
) -> Image.Image:
    """Draw what is embedded and what was left out, in outlines that leave the stain to be seen.

    Args:
        slide: The open slide.
        tissue: Its tissue.
        grid: Its tile grid, or None when there is none (the picture then shows the tissue alone).
        blur: `(N,)` how blurred each tile of the grid is, NaN where it is unreadable; None before they are read.
        max_blur: Tiles more blurred than this were left out.
        max_px: Longest edge of the thumbnail.

    Returns:
        An RGB picture of the thumbnail's width with a strip of text below.
    """
    picture = slide.thumbnail(max_px).copy()
    height, width = picture.shape[:2]
    *origin, bounds_width, bounds_height = slide.bounds
    scale = np.array([width / bounds_width, height / bounds_height])
    legend: list[tuple[Colour, str]] = []
    if grid is not None:
        unreadable = np.zeros(len(grid.coords), bool) if blur is None else np.isnan(blur)
        blurred = np.zeros(len(grid.coords), bool) if blur is None else blur > max_blur
        for name, colour, where in (
            ("tiles", TILE_COLOUR, ~unreadable & ~blurred),
            ("too blurred, left out", BLURRED_COLOUR, blurred),
            ("unreadable, left out", UNREADABLE_COLOUR, unreadable),
        ):
            if where.any():
                _draw_tiles(
                    picture, grid.coords[where] - origin, grid.tile_size_level0, scale, colour, colour != TILE_COLOUR
                )
                legend.append((colour, f"{np.count_nonzero(where):,} {name}"))
    for number, (name, area) in enumerate(tissue.left_out_mm2(slide.mpp.value).items()):
        colour = LEFT_OUT_COLOURS[number % len(LEFT_OUT_COLOURS)]
        _hatch(picture, tissue, tissue.left_out[name], origin, scale, colour)
        legend.append((colour, f"{name}, left out: {area:.3g} mm2"))
    rings = [np.rint((ring - origin) * scale).astype(np.int32) for polygon in tissue.contours for ring in polygon]
    thickness = max(1, round(max(width, height) / 600))
    cv2.polylines(picture, rings, isClosed=True, color=CONTOUR_COLOUR, thickness=thickness, lineType=cv2.LINE_AA)
    legend.insert(0, (CONTOUR_COLOUR, f"tissue {tissue.area_mm2(slide.mpp.value):.4g} mm2"))

    facts = [slide.slide_id, f"{slide.mpp.value:.4g} um/px ({slide.mpp.source})"]
    if grid is not None:
        facts.append(f"tiles of {grid.tile_px} px at {grid.tile_mpp:g} um/px, level {grid.level}")
    return _with_caption(picture, "   ".join(facts), legend, mm_per_px=slide.mpp.value / 1000 / float(scale[0]))


def _draw_tiles(
    picture: np.ndarray, coords: np.ndarray, size: int, scale: np.ndarray, colour: Colour, crossed: bool
) -> None:
    """Outline tiles, each by itself; where they are too small for that, the area that they cover."""
    corners = np.rint(coords * scale).astype(np.int32)
    opposite = np.rint((coords + size) * scale).astype(np.int32)
    lines = np.zeros(picture.shape[:2], np.uint8)
    single = (opposite - corners).min() >= 6
    for (x0, y0), (x1, y1) in zip(corners.tolist(), opposite.tolist(), strict=True):
        cv2.rectangle(lines, (x0, y0), (x1, y1) if single else (x1 - 1, y1 - 1), 1, thickness=1 if single else -1)
        if single and crossed:
            cv2.line(lines, (x0, y0), (x1, y1), 1)
            cv2.line(lines, (x0, y1), (x1, y0), 1)
    if not single and not crossed:
        lines &= ~np.asarray(cv2.erode(lines, np.ones((3, 3), np.uint8), borderValue=0), np.uint8)
    share = 0.75 if crossed or not single else 0.55
    drawn = lines > 0
    picture[drawn] = np.rint((1 - share) * picture[drawn] + share * np.array(colour)).astype(np.uint8)


def _hatch(
    picture: np.ndarray, tissue: Tissue, mask: np.ndarray, origin: list[int], scale: np.ndarray, colour: Colour
) -> None:
    """Outline what was left out, and hatch it: an outline alone could be that of tissue."""
    height, width = picture.shape[:2]
    x, y = (np.array(tissue.origin) - origin) * scale
    sx, sy = np.array(tissue.downsample) * scale
    placed = cv2.warpAffine(
        mask.astype(np.uint8), np.array([[sx, 0, x], [0, sy, y]]), (width, height), flags=cv2.INTER_NEAREST
    )
    rows, columns = np.nonzero(placed)
    period = max(8, round(max(height, width) / 130))
    hatched = (rows + columns) % period == 0
    picture[rows[hatched], columns[hatched]] = colour
    outlines, _ = cv2.findContours(placed, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, outlines, -1, colour, max(1, round(max(width, height) / 900)))


def _with_caption(picture: np.ndarray, caption: str, legend: list[tuple[Colour, str]], mm_per_px: float) -> Image.Image:
    """The picture above a strip with a caption, and below that a scale bar and the legend."""
    height, width = picture.shape[:2]
    size = max(11, min(22, round(width / 60)))

    def fitting(text_width: Callable[[int], float], room: float) -> int:
        return next((smaller for smaller in range(size, 8, -1) if text_width(smaller) <= room), 8)

    strip = round(3.9 * size)
    canvas = Image.new("RGB", (width, height + strip), "white")
    canvas.paste(Image.fromarray(picture), (0, 0))
    draw = ImageDraw.Draw(canvas)
    caption_size = fitting(lambda s: draw.textlength(caption, font=ImageFont.load_default(s)), width - 2 * size)
    draw.text((size, height + 0.5 * size), caption, fill=TEXT_COLOUR, font=ImageFont.load_default(caption_size))
    bar_y = height + strip - round(0.9 * size)
    left = draw_scale_bar(draw, (size, bar_y), 0.25 * width, mm_per_px, size) + 2 * size

    def legend_width(s: int) -> float:
        return sum(3 * s + draw.textlength(text, font=ImageFont.load_default(s)) for _, text in legend)

    small = fitting(legend_width, width - left)
    for colour, text in legend:
        draw.rectangle((left, bar_y - small + 1, left + small - 1, bar_y), outline=colour, width=max(2, small // 5))
        draw.text((left + 1.5 * small, bar_y), text, fill=TEXT_COLOUR, font=ImageFont.load_default(small), anchor="ls")
        left += 3 * small + draw.textlength(text, font=ImageFont.load_default(small))
    return canvas


def draw_scale_bar(draw: ImageDraw.ImageDraw, at: tuple[int, int], max_px: float, mm_per_px: float, size: int) -> float:
    """Draw a scale bar of a round length with its label to the right.

    Args:
        draw: Where to.
        at: (x, y) of its bottom left corner.
        max_px: Longest it may be.
        mm_per_px: Millimetres per pixel of the picture.
        size: Size of the label's font.

    Returns:
        x where the label ends.
    """
    x, y = at
    bar_mm = _round_length(max_px * mm_per_px)
    label = f"{bar_mm:g} mm" if bar_mm >= 0.1 else f"{bar_mm * 1000:g} um"
    bar_px = round(bar_mm / mm_per_px)
    draw.rectangle((x, y - max(2, size // 6), x + bar_px, y), fill=TEXT_COLOUR)
    font = ImageFont.load_default(size)
    draw.text((x + size + bar_px, y), label, fill=TEXT_COLOUR, font=font, anchor="ls")
    return x + size + bar_px + draw.textlength(label, font=font)


def _round_length(length: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not above `length`."""
    power = 10.0 ** np.floor(np.log10(length))
    return float(max(step * power for step in (1, 2, 5) if step * power <= length * (1 + 1e-9)))

"""The quality-control picture of a slide: thumbnail, tissue contours, tile grid, scale bar."""

import io
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...data.slides.slide import Slide
from ...data.tiles.grid import Grid
from ...data.tissue.base import Tissue
from ...data.whole_file import write_whole

TILE_COLOUR = (0, 114, 178)
CONTOUR_COLOUR = (213, 94, 0)
TEXT_COLOUR = (30, 30, 30)


def draw_qc(slide: Slide, tissue: Tissue, grid: Grid | None, *, max_px: int = 1600) -> Image.Image:
    """Draw what will be embedded: tiles in blue, tissue contours in orange, facts and a scale bar below.

    Args:
        slide: The open slide.
        tissue: Its tissue.
        grid: Its tile grid, or None when there is none (the picture then shows the tissue alone).
        max_px: Longest edge of the thumbnail.

    Returns:
        An RGB picture of the thumbnail's width with a strip of text below.
    """
    picture = slide.thumbnail(max_px).copy()
    height, width = picture.shape[:2]
    scale = np.array([width / slide.dimensions[0], height / slide.dimensions[1]])
    if grid is not None and len(grid.coords):
        picture = _draw_tiles(picture, grid, scale)
    rings = [np.rint(ring * scale).astype(np.int32) for polygon in tissue.contours for ring in polygon]
    thickness = max(1, round(max(width, height) / 600))
    cv2.polylines(picture, rings, isClosed=True, color=CONTOUR_COLOUR, thickness=thickness, lineType=cv2.LINE_AA)

    facts = [slide.slide_id, f"{slide.mpp.value:.4g} um/px ({slide.mpp.source})"]
    facts.append(f"tissue {tissue.area_mm2(slide.mpp.value):.4g} mm2")
    if grid is not None:
        facts.append(f"{len(grid.coords):,} tiles of {grid.tile_px} px at {grid.tile_mpp:g} um/px, level {grid.level}")
    return _with_caption(picture, "   ".join(facts), mm_per_px=slide.mpp.value / 1000 / float(scale[0]))


def save_qc(path: Path, picture: Image.Image) -> None:
    """Save a picture as JPEG; it appears under its name only when complete."""
    content = io.BytesIO()  # Pillow does not notice a file that it wrote only half, on a full disk
    picture.save(content, format="JPEG", quality=88)
    write_whole(path, content.getbuffer())


def _draw_tiles(picture: np.ndarray, grid: Grid, scale: np.ndarray) -> np.ndarray:
    corners = np.rint(grid.coords * scale).astype(np.int32)
    opposite = np.rint((grid.coords + grid.tile_size_level0) * scale).astype(np.int32)
    fill = picture.copy()
    for (x0, y0), (x1, y1) in zip(corners.tolist(), opposite.tolist(), strict=True):
        cv2.rectangle(fill, (x0, y0), (x1 - 1, y1 - 1), TILE_COLOUR, thickness=-1)
    picture = cv2.addWeighted(picture, 0.78, fill, 0.22, 0)
    if (opposite - corners).min() >= 6:  # smaller tiles would be all outline
        for (x0, y0), (x1, y1) in zip(corners.tolist(), opposite.tolist(), strict=True):
            cv2.rectangle(picture, (x0, y0), (x1, y1), TILE_COLOUR, thickness=1)
    return picture


def _with_caption(picture: np.ndarray, caption: str, mm_per_px: float) -> Image.Image:
    height, width = picture.shape[:2]
    size = max(11, min(22, round(width / 60)))
    font = ImageFont.load_default(size)

    strip = round(3.9 * size)
    canvas = Image.new("RGB", (width, height + strip), "white")
    canvas.paste(Image.fromarray(picture), (0, 0))
    draw = ImageDraw.Draw(canvas)
    while size > 8 and draw.textlength(caption, font=font) > width - 2 * size:
        size -= 1
        font = ImageFont.load_default(size)
    draw.text((size, height + 0.5 * size), caption, fill=TEXT_COLOUR, font=font)
    bar_y = height + strip - round(0.9 * size)
    draw_scale_bar(draw, (size, bar_y), 0.25 * width, mm_per_px, size)
    return canvas


def draw_scale_bar(draw: ImageDraw.ImageDraw, at: tuple[int, int], max_px: float, mm_per_px: float, size: int) -> None:
    """Draw a scale bar of a round length with its label to the right.

    Args:
        draw: Where to.
        at: (x, y) of its bottom left corner.
        max_px: Longest it may be.
        mm_per_px: Millimetres per pixel of the picture.
        size: Size of the label's font.
    """
    x, y = at
    bar_mm = _round_length(max_px * mm_per_px)
    label = f"{bar_mm:g} mm" if bar_mm >= 0.1 else f"{bar_mm * 1000:g} um"
    bar_px = round(bar_mm / mm_per_px)
    draw.rectangle((x, y - max(2, size // 6), x + bar_px, y), fill=TEXT_COLOUR)
    draw.text((x + size + bar_px, y), label, fill=TEXT_COLOUR, font=ImageFont.load_default(size), anchor="ls")


def _round_length(length: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not above `length`."""
    power = 10.0 ** np.floor(np.log10(length))
    return float(max(step * power for step in (1, 2, 5) if step * power <= length * (1 + 1e-9)))

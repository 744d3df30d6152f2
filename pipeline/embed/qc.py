"""The quality-control picture of a slide: thumbnail, tissue contours, tiles, what was left out, legend, scale bar."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...data.slides.slide import Slide
from ...data.table import csv_of
from ...data.tiles.grid import Grid
from ...data.tissue.base import Tissue
from ...data.whole_file import write_picture, write_whole
from ...plurals import count
from ..report.picture_parts import Pen
from ..report.slide_picture import SlidePicture, closed_rings, fitted, legend_rows

FIGURES = "figures"
"""The folder of the pictures as SVG and PDF, beside them."""

CONTOUR_COLOUR = (213, 94, 0)
TILES = Pen((0, 114, 178), opacity=0.55)
BLURRED = Pen((150, 20, 150), 1.5, 0.85, crossed=True)
UNREADABLE = Pen((0, 0, 0), 1.5, 0.85, crossed=True)
LEFT_OUT = (
    ((240, 190, 0), (45,)),
    ((0, 158, 115), (-45,)),
    ((204, 60, 140), (90,)),
    ((86, 180, 233), (0,)),
    ((110, 110, 110), (45, -45)),
)
"""Colour, and angles of the hatch, of what was left out: an outline alone could be that of tissue."""


@dataclass(frozen=True)
class QcPicture:
    """The picture of a slide, and what is drawn.

    Attributes:
        picture: The picture.
        tiles: A row a tile: x and y of its corner and its edge in level-0 pixels, and what became of it.
        areas: Tissue, and what was left out, as GeoJSON in level-0 pixels.
    """

    picture: SlidePicture
    tiles: list[dict[str, Any]]
    areas: str

    def save(self, path: Path) -> None:
        """Write the picture as JPEG, and `figures/<name>` beside it as SVG, PDF, CSV of the tiles and GeoJSON of the areas.

        Args:
            path: The JPEG; each file appears under its name only when complete.

        Raises:
            LongslideError: A file cannot be written.
        """
        _, svg, pdf, table, areas = qc_files(path)
        svg.parent.mkdir(parents=True, exist_ok=True)
        write_picture(path, self.picture.pixels())
        write_whole(svg, self.picture.svg())
        write_whole(pdf, self.picture.pdf())
        write_whole(table, csv_of(["x", "y", "edge", "state"], self.tiles))
        write_whole(areas, self.areas.encode())


def qc_files(path: Path) -> tuple[Path, ...]:
    """The JPEG of a quality-control picture, and its SVG, PDF, CSV and GeoJSON."""
    figure = path.parent / FIGURES / path.stem
    return path, *(figure.with_name(f"{figure.name}{suffix}") for suffix in (".svg", ".pdf", ".csv", ".geojson"))


def draw_qc(
    slide: Slide,
    tissue: Tissue,
    grid: Grid | None,
    blur: np.ndarray | None = None,
    max_blur: float = 1.0,
    *,
    max_px: int = 1600,
) -> QcPicture:
    """Draw what is embedded and what was left out, in outlines that leave the stain to be seen.

    Args:
        slide: The open slide.
        tissue: Its tissue.
        grid: Its tile grid, or None when there is none (the picture then shows the tissue alone).
        blur: `(N,)` how blurred each tile of the grid is, NaN where it is unreadable; None before they are read.
        max_blur: Tiles more blurred than this were left out.
        max_px: Longest edge of the thumbnail.

    Returns:
        A picture of the thumbnail's width, with a strip of text below.
    """
    thumbnail = slide.thumbnail(max_px)
    height, width = thumbnail.shape[:2]
    *origin, bounds_width, bounds_height = slide.bounds
    scale = np.array([width / bounds_width, height / bounds_height])
    thin, thick = max(1, max(width, height) / 900), max(1, max(width, height) / 600)

    kinds = [] if grid is None else list(_kinds_of_tiles(grid, blur, max_blur))
    legend = [(kind.pen, kind.text) for kind in kinds]
    areas: list[tuple[Tissue, Pen]] = []
    found = json.loads(tissue.to_geojson())
    for number, (name, mm2) in enumerate(tissue.left_out_mm2(slide.mpp.value).items()):
        colour, hatch = LEFT_OUT[number % len(LEFT_OUT)]
        pen = Pen(colour, thin, hatch=hatch)
        there = Tissue(tissue.left_out[name], tissue.downsample, tissue.method, tissue.origin)
        areas.append((there, pen))
        legend.append((pen, f"{name}, left out: {mm2:.3g} mm²"))
        found["features"] += json.loads(there.to_geojson(f"{name}, left out", colour))["features"]
    pen = Pen(CONTOUR_COLOUR, thick)
    areas.append((tissue, pen))
    legend.insert(0, (pen, f"tissue: {tissue.area_mm2(slide.mpp.value):.4g} mm²"))

    facts = [slide.slide_id, f"{slide.mpp.value:.4g} µm/px ({slide.mpp.source})"]
    if grid is not None:
        facts.append(f"tiles of {grid.tile_px} px at {grid.tile_mpp:g} µm/px, level {grid.level}")
    size = max(11, min(22, round(width / 60)))
    canvas_width = max(width, 320)
    room = canvas_width - 2 * size
    picture = SlidePicture(canvas_width, height + round((4.2 + 1.6 * len(legend_rows(legend, room, size))) * size))
    panel = picture.image((0, 0), thumbnail)
    for kind in kinds:
        panel.tiles((kind.coords - origin) * scale, kind.edge * scale, kind.pen)
    for area, pen in areas:
        panel.draw([(ring - origin) * scale for ring in closed_rings(area)], pen)
    picture.text((size, height + 1.5 * size), *fitted(", ".join(facts), room, size))
    mm_per_px = slide.mpp.value / 1000 / float(scale[0])
    picture.scale_bar((size, height + 3.2 * size), 0.25 * width, mm_per_px, size)
    picture.legend((size, height + 3.7 * size), room, legend, size)
    return QcPicture(picture, [row for kind in kinds for row in kind.rows()], json.dumps(found))


class _Tiles(NamedTuple):
    """Tiles of which the same became: in a word, in words with their number, how they are drawn, where they are."""

    state: str
    text: str
    pen: Pen
    coords: np.ndarray
    edge: int

    def rows(self) -> Iterator[dict[str, Any]]:
        for x, y in self.coords.tolist():
            yield {"x": x, "y": y, "edge": self.edge, "state": self.state}


def _kinds_of_tiles(grid: Grid, blur: np.ndarray | None, max_blur: float) -> Iterator[_Tiles]:
    unreadable = np.zeros(len(grid.coords), bool) if blur is None else np.isnan(blur)
    blurred = np.zeros(len(grid.coords), bool) if blur is None else blur > max_blur
    for state, pen, where in (
        ("tile", TILES, ~unreadable & ~blurred),
        ("too blurred", BLURRED, blurred),
        ("unreadable", UNREADABLE, unreadable),
    ):
        if number := int(np.count_nonzero(where)):
            text = f"{number:,} {state}, left out" if pen.crossed else count(number, state)
            yield _Tiles(state, text, pen, grid.coords[where], grid.tile_size_level0)

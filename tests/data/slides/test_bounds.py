"""Small tissue on a huge canvas: what is found, drawn and embedded is that of the scanned area alone."""

from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile
from longslide import embed, open_slide, read_features
from longslide.data.synthetic import write_pyramid, write_synthetic_slide
from longslide.data.tiles.grid import make_grid
from longslide.pipeline.embed.qc import CONTOUR_COLOUR, draw_qc
from longslide.pipeline.predict.overlay import tile_raster
from longslide.pipeline.view import pictures
from longslide.pipeline.view.pictures import TILE_PX, SlideFile, finest_level
from PIL import Image

AT, CANVAS = (30_720, 89_600), (52_000, 150_000)  # whole tiles from the corner, so that both grids meet


NAMESPACE = "http://www.leica-microsystems.com/scn/2010/10/01"


def write_scn(
    path: Path, area: np.ndarray, at: tuple[int, int], canvas: tuple[int, int], mpp: float = 0.5, levels: int = 3
) -> Path:
    """Write a Leica SCN file: a scanned area somewhere on the canvas of a glass slide.

    Args:
        path: Where to.
        area: `(h, w, 3)` uint8, what was scanned.
        at: (x, y) of its corner on the canvas, in pixels.
        canvas: (width, height) of the canvas in pixels.
        mpp: Microns per pixel.
        levels: Levels of the pyramid, each a quarter of the one before.
    """
    height, width = area.shape[:2]
    nanometres = round(1000 * mpp)
    pyramid = [cv2.resize(area, None, fx=4**-r, fy=4**-r, interpolation=cv2.INTER_AREA) for r in range(levels)]
    dimensions = "".join(
        f'<dimension sizeX="{level.shape[1]}" sizeY="{level.shape[0]}" r="{r}" ifd="{r}" />'
        for r, level in enumerate(pyramid)
    )
    description = (
        f'<?xml version="1.0" encoding="utf-8"?><scn xmlns="{NAMESPACE}"><collection name="a" uuid="1" '
        f'sizeX="{canvas[0] * nanometres}" sizeY="{canvas[1] * nanometres}"><barcode></barcode>'
        f'<image name="image" uuid="2"><creationDate>2026-01-01</creationDate><device model="Leica SCN400" version="1" />'
        f'<pixels sizeX="{width}" sizeY="{height}">{dimensions}</pixels>'
        f'<view sizeX="{width * nanometres}" sizeY="{height * nanometres}" offsetX="{at[0] * nanometres}" '
        f'offsetY="{at[1] * nanometres}" spacingZ="0" /><scanSettings><objectiveSettings><objective>20</objective>'
        "</objectiveSettings><illuminationSettings><numericalAperture>0.4</numericalAperture>"
        "<illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings></image>"
        "</collection></scn>"
    )
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for number, level in enumerate(pyramid):
            file.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                compression="zlib",
                description=description if number == 0 else None,
                metadata=None,
                resolution=(1e4 / mpp, 1e4 / mpp),
                resolutionunit="CENTIMETER",
            )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`area.svs`, 1.5 x 1 mm, and `canvas.scn`, the same pixels on the canvas of a glass slide of 26 x 75 mm."""
    folder = tmp_path_factory.mktemp("bounds")
    write_synthetic_slide(folder / "area.svs", size=(3072, 2048), seed=3)
    with openslide.OpenSlide(folder / "area.svs") as slide:
        pixels = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    write_pyramid(folder / "area.svs", pixels, mpp=0.5, downsample=4)
    write_scn(folder / "canvas.scn", pixels, AT, CANVAS)
    return folder


def test_the_bounds_are_those_of_the_file_or_the_whole_slide(folder: Path) -> None:
    with open_slide(folder / "canvas.scn") as slide:
        assert slide.dimensions == CANVAS
        assert slide.bounds == (*AT, 3072, 2048)
    with open_slide(folder / "area.svs") as slide:
        assert slide.bounds == (0, 0, 3072, 2048)


def test_bounds_that_cannot_be_meant_are_not_followed(folder: Path) -> None:
    for wrong in ("-5", "many", "60000"):
        with open_slide(folder / "canvas.scn") as slide:
            slide.properties = {**slide.properties, "openslide.bounds-x": wrong}
            x, y, width, height = slide.bounds
            assert x >= 0
            assert y >= 0
            assert 0 < x + width <= CANVAS[0]
            assert 0 < y + height <= CANVAS[1]


def test_the_thumbnail_shows_the_scanned_area(folder: Path) -> None:
    with open_slide(folder / "canvas.scn") as canvas, open_slide(folder / "area.svs") as area:
        for max_px in (300, 768, 2048):
            one, other = canvas.thumbnail(max_px), area.thumbnail(max_px)
            assert one.shape == other.shape
            assert np.abs(one.astype(int) - other).mean() < 0.5  # levels of a canvas begin between pixels


def test_tissue_tiles_and_area_are_those_of_the_scanned_area_alone(folder: Path) -> None:
    with open_slide(folder / "canvas.scn") as canvas, open_slide(folder / "area.svs") as area:
        found, wanted = canvas.tissue(), area.tissue()
        assert found.mask.shape == wanted.mask.shape
        assert found.origin == AT
        assert (found.mask != wanted.mask).mean() < 0.005
        assert found.area_mm2(0.5) == pytest.approx(wanted.area_mm2(0.5), rel=0.01)
        for polygon in found.contours:
            for ring in polygon:
                assert (ring >= np.subtract(AT, 1)).all()
                assert (ring <= np.add(AT, (3073, 2049))).all()
        one, other = make_grid(canvas, found), make_grid(area, wanted)
        ours = {tuple(xy) for xy in one.coords.tolist()}
        theirs = {tuple(xy) for xy in (other.coords + AT).tolist()}
        assert len(ours ^ theirs) <= 0.05 * len(theirs)
        assert len(ours & theirs) > 20


@pytest.mark.slow
def test_the_mask_has_ten_microns_a_pixel_also_where_the_slide_is_long(folder: Path) -> None:
    with open_slide(folder / "canvas.scn") as slide:
        slide.properties = {key: value for key, value in slide.properties.items() if "bounds" not in key}
        tissue = slide.tissue()  # 75 x 26 mm; an edge of 4096 px at most would be 18 um a pixel
        assert max(tissue.downsample) * 0.5 < 11
        assert tissue.mask.size <= 4096**2 * 1.01


@pytest.mark.slow
def test_embed_keeps_level_0_coordinates_and_gives_the_embeddings_of_the_area(folder: Path, tmp_path: Path) -> None:
    results = embed(
        [folder / "canvas.scn", folder / "area.svs"], tmp_path, "vit_tiny_patch16_224", "random", tile_px=256
    )
    assert [result.status for result in results] == ["done", "done"]
    canvas, area = read_features(tmp_path / "canvas.h5"), read_features(tmp_path / "area.h5")
    assert canvas.level0_size == CANVAS
    where = {tuple(xy): n for n, xy in enumerate((area.coords + AT).tolist())}
    pairs = [(n, where[tuple(xy)]) for n, xy in enumerate(canvas.coords.tolist()) if tuple(xy) in where]
    assert len(pairs) > 20
    ours, theirs = map(list, zip(*pairs, strict=True))
    np.testing.assert_array_equal(canvas.features[ours], area.features[theirs])
    with Image.open(tmp_path / "qc" / "canvas.jpg") as one, Image.open(tmp_path / "qc" / "area.jpg") as other:
        assert one.size == other.size, "the picture shows the area, not the canvas"


def test_contours_and_tiles_are_drawn_where_the_tissue_is(folder: Path) -> None:
    pictures = []
    for name in ("canvas.scn", "area.svs"):
        with open_slide(folder / name) as slide:
            tissue = slide.tissue()
            drawn = draw_qc(slide, tissue, make_grid(slide, tissue), max_px=600).picture.pixels()
            pictures.append(np.asarray(drawn)[:400].astype(int))
    contours = [(np.abs(picture - CONTOUR_COLOUR).max(-1) < 60) for picture in pictures]
    assert contours[1].sum() > 300
    assert (contours[0] & contours[1]).sum() > 0.8 * contours[1].sum()


def test_scores_are_painted_over_the_scanned_area(folder: Path) -> None:
    with open_slide(folder / "canvas.scn") as slide:
        coords = np.array([AT, (AT[0] + 2816, AT[1] + 1792), (0, 0)])
        raster = tile_raster(coords, 256, np.array([1.0, 2.0, 9.0]), slide.bounds, (768, 512))
    expected = np.full((512, 768), np.nan)
    expected[:64, :64], expected[448:, 704:] = 1, 2  # and the tile at the canvas's corner is not shown
    np.testing.assert_array_equal(raster, expected)


@pytest.mark.parametrize("halvings", [6, 0])  # cut from the overview; read from the file
def test_the_viewer_shows_the_scanned_area_at_its_place(folder: Path, halvings: int) -> None:
    downsample = 2**halvings
    column, row = (edge // downsample // TILE_PX for edge in AT)
    left, top = AT[0] // downsample - column * TILE_PX, AT[1] // downsample - row * TILE_PX
    tile = pictures.tile(SlideFile(folder / "canvas.scn"), finest_level(CANVAS) - halvings, column, row)
    pictures.close_all()
    assert tile is not None
    pixels = simplejpeg.decode_jpeg(tile).astype(int)
    with open_slide(folder / "area.svs") as slide:
        area = slide.thumbnail(max(slide.dimensions) // downsample).astype(int)
    height, width = min(TILE_PX - top, area.shape[0]), min(TILE_PX - left, area.shape[1])
    assert np.abs(pixels[top : top + height, left : left + width] - area[:height, :width]).mean() < 6
    if halvings:
        assert (pixels[: top - 8] > 245).all(), "around it is glass"
        assert (pixels[:, : left - 8] > 245).all()

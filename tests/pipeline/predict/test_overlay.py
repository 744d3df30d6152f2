"""The overlay lights up the tile that is meant, in colours whose steps look alike to everyone."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from longslide import open_slide
from longslide.data.synthetic import write_pyramid
from longslide.data.tiles.grid import make_grid
from longslide.data.tiles.stream import TileStream
from longslide.data.tissue.base import Tissue
from longslide.data.tissue.optical_density import find_tissue
from longslide.pipeline.predict.overlay import (
    AGAINST_COLOUR,
    FOR_COLOUR,
    SIGNED_MAP,
    UNSIGNED_MAP,
    draw_overlay,
    paint_tiles,
    score_limit,
    tile_raster,
)
from matplotlib import colormaps


@pytest.mark.parametrize("overlap", [0, 16])
@pytest.mark.parametrize(("slide_mpp", "tile_mpp"), [(0.25, 0.25), (0.25, 0.5), (0.5, 0.5), (0.265, 0.5)])
def test_one_marked_tile_lights_up_where_the_thumbnail_shows_it_and_nowhere_else(
    tmp_path: Path, slide_mpp: float, tile_mpp: float, overlap: int
) -> None:
    tile = round(64 * tile_mpp / slide_mpp)
    step = round(tile * (64 - overlap) / 64)
    x, y = 5 * step, 3 * step
    picture = np.full((1100, 1500, 3), 240, np.uint8)
    picture[y : y + tile, x : x + tile] = 10
    write_pyramid(tmp_path / "marked.svs", picture, mpp=slide_mpp)
    with open_slide(tmp_path / "marked.svs") as slide:
        everywhere = Tissue(np.ones((11, 15), bool), (100, 100), "all")
        grid = make_grid(slide, everywhere, tile_mpp=tile_mpp, tile_px=64, overlap=overlap)
        scores = np.zeros(len(grid.coords))
        for batch in TileStream(slide, grid):
            scores[batch.index] = batch.tiles.mean((1, 2, 3)) < 20  # the marked tile alone is all dark
        thumbnail = slide.thumbnail(700)
    assert scores.sum() == 1
    height, width = thumbnail.shape[:2]
    raster = tile_raster(grid.coords, grid.tile_size_level0, scores, (0, 0, 1500, 1100), (width, height))

    dark = thumbnail[..., 0] < 125
    certain = cv2.erode(dark.astype(np.uint8), np.ones((3, 3))).astype(bool)
    near = cv2.dilate(dark.astype(np.uint8), np.ones((3, 3))).astype(bool)
    lit = np.nan_to_num(raster) > 0
    assert lit[certain].all()
    assert not lit[~near].any()
    centre = round((y + tile / 2) * height / 1100), round((x + tile / 2) * width / 1500)
    assert raster[centre] == 1, "its middle belongs to no other tile"
    painted = paint_tiles(thumbnail, raster, 1.0, signed=True)
    red = painted[..., 0].astype(int) - painted[..., 2] > 60
    if not overlap:
        assert red[certain].all()
    assert not red[~near].any()


def test_overlapping_tiles_show_their_mean_and_neighbours_leave_no_gap() -> None:
    coords = np.array([[0, 0], [30, 0], [60, 0]])
    raster = tile_raster(coords, 40, np.array([1.0, 3.0, 5.0]), (0, 0, 100, 40), (100, 40))
    assert raster[0, [0, 29, 30, 39, 40, 59, 60, 69, 70, 99]].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    odd = tile_raster(np.stack([np.arange(0, 90, 7), np.zeros(13, int)], 1), 7, np.ones(13), (0, 0, 91, 7), (37, 3))
    assert not np.isnan(odd).any()


def test_a_tile_smaller_than_a_pixel_still_shows() -> None:
    raster = tile_raster(np.array([[4003, 2001]]), 2, np.array([7.0]), (0, 0, 10_000, 10_000), (100, 100))
    assert raster[20, 40] == 7
    assert np.isnan(raster).sum() == 9_999
    last = tile_raster(np.array([[9_998, 9_998]]), 2, np.array([7.0]), (0, 0, 10_000, 10_000), (100, 100))
    assert last[99, 99] == 7


@pytest.mark.parametrize("name", [SIGNED_MAP, UNSIGNED_MAP])
def test_steps_of_the_colour_map_look_alike(name: str) -> None:
    colours = colormaps[name](np.linspace(0, 1, 33))[None, :, :3].astype(np.float32)
    steps = np.linalg.norm(np.diff(cv2.cvtColor(colours, cv2.COLOR_RGB2Lab)[0], axis=0), axis=1)
    # CIELAB is near to, but not, the space these maps are even in; of a rainbow the largest is three times the mean.
    assert steps.min() > 0.4 * steps.mean()
    assert steps.max() < 1.7 * steps.mean()


@pytest.mark.parametrize(
    "seen",  # linear RGB as seen without red, green or blue cones (https://doi.org/10.1109/TVCG.2009.113)
    [
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ],
)
def test_for_and_against_differ_for_every_kind_of_colour_vision(seen: list[list[float]]) -> None:
    colours = colormaps[SIGNED_MAP](np.linspace(0, 1, 33))[:, :3]
    linear = np.clip(
        np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4) @ np.transpose(seen), 0, 1
    )
    shown = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)[None].astype(np.float32)
    lab = cv2.cvtColor(shown, cv2.COLOR_RGB2Lab)[0]
    for step in range(13):  # the same magnitude on either side, but for the lightest quarter
        assert np.linalg.norm(lab[step] - lab[32 - step]) > 20, "20 apart is plain to see"


def test_the_limit_is_the_99th_percentile_and_never_zero() -> None:
    assert score_limit(np.linspace(-1, 1, 2001)) == pytest.approx(0.99, abs=2e-3)
    assert score_limit(np.array([0.0, -3.0, 1.0])) == 3
    marked = np.zeros(5000)
    marked[17] = 0.25
    assert score_limit(marked) == 0.25
    assert score_limit(np.zeros(5)) == 1
    assert score_limit(np.zeros(0)) == 1


@pytest.mark.parametrize("size", [(60, 1200), (1400, 500), (300, 300)])
def test_the_thumbnail_is_in_the_overlay_twice_unscaled_with_title_and_legend_around_it(size: tuple[int, int]) -> None:
    thumbnail = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    raster = np.full(size, np.nan)
    picture = np.asarray(
        draw_overlay(
            thumbnail,
            raster,
            title="a very long name of a slide " * 12 + "\ntumour 0.93",
            mm_per_px=0.002,
            limit=1.0,
            ends=("against a class with a name as long as can be " * 3, "for it"),
        ).pixels()
    )
    first = (picture[:, :, None] == thumbnail[0, 0]).all(-1)
    corners = [
        (y, x)
        for y, x in np.argwhere(first[..., 0])
        if (found := picture[y : y + size[0], x : x + size[1]]).shape == thumbnail.shape and (found == thumbnail).all()
    ]
    assert len(corners) == 2, "a score nowhere: the painted one is as it was"
    (upper, left), (lower, right) = corners
    assert (upper == lower) != (left == right), "side by side, or of a wide slide one below the other"
    assert (picture[:upper] < 100).any(), "no title"
    below = picture[lower + size[0] :]
    assert (below < 60).all(-1).any(), "no scale bar"
    assert (below[..., 0].astype(int) - below[..., 2] > 60).any(), "no legend"
    assert (below[..., 2].astype(int) - below[..., 0] > 60).any(), "no legend"


def test_outlines_leave_the_stain_of_tissue_and_of_the_strongest_tiles_to_be_seen() -> None:
    thumbnail = np.full((200, 300, 3), (210, 150, 190), np.uint8)
    raster = np.full((200, 300), np.nan)
    raster[40:160, 60:240] = 0.2
    raster[60:100, 80:120], raster[60:100, 160:200] = 1.0, -0.9
    ring = np.array([[60, 40], [240, 40], [240, 160], [60, 160], [60, 40]])

    def drawn(tissue: list[np.ndarray], signed: bool = True) -> np.ndarray:
        picture = draw_overlay(
            thumbnail,
            raster,
            title="a",
            mm_per_px=None,
            limit=1.0,
            ends=("against", "for"),
            signed=signed,
            tissue=tissue,
        )
        pixels = np.asarray(picture.pixels())
        top = int((pixels == thumbnail[0, 0]).all(-1).any(1).argmax())
        return pixels[top : top + 200, :300]

    outlined = drawn([ring])
    assert (outlined == thumbnail).all(-1).mean() > 0.95
    near = lambda colour: np.abs(outlined.astype(int) - colour).max(-1) < 40  # noqa: E731
    assert near(FOR_COLOUR)[59:62, 80:119].any(0).all()
    around = near(AGAINST_COLOUR)[59:62, 160:199].any(0)
    assert 0.4 < around.mean() < 0.9, "dashed: not colour alone tells it from the other"
    assert (outlined[100, 60] < 60).all(), "the tissue's contour"
    unsigned = drawn([], signed=False)
    assert not (np.abs(unsigned.astype(int) - AGAINST_COLOUR).max(-1) < 40).any()


def test_a_weak_score_hides_less_than_a_strong_one() -> None:
    stripes = np.zeros((10, 100, 3), np.uint8)
    stripes[:, ::2] = 255
    painted = [paint_tiles(stripes, np.full((10, 100), score), 1.0, signed=True) for score in (0.0, 0.5, 1.0)]
    contrast = [int(np.ptp(picture, axis=(0, 1)).max()) for picture in painted]
    assert contrast[0] > contrast[1] > contrast[2] > 90


def test_the_real_slide_lights_up_where_its_tissue_is_darkest() -> None:
    folder = os.environ.get("LONGSLIDE_TEST_SLIDES")
    if not folder:
        pytest.skip("LONGSLIDE_TEST_SLIDES is not set")
    with open_slide(Path(folder) / "CMU-1-Small-Region.svs") as slide:
        grid = make_grid(slide, find_tissue(slide), tile_mpp=0.5, tile_px=128)
        scores = np.zeros(len(grid.coords))
        for batch in TileStream(slide, grid):
            scores[batch.index] = 255 - batch.tiles.mean((1, 2, 3))
        thumbnail = slide.thumbnail(800)
        size = (thumbnail.shape[1], thumbnail.shape[0])
        raster = tile_raster(grid.coords, grid.tile_size_level0, scores, slide.bounds, size)
    darkness = 255 - thumbnail.mean(-1)
    covered = ~np.isnan(raster)
    assert 0.2 < covered.mean() < 0.8
    assert np.corrcoef(raster[covered], cv2.blur(darkness, (46, 46))[covered])[0, 1] > 0.8
    shifted = np.roll(darkness, (46, 46), (0, 1))
    assert np.corrcoef(raster[covered], cv2.blur(shifted, (46, 46))[covered])[0, 1] < 0.7

"""The tile grid: fields of view, order, tissue fraction."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import tifffile
from longslide.data.slides.slide import Slide, open_slide
from longslide.data.synthetic import write_pyramid
from longslide.data.tiles.grid import Grid, make_grid
from longslide.data.tiles.stream import TileStream
from longslide.data.tissue.base import Tissue
from longslide.errors import LongslideError

RANGE = 240.0  # grey levels from one border to the other


def write_coordinate_slide(path: Path, size: tuple[int, int], levels: list[tuple[int, int]], mpp: float = 0.25) -> Path:
    """A slide whose red says x and whose green says y: dithered ramps, written level by level."""
    rng = np.random.default_rng(0)
    with tifffile.TiffWriter(path) as file:
        for number, (width, height) in enumerate([size, *levels]):
            ramp = np.zeros((height, width, 3))
            ramp[..., 0] = (np.arange(width) + 0.5) / width * RANGE
            ramp[..., 1] = (np.arange(height)[:, None] + 0.5) / height * RANGE
            file.write(
                np.floor(ramp + rng.random(ramp.shape)).astype(np.uint8),
                tile=(256, 256),
                photometric="rgb",
                compression="zlib",
                compressionargs={"level": 1},
                metadata=None,
                subfiletype=int(number > 0),
                resolution=(1e4 / mpp, 1e4 / mpp),
                resolutionunit="CENTIMETER",
            )
    return path


def field_of_view(tile: np.ndarray, channel: int, slide_edge: int) -> tuple[float, float]:
    """Start and end of a tile in level-0 pixels along x (red) or y (green), read from its content."""
    grey = tile[..., channel].mean(axis=channel)  # over rows for x, over columns for y
    slope, start = np.polyfit(np.arange(len(grey)) + 0.5, grey, 1)
    return start * slide_edge / RANGE, (start + slope * len(grey)) * slide_edge / RANGE


def all_tissue(slide: Slide, pixel: int = 16) -> Tissue:
    width, height = (-(-edge // pixel) for edge in slide.dimensions)
    return Tissue(
        np.ones((height, width), bool), (slide.dimensions[0] / width, slide.dimensions[1] / height), "everything"
    )


@pytest.fixture(scope="module")
def pyramids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pyramids")
    shapes = {
        "2": ((2048, 1536), [(1024, 768), (512, 384)]),
        "4": ((2048, 1536), [(512, 384)]),
        "4.0161": ((2000, 1502), [(498, 374)]),
        "3.9999": ((1999, 1499), [(500, 375)]),
        "odd": ((2003, 1507), [(1001, 753), (500, 376)]),
        "8 and 16": ((4096, 4096), [(512, 512), (256, 256)]),
        "one level": ((1999, 1501), []),
    }
    return {name: write_coordinate_slide(folder / f"{name}.tif", *shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("pyramid", "mpp"),
    [
        *product(
            ["2", "4", "4.0161", "3.9999", "odd", "one level"],
            [0.25, 0.2515, 0.3, 0.5, 0.503, 0.75, 1.0, 1.004, 1.3],
        ),
        *product(["8 and 16"], [0.25, 1.0, 1.9, 2.0, 2.015, 3.0, 4.0, 4.035]),
    ],
)
@pytest.mark.parametrize(("tile_px", "overlap"), [(64, 0), (100, 30), (224, 0)])
def test_every_combination_of_mpp_and_level_lands_on_the_right_field_of_view(
    pyramids: dict[str, Path], pyramid: str, mpp: float, tile_px: int, overlap: int
) -> None:
    with open_slide(pyramids[pyramid]) as slide:
        grid = make_grid(slide, all_tissue(slide), tile_mpp=mpp, tile_px=tile_px, overlap=overlap)
        wanted = mpp / slide.mpp.value
        # A level within 1% is read as it is; everything else is the wanted size to the pixel.
        read_as_it_is = grid.read_px == tile_px
        assert abs(grid.tile_size_level0 / (tile_px * wanted) - 1) <= 0.0101 + 0.5 / (tile_px * wanted)
        assert read_as_it_is or grid.tile_size_level0 == round(tile_px * wanted)
        level_pixel = slide.level_downsamples[grid.level]
        assert level_pixel <= wanted * 1.01

        width, height = slide.dimensions
        inside = (grid.coords + grid.tile_size_level0 <= (width, height)).all(1)
        corners = np.flatnonzero(inside)[[0, inside.sum() // 2, -1]]
        some = replace(grid, coords=grid.coords[corners], tissue_fraction=grid.tissue_fraction[corners])
        (batch,) = TileStream(slide, some, threads=1)
        for tile, corner in zip(batch.tiles, some.coords, strict=True):
            for axis, edge in enumerate(slide.dimensions):
                start, end = field_of_view(tile, axis, edge)
                # A pixel of the level (OpenSlide starts a read at a fraction of it), and a quarter of a grey level,
                # which is 2 pixels on these ramps, by which OpenSlide's interpolation rounds.
                tolerance = level_pixel + 2.0
                assert start == pytest.approx(corner[axis], abs=tolerance)
                assert end == pytest.approx(corner[axis] + grid.tile_size_level0, abs=tolerance)


@pytest.mark.parametrize(
    ("pyramid", "mpp", "level", "resampled"),
    [
        ("2", 0.5, 1, False),
        ("2", 0.504, 1, False),
        ("2", 0.51, 1, True),
        ("2", 0.49, 0, True),
        ("2", 1.0, 2, False),
        ("4", 0.5, 0, True),
        ("4.0161", 1.0, 1, False),
        ("3.9999", 1.0, 1, False),
        ("4", 2.0, 1, True),
        ("one level", 0.2485, 0, False),
    ],
)
def test_tiles_come_from_the_matching_level_or_the_next_finer_one(
    pyramids: dict[str, Path], pyramid: str, mpp: float, level: int, resampled: bool
) -> None:
    with open_slide(pyramids[pyramid]) as slide:
        grid = make_grid(slide, all_tissue(slide), tile_mpp=mpp, tile_px=64)
    assert (grid.level, grid.read_px != grid.tile_px) == (level, resampled)


@pytest.mark.parametrize("overlap", [0, 16, 63])
def test_tiles_are_in_row_major_order_one_in_a_cell(pyramids: dict[str, Path], overlap: int) -> None:
    with open_slide(pyramids["odd"]) as slide:
        grid = make_grid(slide, all_tissue(slide), tile_mpp=1.0, tile_px=64, overlap=overlap)
    assert grid.coords.dtype == np.int64
    keys = [(y, x) for x, y in grid.coords.tolist()]
    assert keys == sorted(set(keys))
    assert (grid.cells * grid.step_level0 == grid.coords).all()
    columns, rows = grid.cells.max(0) + 1
    assert len(np.unique(grid.cells, axis=0)) == len(grid.coords) <= columns * rows


@pytest.mark.parametrize("overlap", [64, 65, -1])
def test_an_overlap_of_a_whole_tile_is_refused(pyramids: dict[str, Path], overlap: int) -> None:
    with open_slide(pyramids["2"]) as slide, pytest.raises(LongslideError, match="overlap"):
        make_grid(slide, all_tissue(slide), tile_mpp=0.5, tile_px=64, overlap=overlap)


def brute_force_fraction(tissue: Tissue, grid: Grid) -> np.ndarray:
    """Tissue share of each tile from a mask enlarged to level 0, pixel by pixel."""
    enlarge = tuple(round(factor) for factor in tissue.downsample[::-1])
    level0 = np.kron(tissue.mask, np.ones(enlarge, bool))
    return np.array(
        [
            level0[y : y + grid.tile_size_level0, x : x + grid.tile_size_level0].sum() / grid.tile_size_level0**2
            for x, y in grid.coords
        ]
    )


@pytest.mark.parametrize(("tile_px", "overlap", "mpp"), [(64, 0, 0.25), (50, 10, 0.5), (37, 5, 0.4), (100, 0, 1.0)])
def test_the_tissue_fraction_is_that_of_every_pixel_counted(
    pyramids: dict[str, Path], tile_px: int, overlap: int, mpp: float
) -> None:
    mask = np.random.default_rng(3).random((1536 // 16, 2048 // 8)) < 0.4
    tissue = Tissue(mask, (8.0, 16.0), "random")
    with open_slide(pyramids["2"]) as slide:
        grid = make_grid(slide, tissue, tile_mpp=mpp, tile_px=tile_px, overlap=overlap, min_tissue=0.0)
        expected = brute_force_fraction(tissue, grid)
        np.testing.assert_allclose(grid.tissue_fraction, expected, atol=1e-6)
        # Raising the bar keeps exactly the tiles that reach it.
        bar = float(np.median(expected)) + 1e-7
        fewer = make_grid(slide, tissue, tile_mpp=mpp, tile_px=tile_px, overlap=overlap, min_tissue=bar)
    np.testing.assert_array_equal(fewer.coords, grid.coords[expected >= bar])


def test_a_tile_over_the_border_is_kept_when_enough_of_its_whole_area_is_tissue(pyramids: dict[str, Path]) -> None:
    with open_slide(pyramids["2"]) as slide:  # 2048 = 20.48 tiles of 100, 1536 = 15.36
        sides = {
            bar: make_grid(slide, all_tissue(slide), tile_mpp=0.25, tile_px=100, min_tissue=bar).cells.max(0).tolist()
            for bar in (0.35, 0.4, 0.5)
        }
    assert sides == {0.35: [20, 15], 0.4: [20, 14], 0.5: [19, 14]}


def test_without_tissue_there_are_no_tiles(pyramids: dict[str, Path]) -> None:
    with open_slide(pyramids["2"]) as slide:
        grid = make_grid(slide, Tissue(np.zeros((96, 128), bool), (16.0, 16.0), "none"), min_tissue=0.0)
        assert grid.coords.shape == grid.cells.shape == (0, 2)
        assert list(TileStream(slide, grid)) == []


def test_a_slide_smaller_than_a_tile_is_refused(pyramids: dict[str, Path]) -> None:
    with (
        open_slide(pyramids["2"]) as slide,
        pytest.raises(LongslideError, match=r"2\.tif: 2048 x 1536 px is smaller than one tile.*--tile-px"),
    ):
        make_grid(slide, all_tissue(slide), tile_mpp=2.0, tile_px=256)


def test_tiles_are_not_made_sharper_than_the_slide(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "coarse.tif", np.full((600, 600, 3), 90, np.uint8), mpp=1.0)
    with (
        open_slide(tmp_path / "coarse.tif") as slide,
        pytest.raises(
            LongslideError, match=r"coarse\.tif: level 0 has 1 um/px, coarser than the 0.5 asked for.*--tile-mpp"
        ),
    ):
        make_grid(slide, all_tissue(slide), tile_mpp=0.5)


def test_a_hundred_thousand_tiles_are_laid_in_seconds(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "a.tif", np.full((2048, 2048, 3), 90, np.uint8), mpp=0.5)
    with open_slide(tmp_path / "a.tif") as slide:
        grid = make_grid(slide, all_tissue(slide), tile_mpp=0.5, tile_px=16, overlap=10)
    assert len(grid.coords) > 100_000

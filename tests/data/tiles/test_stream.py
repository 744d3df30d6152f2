"""The tile stream: order, memory, unreadable tiles, threads."""

import os
import threading
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from longslide.data.slides.slide import Slide, open_slide
from longslide.data.synthetic import write_pyramid
from longslide.data.tiles.grid import Grid, make_grid
from longslide.data.tiles.stream import TileStream
from longslide.data.tissue.base import Tissue
from longslide.errors import LongslideError
from PIL import Image

from ..slides.tiff_files import corrupt_native_tile

WIDTH, HEIGHT = 1300, 1100


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 200, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory, picture: np.ndarray) -> Path:
    path = tmp_path_factory.mktemp("slides") / "a.tif"
    write_pyramid(path, picture, mpp=0.5)
    return path


def grid_of(slide: Slide, mpp: float = 0.5, tile_px: int = 100, overlap: int = 0, gaps: bool = False) -> Grid:
    mask = np.ones((11, 13), bool)
    if gaps:
        mask = np.random.default_rng(0).random(mask.shape) < 0.6
    return make_grid(
        slide, Tissue(mask, (100.0, 100.0), "squares"), tile_mpp=mpp, tile_px=tile_px, overlap=overlap, min_tissue=0.0
    )


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("tiles")]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
@pytest.mark.parametrize("gaps", [False, True])
def test_every_tile_comes_once_in_the_grids_order(
    slide_path: Path, picture: np.ndarray, threads: int, batch_size: int, gaps: bool
) -> None:
    canvas = np.full((HEIGHT + 100, WIDTH + 100, 3), 255, np.uint8)
    canvas[:HEIGHT, :WIDTH] = picture
    with open_slide(slide_path) as slide:
        grid = grid_of(slide, gaps=gaps)
        stream = TileStream(slide, grid, batch_size=batch_size, threads=threads)
        batches = list(stream)
    assert len(stream) == len(grid.coords)
    assert [len(batch.tiles) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    np.testing.assert_array_equal(np.concatenate([batch.index for batch in batches]), np.arange(len(stream)))
    for batch in batches:
        assert batch.tiles.dtype == np.uint8
        for tile, (x, y) in zip(batch.tiles, grid.coords[batch.index], strict=True):
            np.testing.assert_array_equal(tile, canvas[y : y + 100, x : x + 100])


def area_mean(pixels: int, smaller: int) -> np.ndarray:
    """`(smaller, pixels)`: the share of each pixel that lies in each of `smaller` equal parts, written out plainly."""
    edges = np.linspace(0, pixels, smaller + 1)
    start, end = edges[:-1, None], edges[1:, None]
    left = np.arange(pixels)
    inside = np.clip(np.minimum(end, left + 1) - np.maximum(start, left), 0, None)
    return np.asarray(inside / (pixels / smaller))


@pytest.mark.parametrize("downsample", [2, 3, 4])
@pytest.mark.parametrize("overlap", [0, 30])
@pytest.mark.parametrize("mpp", [0.5, 0.7, 1.0, 1.5, 2.0])
def test_tiles_equal_openslides_reads_one_by_one(
    tmp_path: Path, picture: np.ndarray, downsample: int, overlap: int, mpp: float
) -> None:
    path = tmp_path / "a.tif"
    write_pyramid(path, picture, mpp=0.5, downsample=downsample)
    with open_slide(path) as slide, openslide.OpenSlide(path) as reference:
        grid = grid_of(slide, mpp=mpp, tile_px=100, overlap=overlap)
        resampled = grid.read_px != grid.tile_px
        for batch in TileStream(slide, grid, threads=2):
            for tile, (x, y) in zip(batch.tiles, grid.coords[batch.index].tolist(), strict=True):
                region = reference.read_region((x, y), grid.level, (grid.read_px, grid.read_px))
                white = Image.new("RGBA", region.size, "white")
                expected = np.asarray(Image.alpha_composite(white, region).convert("RGB")).astype(float)
                if resampled:
                    mean = area_mean(grid.read_px, 100)
                    expected = np.einsum("yv,vuc,xu->yxc", mean, expected, mean, optimize=True)
                # Rounding alone: of half transparent border pixels, and of the mean.
                assert np.abs(tile - expected).max() <= 1.51


def test_at_level_0_tiles_are_openslides_to_the_bit(slide_path: Path) -> None:
    with open_slide(slide_path) as slide, openslide.OpenSlide(slide_path) as reference:
        grid = grid_of(slide, tile_px=90, overlap=7)
        inside = np.flatnonzero((grid.coords + 90 <= (WIDTH, HEIGHT)).all(axis=1))
        for batch in TileStream(slide, grid):
            for tile, row in zip(batch.tiles, batch.index, strict=True):
                if row in inside:
                    region = reference.read_region(tuple(grid.coords[row].tolist()), 0, (90, 90)).convert("RGB")
                    np.testing.assert_array_equal(tile, np.asarray(region))


def test_no_more_is_read_ahead_than_allowed(slide_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    original = Slide.read_region

    def counting(self: Slide, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        nonlocal read
        read += width // 50
        return original(self, x, y, level, width, height)

    with open_slide(slide_path) as slide:
        stream = TileStream(slide, grid_of(slide, tile_px=50), batch_size=5, threads=1, read_ahead=2)
        monkeypatch.setattr(Slide, "read_region", counting)
        for taken, _ in enumerate(stream, start=1):
            assert read <= (taken + 2) * 5
            if taken == 20:
                break


def test_an_abandoned_stream_leaves_no_thread(slide_path: Path) -> None:
    with open_slide(slide_path) as slide:
        batches = iter(TileStream(slide, grid_of(slide), batch_size=4, threads=3))
        next(batches)
        assert reading_threads()
        del batches
        assert not reading_threads()


def test_a_finished_or_failed_stream_leaves_no_thread(slide_path: Path) -> None:
    with open_slide(slide_path) as slide:
        stream = TileStream(slide, grid_of(slide), batch_size=4)
        assert sum(len(batch.tiles) for batch in stream) == len(stream)
        assert not reading_threads()

        def fail() -> None:
            for _ in TileStream(slide, grid_of(slide), batch_size=4):
                raise RuntimeError("the caller's")

        with pytest.raises(RuntimeError, match="the caller's"):
            fail()
    assert not reading_threads()


def test_a_stream_can_be_read_twice(slide_path: Path) -> None:
    with open_slide(slide_path) as slide:
        stream = TileStream(slide, grid_of(slide), batch_size=50)
        first, second = list(stream), list(stream)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.tiles, b.tiles)


@pytest.fixture
def damaged(tmp_path: Path, picture: np.ndarray) -> tuple[Path, Path]:
    """A slide, and the same one with its native tile (256..512, 256..512) unreadable."""
    paths = tmp_path / "good.tif", tmp_path / "damaged.tif"
    for path in paths:
        tifffile.imwrite(
            path,
            picture,
            tile=(256, 256),
            photometric="rgb",
            compression="zlib",
            metadata=None,
            resolution=(2e4, 2e4),
            resolutionunit="CENTIMETER",
        )
    corrupt_native_tile(paths[1], 7)  # six native tiles a row
    return paths


@pytest.mark.parametrize("threads", [1, 4])
def test_an_unreadable_region_costs_only_the_tiles_that_touch_it(damaged: tuple[Path, Path], threads: int) -> None:
    good_path, damaged_path = damaged
    with open_slide(good_path) as good, open_slide(damaged_path) as slide:
        grid = grid_of(good)
        expected = np.concatenate([batch.tiles for batch in TileStream(good, grid)])
        stream = TileStream(slide, grid, batch_size=16, threads=threads, max_bad_tiles=16)
        batches = list(stream)
        touching = (grid.coords < 512).all(1) & (grid.coords + 100 > 256).all(1)
        assert touching.sum() == 16
        assert stream.bad_tiles == [tuple(corner) for corner in grid.coords[touching].tolist()]
        index = np.concatenate([batch.index for batch in batches])
        np.testing.assert_array_equal(index, np.flatnonzero(~touching))
        np.testing.assert_array_equal(np.concatenate([batch.tiles for batch in batches]), expected[index])
        # The slide is as usable as before.
        np.testing.assert_array_equal(slide.read_region(600, 600, 0, 99, 99), good.read_region(600, 600, 0, 99, 99))


def test_unreadable_tiles_are_counted_anew_when_a_stream_is_read_again(damaged: tuple[Path, Path]) -> None:
    with open_slide(damaged[1]) as slide:
        stream = TileStream(slide, grid_of(slide), max_bad_tiles=16)
        for _ in range(2):
            delivered = sum(len(batch.tiles) for batch in stream)
            assert len(stream.bad_tiles) == 16
            assert delivered == len(stream) - 16


@pytest.mark.parametrize("allowed", [0, 3, 15])
def test_more_unreadable_tiles_than_allowed_fail_the_slide(damaged: tuple[Path, Path], allowed: int) -> None:
    with open_slide(damaged[1]) as slide:
        stream = TileStream(slide, grid_of(slide), batch_size=8, max_bad_tiles=allowed)
        with pytest.raises(LongslideError, match=r"damaged\.tif: .*\(200, 200\).*--max-bad-tiles") as caught:
            list(stream)
        assert "\n" not in str(caught.value)
        assert not reading_threads()


def test_an_unreadable_jpeg_tile_of_the_real_slide_costs_only_the_tiles_that_touch_it(tmp_path: Path) -> None:
    folder = os.environ.get("LONGSLIDE_TEST_SLIDES")
    if not folder:
        pytest.skip("LONGSLIDE_TEST_SLIDES, the folder with CMU-1-Small-Region.svs, is not set")
    good_path, damaged_path = Path(folder) / "CMU-1-Small-Region.svs", tmp_path / "damaged.svs"
    damaged_path.write_bytes(good_path.read_bytes())
    corrupt_native_tile(damaged_path, 21)  # ten native tiles of 240 pixels a row: x 240..480, y 480..720
    with open_slide(good_path) as good, open_slide(damaged_path) as slide:
        grid = make_grid(good, Tissue(np.ones((4, 3), bool), (740.0, 741.75), "everything"))
        expected = np.concatenate([batch.tiles for batch in TileStream(good, grid)])
        stream = TileStream(slide, grid, batch_size=16, max_bad_tiles=6)
        batches = list(stream)
    corners = grid.coords
    touching = (corners < (480, 720)).all(1) & (corners + 256 > (240, 480)).all(1)
    assert stream.bad_tiles == [tuple(corner) for corner in corners[touching].tolist()]
    index = np.concatenate([batch.index for batch in batches])
    np.testing.assert_array_equal(index, np.flatnonzero(~touching))
    np.testing.assert_array_equal(np.concatenate([batch.tiles for batch in batches]), expected[index])

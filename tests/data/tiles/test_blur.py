"""The blur score: a published measure, on one scale for any stain, contrast and scanner."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from longslide.data.slides.slide import open_slide
from longslide.data.tiles.blur import blur_of
from longslide.data.tiles.grid import make_grid
from longslide.data.tiles.stream import TileStream


def crete(image: np.ndarray) -> float:
    """The blur effect of Crete et al. (2007) of a grey image, written out plainly over all lines."""

    def along(lines: np.ndarray) -> float:
        padded = np.pad(lines, ((0, 0), (5, 5)), mode="reflect")
        blurred = np.mean([padded[:, k : k + lines.shape[1]] for k in range(11)], axis=0)
        sharp, again = np.abs(np.diff(lines, axis=1)), np.abs(np.diff(np.rint(blurred), axis=1))
        return float((sharp.sum() - np.maximum(sharp - again, 0).sum()) / sharp.sum())

    return max(along(image), along(image.T))


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    folder = os.environ.get("LONGSLIDE_TEST_SLIDES")
    if not folder:
        pytest.skip("LONGSLIDE_TEST_SLIDES, the folder with CMU-1-Small-Region.svs, is not set")
    with open_slide(Path(folder) / "CMU-1-Small-Region.svs") as slide:
        inside = np.array(slide.dimensions) - 256
        batches = list(slide.tiles(min_tissue=0.5))
    whole = np.concatenate([(batch.coords <= inside).all(1) for batch in batches])
    return np.concatenate([batch.tiles for batch in batches])[whole]


def blurred(tile: np.ndarray, sigma: float) -> np.ndarray:
    return np.asarray(cv2.GaussianBlur(tile, (0, 0), sigma))


def test_it_is_the_published_measure(tiles: np.ndarray) -> None:
    for tile in tiles[::4]:
        for sigma in (0.3, 1, 2, 4):
            image = blurred(tile, sigma)
            assert blur_of(image) == pytest.approx(crete(image[..., 1].astype(float)), abs=0.03)


def test_tiles_in_focus_and_out_of_focus_are_told_apart_by_one_number(tiles: np.ndarray) -> None:
    assert max(map(blur_of, tiles)) < 0.4
    assert min(blur_of(blurred(tile, 2)) for tile in tiles) > 0.44
    for tile in tiles:
        scores = [blur_of(blurred(tile, sigma)) for sigma in (0.3, 1, 2, 3, 5)]
        assert scores == sorted(scores)


def test_pale_stain_is_not_blur(tiles: np.ndarray) -> None:
    pale = (255 - (255 - tiles.astype(float)) * 0.4).astype(np.uint8)
    assert max(abs(blur_of(one) - blur_of(other)) for one, other in zip(pale, tiles, strict=True)) < 0.06


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_tile_of_one_colour_shows_nothing_in_focus(value: int) -> None:
    assert blur_of(np.full((64, 64, 3), value, np.uint8)) == 1.0


def test_a_stream_leaves_out_what_is_too_blurred(tmp_path: Path, tiles: np.ndarray) -> None:
    from longslide.data.synthetic import write_pyramid
    from longslide.data.tissue.base import Tissue

    picture = np.vstack([np.hstack(tiles[:4]), np.hstack([blurred(tile, 3) for tile in tiles[:4]])])
    write_pyramid(tmp_path / "half.tif", picture, mpp=0.5)
    with open_slide(tmp_path / "half.tif") as slide:
        grid = make_grid(slide, Tissue(np.ones((2, 4), bool), (256.0, 256.0), "all"))
        assert sum(len(batch.tiles) for batch in TileStream(slide, grid)) == 8
        stream = TileStream(slide, grid, max_blur=0.5, batch_size=3)
        index = np.concatenate([batch.index for batch in stream])
    assert index.tolist() == [0, 1, 2, 3]
    assert (stream.blur[:4] < 0.4).all()
    assert (stream.blur[4:] > 0.5).all()
    assert stream.bad_tiles == []

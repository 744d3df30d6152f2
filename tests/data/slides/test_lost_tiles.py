"""A native tile without bytes is empty where nothing was scanned; elsewhere it is lost, counted, and fails the slide."""

import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
from longslide.data.slides.slide import open_slide
from longslide.errors import LongslideError

from . import tiff_files as files

TILE = 128
LOST = 25  # a native tile full of tissue
CORNER = (1 * TILE, 3 * TILE)


def sparse(path: Path, *, aperio: bool = False, downsamples: tuple[float, ...] = (1, 2, 4)) -> Path:
    """Tissue on the left, and right of it glass of which no tile was written."""
    image = np.full((1024, 1024, 3), 236, np.uint8)
    image[:, :512] = files.tissue(512, 1024)
    right = tuple(row * 8 + column for row in range(8) for column in range(5, 8))
    files.write_jpeg_tiff(path, image, tile=TILE, downsamples=downsamples, missing=right, aperio=aperio)
    return path


def set_tag(path: Path, code: int, number: int, value: int) -> None:
    with tifffile.TiffFile(path) as file:
        tag = file.pages.first.tags[code]
    assert int(tag.dtype) == 4
    files.overwrite(path, tag.valueoffset + 4 * number, struct.pack("<I", value))


@pytest.mark.parametrize("aperio", [False, True])
@pytest.mark.parametrize("downsamples", [(1, 2, 4), (1, 16), (1,)])
def test_what_was_not_scanned_is_empty(tmp_path: Path, aperio: bool, downsamples: tuple[float, ...]) -> None:
    if aperio and downsamples == (1,):
        pytest.skip("there Aperio's places without bytes are told from lost tiles by no other level")
    path = sparse(tmp_path / ("a.svs" if aperio else "a.tif"), aperio=aperio, downsamples=downsamples)
    with open_slide(path) as slide:
        assert slide.reader == "tiff"
        assert (slide.read_region(700, 100, 0, 100, 100) == 255).all()
        slide.thumbnail()
        said = "native tiles without bytes shown as glass, as another level shows nothing there: 24"
        assert slide.remark == (said if aperio else "")
        assert not slide.unreadable_areas
        assert not slide.unreadable_levels


@pytest.mark.parametrize("aperio", [False, True])
def test_a_tile_with_a_place_and_no_bytes_is_lost_where_another_level_shows_tissue(
    tmp_path: Path, aperio: bool
) -> None:
    path = sparse(tmp_path / ("a.svs" if aperio else "a.tif"), aperio=aperio)
    files.without_bytes(path, LOST, place=True)
    with open_slide(path) as slide:
        with pytest.raises(LongslideError, match=r"native tile \(1, 3\): the file has no bytes of it"):
            slide.read_region(*CORNER, 0, TILE, TILE)
        stream = slide.tiles(0.5, TILE, max_bad_tiles=5)
        list(stream)
        assert stream.bad_tiles == [CORNER]
        with pytest.raises(LongslideError, match="more than --max-bad-tiles 0"):
            list(slide.tiles(0.5, TILE))


def test_without_another_level_it_is_lost_too(tmp_path: Path) -> None:
    path = sparse(tmp_path / "a.tif", downsamples=(1,))
    files.without_bytes(path, LOST, place=True)
    with open_slide(path) as slide, pytest.raises(LongslideError, match="no bytes"):
        slide.read_region(*CORNER, 0, TILE, TILE)


@pytest.mark.parametrize("downsamples", [(1, 2, 4), (1, 16)])
def test_an_empty_tile_is_lost_where_another_level_shows_tissue(tmp_path: Path, downsamples: tuple[float, ...]) -> None:
    path = sparse(tmp_path / "a.tif", downsamples=downsamples)
    files.without_bytes(path, LOST)
    with open_slide(path) as slide:
        with pytest.raises(LongslideError, match=r"native tile \(1, 3\): the file has no bytes of it"):
            slide.read_region(*CORNER, 0, TILE, TILE)
        slide.thumbnail()
        covered = [x <= CORNER[0] < x + w and y <= CORNER[1] < y + h for x, y, w, h in slide.unreadable_areas]
        assert any(covered)


def test_a_lost_tile_of_a_reduced_level_is_taken_from_a_finer_one_with_a_remark(tmp_path: Path) -> None:
    path = sparse(tmp_path / "a.tif", downsamples=(1, 2))
    with open_slide(path) as slide:
        whole = slide.thumbnail(512)
    files.without_bytes(path, 5, level=1)
    with open_slide(path) as slide:
        thumbnail = slide.thumbnail(512)
        assert slide.unreadable_levels == {1}
        assert np.abs(thumbnail.astype(int) - whole).mean() < 3


def test_bytes_without_a_place_are_lost(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    files.write_tiff(path, files.tissue(512, 512), tile=TILE, compression="none")
    set_tag(path, 324, 13, 0)
    with open_slide(path) as slide, pytest.raises(LongslideError, match="no bytes"):
        slide.read_region(*CORNER, 0, TILE, TILE)


def test_the_slide_is_as_sparse_in_another_process(tmp_path: Path) -> None:
    import pickle

    path = sparse(tmp_path / "a.tif")
    files.without_bytes(path, LOST)
    with open_slide(path) as slide, pickle.loads(pickle.dumps(slide)) as other:
        assert (other.read_region(700, 100, 0, 100, 100) == 255).all()
        with pytest.raises(LongslideError, match="no bytes"):
            other.read_region(*CORNER, 0, TILE, TILE)

"""Areas that nobody could read are no glass: their tiles are tried, counted, and fail the slide beyond the limit."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from longslide.data.slides.slide import open_slide
from longslide.errors import LongslideError

from . import tiff_files as files


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["tiff", "openslide"])
def test_zeros_in_the_real_slide_are_counted_and_fail_it(tmp_path: Path, reader: str) -> None:
    folder = os.environ.get("LONGSLIDE_TEST_SLIDES")
    if not folder:
        pytest.skip("LONGSLIDE_TEST_SLIDES, the folder with CMU-1-Small-Region.svs, is not set")
    whole, path = Path(folder) / "CMU-1-Small-Region.svs", tmp_path / "a.svs"
    shutil.copyfile(whole, path)
    path.chmod(0o644)
    offset, _ = files.places(path)[40]
    files.overwrite(path, offset, bytes(64 * 1024))
    with open_slide(whole, reader=reader) as slide:
        expected = slide.tiles(0.5, 128)
    with open_slide(path, reader=reader) as slide:
        stream = slide.tiles(0.5, 128, max_bad_tiles=1000)
        delivered = sum(len(batch.tiles) for batch in stream)
        assert slide.unreadable_areas
        assert len(stream.bad_tiles) >= 10
        # Every tile of the whole slide is delivered or counted.
        tried = set(map(tuple, stream.grid.coords.tolist()))
        lost = [tile for tile in map(tuple, expected.grid.coords.tolist()) if tile not in tried]
        assert len(lost) <= 3  # at the border of what is tissue
        assert delivered + len(stream.bad_tiles) == len(stream)
        with pytest.raises(LongslideError, match=r"unreadable tiles .* more than --max-bad-tiles 0"):
            list(slide.tiles(0.5, 128))


def test_damaged_glass_is_counted_too(tmp_path: Path) -> None:
    image = np.full((1024, 1024, 3), 240, np.uint8)
    image[:512, :512] = files.tissue(512, 512)
    path = tmp_path / "a.tif"
    files.write_jpeg_tiff(path, image, tile=256, downsamples=(1,))
    offset, count = files.places(path)[15]
    files.overwrite(path, offset, bytes(count))
    with open_slide(path) as slide:
        stream = slide.tiles(0.5, 256, max_bad_tiles=1)
        list(stream)
        assert slide.unreadable_areas == {(768, 768, 256, 256)}
        assert stream.bad_tiles == [(768, 768)]


def test_a_dicom_slide_that_is_cut_fails(tmp_path: Path) -> None:
    folder = os.environ.get("LONGSLIDE_TEST_CASES")
    if not folder:
        pytest.skip("LONGSLIDE_TEST_CASES, the folder with dicom_two_series, is not set")
    for name in ("s1_34553435.dcm", "s1_73020434.dcm", "s1_97956864.dcm"):
        shutil.copyfile(Path(folder) / "dicom_two_series" / name, tmp_path / name)
    path = max(tmp_path.iterdir(), key=lambda one: one.stat().st_size)
    path.chmod(0o644)
    with open_slide(path) as slide:
        expected = len(slide.tiles(0.5, 128))
    with path.open("r+b") as raw:
        raw.truncate(path.stat().st_size * 45 // 100)
    with open_slide(path) as slide:
        stream = slide.tiles(0.5, 128, max_bad_tiles=1000)
        delivered = sum(len(batch.tiles) for batch in stream)
        assert delivered < expected <= delivered + len(stream.bad_tiles)
        with pytest.raises(LongslideError, match="--max-bad-tiles 0"):
            list(slide.tiles(0.5, 128))

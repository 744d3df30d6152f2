"""What a process of the viewer draws, and how many slides it keeps open."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from longslide import open_slide, write_synthetic_slide
from longslide.data.slides.slide import Slide
from longslide.pipeline.view import pictures
from longslide.pipeline.view.pictures import MOST_OPEN, TILE_PX, SlideFile, finest_level


@pytest.fixture(autouse=True)
def none_open() -> Iterator[None]:
    yield
    pictures.close_all()


def test_few_slides_are_open_and_one_that_was_written_anew_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_synthetic_slide(tmp_path / "0.svs", size=(256, 256))
    files = [SlideFile(Path(shutil.copy(first, tmp_path / f"{number}.svs"))) for number in range(1, 3 + MOST_OPEN)]
    opened: list[Path] = []
    closed: list[Path] = []

    def opening(path: Path, **options: object) -> Slide:
        slide = open_slide(path, **options)  # type: ignore[arg-type]
        opened.append(path)
        close = slide.close
        slide.close = lambda: (closed.append(path), close())[1]  # type: ignore[method-assign, func-returns-value]
        return slide

    monkeypatch.setattr(pictures, "open_slide", opening)
    for file in files:
        pictures.look(file)
        pictures.look(files[0])
        assert len(opened) - len(closed) <= MOST_OPEN
    assert opened.count(files[0].path) == 1, "the one in use stays"
    pictures.look(SlideFile(files[0].path, version=1))
    assert opened.count(files[0].path) == 2
    assert files[0].path in closed
    pictures.close_all()
    assert sorted(opened) == sorted(closed)


@pytest.mark.parametrize("size", [(1000, 700), (2200, 300)])  # cut from the overview; read from the file
def test_all_tiles_of_a_level_together_are_the_slide(size: tuple[int, int], tmp_path: Path) -> None:
    path = write_synthetic_slide(tmp_path / "a.svs", size=size, texture="solid")
    file, finest = SlideFile(path), finest_level(size)
    with open_slide(path) as slide:
        for downsample in (1, 2, 4):
            level = finest - downsample.bit_length() + 1
            width, height = (-(-edge // downsample) for edge in size)
            joined = np.zeros((height, width, 3), np.uint8)
            for row in range(-(-height // TILE_PX)):
                for column in range(-(-width // TILE_PX)):
                    tile = pictures.tile(file, level, column, row)
                    assert tile is not None
                    pixels = simplejpeg.decode_jpeg(tile)
                    top, left = row * TILE_PX, column * TILE_PX
                    joined[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
            expected = slide.thumbnail(max(width, height)).astype(int)
            assert np.abs(joined[: expected.shape[0], : expected.shape[1]] - expected).mean() < 8

"""Open slides: few at a time, whoever asks."""

import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from longslide import LongslideError, open_slide, write_synthetic_slide
from longslide.data.slides.slide import Slide
from longslide.pipeline.view import open_slides
from longslide.pipeline.view.open_slides import MOST_OPEN, TILE_PX, OpenSlides, SlideFile, finest_level


def test_many_slides_are_read_by_threads_few_are_open_and_all_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_synthetic_slide(tmp_path / "0.svs", size=(1024, 768))
    files = [SlideFile(first)]
    for number in range(1, 3 * MOST_OPEN):
        files.append(SlideFile(Path(shutil.copy(first, tmp_path / f"{number}.svs"))))
    opened: list[Slide] = []
    closed: list[Slide] = []

    def opening(path: Path, **options: object) -> Slide:
        slide = open_slide(path, **options)  # type: ignore[arg-type]
        opened.append(slide)
        close = slide.close
        slide.close = lambda: (closed.append(slide), close())[1]  # type: ignore[method-assign, func-returns-value]
        return slide

    monkeypatch.setattr(open_slides, "open_slide", opening)
    slides = OpenSlides()
    chance = random.Random(0)
    asked = [(chance.choice(files), chance.randrange(4), chance.randrange(3)) for _ in range(300)]
    with ThreadPoolExecutor(8) as pool:
        tiles = list(pool.map(lambda one: slides.tile(one[0], 10, one[1], one[2]), asked))
    by_place: dict[tuple[int, int], bytes | None] = {}
    for (_, column, row), tile in zip(asked, tiles, strict=True):
        assert tile is not None
        assert by_place.setdefault((column, row), tile) == tile, "copies of one slide have the same tiles"
    assert len(opened) - len(closed) <= MOST_OPEN
    assert len({id(slide) for slide in closed}) == len(closed), "none is closed twice"
    slides.close()
    assert len(opened) == len(closed)


def test_pictures_are_kept_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = SlideFile(write_synthetic_slide(tmp_path / "a.svs", size=(1024, 768)))
    slides = OpenSlides()
    one = slides.tile(file, 10, 1, 1)
    assert one is not None
    assert slides.tile(file, 10, 1, 1) is one
    monkeypatch.setattr(open_slides, "PICTURE_BYTES", 2 * len(one))
    for column in range(4):
        for row in range(3):
            slides.tile(file, 10, column, row)
    assert sum(map(len, slides._pictures.values())) <= 2 * len(one)
    slides.close()


def test_all_tiles_of_a_level_together_are_the_slide(tmp_path: Path) -> None:
    path = write_synthetic_slide(tmp_path / "a.svs", size=(1000, 700), texture="solid")
    slides, file = OpenSlides(), SlideFile(path)
    with open_slide(path) as slide:
        for level in (finest_level(slide.dimensions), 9, 8):
            downsample = 2 ** (10 - level)
            width, height = (-(-edge // downsample) for edge in slide.dimensions)
            joined = np.zeros((height, width, 3), np.uint8)
            for row in range(-(-height // TILE_PX)):
                for column in range(-(-width // TILE_PX)):
                    tile = slides.tile(file, level, column, row)
                    assert tile is not None

                    pixels = simplejpeg.decode_jpeg(tile)
                    top, left = row * TILE_PX, column * TILE_PX
                    joined[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
            expected = slide.thumbnail(max(width, height)).astype(int)
            assert np.abs(joined[: expected.shape[0], : expected.shape[1]] - expected).mean() < 8
    slides.close()


def test_a_slide_that_is_not_there_is_an_error_each_time(tmp_path: Path) -> None:
    slides = OpenSlides()
    for _ in range(2):
        with pytest.raises(LongslideError, match="No such file"):
            slides.tile(SlideFile(tmp_path / "a.svs"), 0, 0, 0)


def test_no_slide_is_closed_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_synthetic_slide(tmp_path / "0.svs", size=(256, 256))
    files = [SlideFile(first), SlideFile(Path(shutil.copy(first, tmp_path / "1.svs")))]
    closed: set[int] = set()

    def opening(path: Path, **options: object) -> Slide:
        slide = open_slide(path, **options)  # type: ignore[arg-type]
        close = slide.close
        slide.close = lambda: (closed.add(id(slide)), close())[1]  # type: ignore[method-assign, func-returns-value]
        kept.append(slide)
        return slide

    kept: list[Slide] = []  # so that no other gets its id
    monkeypatch.setattr(open_slides, "open_slide", opening)
    monkeypatch.setattr(open_slides, "MOST_OPEN", 1)
    slides = OpenSlides()
    lock = threading.Lock()

    class Lock:
        """After it others come first."""

        def __enter__(self) -> None:
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()
            time.sleep(0.001)

    monkeypatch.setattr(slides, "_lock", Lock())

    def look(number: int) -> bool:
        with slides.slide(files[number % 3 // 2]) as slide:
            return id(slide) not in closed

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(look, range(200)))
    slides.close()

"""Slides are read by processes: several threads ask, a library that crashes or hangs takes one picture or one slide away."""

import random
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from longslide import LongslideError, write_synthetic_slide
from longslide.pipeline.view import open_slides, pictures
from longslide.pipeline.view.open_slides import MOST_CRASHES, OpenSlides
from longslide.pipeline.view.pictures import SlideFile

FRAGILE = """
import os, signal, time
from longslide.data.slides.openslide import OpenSlideReader

class Fragile(OpenSlideReader):
    '''As OpenSlide, but its library cannot take some files, and of one file not the upper left corner.'''

    def __init__(self, path):
        self.name = path.stem
        if self.name == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.name == "hang":
            time.sleep(600)
        super().__init__(path)

    def read_region(self, *where):
        if self.name == "all" or (self.name == "corner" and where == (0, 0, 0, 256, 256)):
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().read_region(*where)
"""
FINEST = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("open")
    (home / "fragile_viewed.py").write_text(FRAGILE)
    write_synthetic_slide(home / "sound.svs", size=(2304, 768))
    for name in ("crash", "hang", "corner", "all"):
        shutil.copy(home / "sound.svs", home / f"{name}.svs")
    return home


@pytest.fixture
def slides() -> Iterator[OpenSlides]:
    made = OpenSlides(60)
    yield made
    made.close()


@pytest.fixture
def fragile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(folder)
    __import__("fragile_viewed")
    return "fragile_viewed.Fragile"


def test_threads_get_the_tiles_of_many_slides_as_one_process_draws_them(folder: Path, slides: OpenSlides) -> None:
    files = [SlideFile(folder / f"{name}.svs") for name in ("sound", "crash", "hang", "corner", "all")]
    expected = {place: pictures.tile(files[0], FINEST, *place) for place in ((0, 0), (1, 0), (2, 1), (8, 2))}
    pictures.close_all()
    chance = random.Random(0)
    asked = [(chance.choice(files), *chance.choice(list(expected))) for _ in range(200)]
    with ThreadPoolExecutor(8) as pool:
        tiles = list(pool.map(lambda one: slides.tile(one[0], FINEST, one[1], one[2]), asked))
    assert all(tile == expected[one[1:]] for tile, one in zip(tiles, asked, strict=True))
    assert slides.tile(files[0], FINEST, 9, 0) is None, "there is no such tile"


def test_pictures_are_kept_up_to_a_limit(folder: Path, slides: OpenSlides, monkeypatch: pytest.MonkeyPatch) -> None:
    file = SlideFile(folder / "sound.svs")
    one = slides.tile(file, FINEST, 1, 1)
    assert one is not None
    assert slides.tile(file, FINEST, 1, 1) is one
    monkeypatch.setattr(open_slides, "PICTURE_BYTES", 2 * len(one))
    for column in range(4):
        slides.tile(file, FINEST, column, 0)
    assert sum(map(len, slides._pictures.values())) <= 2 * len(one)


def test_a_slide_that_is_not_there_is_an_error_each_time(tmp_path: Path, slides: OpenSlides) -> None:
    for _ in range(2):
        with pytest.raises(LongslideError, match="No such file"):
            slides.tile(SlideFile(tmp_path / "a.svs"), 0, 0, 0)


def test_a_slide_over_which_the_library_crashes_is_said_and_the_others_are_shown(
    folder: Path, slides: OpenSlides, fragile: str
) -> None:
    crash, sound = (SlideFile(folder / f"{name}.svs", reader=fragile) for name in ("crash", "sound"))
    for _ in range(3):
        with pytest.raises(LongslideError, match=r"crash\.svs: the library that reads it crashed \(SIGSEGV\)"):
            slides.tile(crash, FINEST, 0, 0)
    assert [state.crashes for state in slides._states.values()] == [1], "no other process crashes over it"
    assert slides.tile(sound, FINEST, 0, 0) is not None
    shutil.copy(folder / "sound.svs", folder / "crash-new.svs")
    (folder / "crash-new.svs").replace(folder / "crash.svs")
    with pytest.raises(LongslideError, match="crashed"):
        slides.facts(crash)
    assert {file.path.stem: state.crashes for file, state in slides._states.items()} == {"crash": 1, "sound": 0}


def test_one_bad_place_costs_one_tile_and_a_slide_of_bad_places_is_given_up(
    folder: Path, slides: OpenSlides, fragile: str
) -> None:
    corner, whole = (SlideFile(folder / f"{name}.svs", reader=fragile) for name in ("corner", "all"))
    for _ in range(MOST_CRASHES + 1):
        with pytest.raises(LongslideError, match="crashed"):
            slides.tile(corner, FINEST, 0, 0)
        assert slides.tile(corner, FINEST, 2, 1) is not None
    for row in range(MOST_CRASHES):
        with pytest.raises(LongslideError, match="crashed"):
            slides.tile(whole, FINEST, 1, row)
    with pytest.raises(LongslideError, match="Open its page again to try once more"):
        slides.tile(whole, FINEST, 0, 0)
    assert {file.path.stem: state.crashes for file, state in slides._states.items()} == {
        "corner": 1,
        "all": MOST_CRASHES,
    }, "neither is tried again"
    assert slides.facts(whole).dimensions == (2304, 768)


def test_a_slide_that_hangs_holds_nobody_up_and_all_who_wait_for_it_hear_of_its_end(
    folder: Path, slides: OpenSlides, fragile: str
) -> None:
    hang, sound = (SlideFile(folder / f"{name}.svs", reader=fragile) for name in ("hang", "sound"))
    ended: list[str] = []

    def ask() -> None:
        with pytest.raises(LongslideError) as error:
            slides.tile(hang, FINEST, 0, 0)
        ended.append(str(error.value))

    waiting = [threading.Thread(target=ask) for _ in range(6)]
    for thread in waiting:
        thread.start()
    assert slides.tile(sound, FINEST, 0, 0) is not None
    assert not ended, "it is still hanging"
    [held] = [process for process in slides._all if process.reading is not None]
    assert held.watched._process is not None
    held.watched._process.kill()
    for thread in waiting:
        thread.join(10)
    assert len(ended) == 6, "one waited for it, the others hear of it"
    assert all("hang.svs: the library that reads it crashed" in text for text in ended)


def test_a_slide_that_takes_too_long_is_not_asked_again_until_somebody_wants_it(folder: Path, fragile: str) -> None:
    hang = SlideFile(folder / "hang.svs", reader=fragile)
    slides = OpenSlides(1)
    with pytest.raises(LongslideError, match=r"hang\.svs: not done within 1 s"):
        slides.tile(hang, FINEST, 0, 0)
    with pytest.raises(LongslideError, match="Open its page again to try once more"):
        slides.tile(hang, FINEST, 2, 1)
    slides.try_again(hang)
    with pytest.raises(LongslideError, match=r"--slide-timeout$"):
        slides.tile(hang, FINEST, 2, 1)
    slides.close()
    with pytest.raises(LongslideError, match="the viewer was ended"):
        slides.tile(SlideFile(folder / "sound.svs"), FINEST, 0, 0)

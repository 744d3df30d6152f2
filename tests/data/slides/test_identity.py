"""Whether a slide file is the one something was made of."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
from longslide import LongslideError, open_slide, write_synthetic_slide
from longslide.data.slides.identity import SlideIdentity


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_synthetic_slide(tmp_path / "a.svs", size=(600, 500))


@pytest.fixture
def recorded(slide: Path) -> SlideIdentity:
    with open_slide(slide) as opened:
        return SlideIdentity.of(opened)


def test_an_untouched_slide_is_not_opened(slide: Path, recorded: SlideIdentity) -> None:
    os.chmod(slide, 0)  # nobody but root can open it now
    assert dataclasses.replace(recorded, quickhash="another").mismatch(slide) is None


def test_a_moved_slide_is_known_by_its_image_data(slide: Path, recorded: SlideIdentity, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    moved = Path(shutil.copy(slide, tmp_path / "moved"))
    assert recorded.mismatch(moved) is None
    other = write_synthetic_slide(tmp_path / "moved" / "a.svs", size=(600, 500), seed=3)
    assert f"made of another slide, {slide}" in str(recorded.mismatch(other))
    same_bytes = dataclasses.replace(recorded, size=other.stat().st_size)
    assert f"made of another slide, {slide}" in str(same_bytes.mismatch(other)), "by its quickhash"


def test_a_slide_written_again_at_its_place_is_another_one(slide: Path, recorded: SlideIdentity) -> None:
    content = slide.read_bytes()
    slide.write_bytes(content)
    os.utime(slide, ns=(0, (recorded.modified or 0) + 1_000_000))
    assert recorded.mismatch(slide) == "made before the slide file was written again"


def test_what_recorded_less_is_compared_by_what_there_is(slide: Path, recorded: SlideIdentity, tmp_path: Path) -> None:
    assert SlideIdentity().mismatch(slide) is None, "files of other tools name no slide"
    earlier = SlideIdentity(recorded.path, recorded.quickhash)
    assert earlier.mismatch(slide) is None
    write_synthetic_slide(slide, size=(600, 500), seed=3)
    assert "made of another slide" in str(earlier.mismatch(slide))
    path_alone = SlideIdentity(recorded.path)
    assert path_alone.mismatch(slide) is None
    assert "made of another slide" in str(path_alone.mismatch(tmp_path / "other" / "a.svs"))


def test_a_slide_that_cannot_be_compared_is_refused(recorded: SlideIdentity, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    broken = tmp_path / "other" / "a.svs"
    broken.write_bytes(b"x" * (recorded.size or 0))
    with pytest.raises(LongslideError, match=r"other/a\.svs"):
        recorded.mismatch(broken)

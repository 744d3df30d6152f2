"""Slides are read from copies on a local disk, which are no more than the budget allows and are gone afterwards."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from classifier_files import ENCODER
from longslide import LongslideError, embed, read_features, write_synthetic_slide
from longslide.data.slides.parts import files_of
from longslide.pipeline.embed.local_copies import LocalCopies


def files(folder: Path, *sizes: int) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{i}.svs" for i in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(os.urandom(size))
    return paths


def test_copies_take_no_more_than_the_budget_and_later_slides_wait_for_earlier_ones(tmp_path: Path) -> None:
    slides = files(tmp_path / "slides", 600, 600, 5000)
    with LocalCopies(tmp_path / "cache", 1e-6, slides) as copies:
        second: list[Path] = []
        with copies.copy_of(slides[0]) as first:
            assert first.parent != slides[0].parent
            assert first.read_bytes() == slides[0].read_bytes()
            assert first.stat().st_mtime_ns == slides[0].stat().st_mtime_ns

            def read_second() -> None:
                with copies.copy_of(slides[1]) as copy:
                    second.append(copy)

            thread = threading.Thread(target=read_second)
            thread.start()
            thread.join(0.3)
            assert thread.is_alive(), "there is no room for both"
        thread.join(10)
        assert second[0].parent != slides[1].parent
        with copies.copy_of(slides[2]) as third:
            assert third == slides[2], "larger than the budget: read where it is"
        with copies.copy_of(slides[1]), copies.copy_of(slides[0]) as first:
            assert first == slides[0], "a slide never waits for one that ends after it"
    assert list((tmp_path / "cache").iterdir()) == []


def test_slides_that_come_one_by_one_wait_in_the_order_in_which_they_come(tmp_path: Path) -> None:
    slides = files(tmp_path / "slides", 600, 600)
    with LocalCopies(tmp_path / "cache", 1e-6, []) as copies:
        for slide in reversed(slides):
            copies.expect(slide)
        later: list[Path] = []
        with copies.copy_of(slides[1]):

            def read_later() -> None:
                with copies.copy_of(slides[0]) as copy:
                    later.append(copy)

            thread = threading.Thread(target=read_later)
            thread.start()
            thread.join(0.3)
            assert thread.is_alive()
        thread.join(10)
        assert later[0].parent != slides[0].parent, "a copy, once there was room"


def test_a_slide_of_several_files_is_copied_whole(tmp_path: Path) -> None:
    slide = tmp_path / "case.mrxs"
    slide.write_bytes(b"preview")
    (tmp_path / "case" / "more").mkdir(parents=True)
    (tmp_path / "case" / "Slidedat.ini").write_text("[GENERAL]")
    (tmp_path / "case" / "more" / "Data0000.dat").write_bytes(b"pixels")
    (tmp_path / "other.svs").write_bytes(b"another slide")
    assert files_of(slide)[0] == slide
    with LocalCopies(tmp_path / "cache", None, [slide]) as copies, copies.copy_of(slide) as copy:
        assert sorted(p.relative_to(copy.parent).as_posix() for p in copy.parent.rglob("*") if p.is_file()) == [
            "case.mrxs", "case/Slidedat.ini", "case/more/Data0000.dat",
        ]  # fmt: skip


@pytest.mark.skipif("LONGSLIDE_TEST_CASES" not in os.environ, reason="LONGSLIDE_TEST_CASES is not set")
def test_a_dicom_slide_is_its_series() -> None:
    folder = Path(os.environ["LONGSLIDE_TEST_CASES"]) / "dicom_two_series"
    assert sorted(path.name[:2] for path in files_of(next(folder.glob("s2_*")))) == ["s2"] * 3


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_copied(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LongslideError, match=r"file/cache: cannot hold copies .* --cache-dir"):
        LocalCopies(tmp_path / "file" / "cache", None, [])


def test_embedding_from_copies_gives_the_same_files_of_the_same_slides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    for name in "abc":
        write_synthetic_slide(slides / f"{name}.svs", size=(1024, 768))
    encoder = tmp_path / "tiny.yaml"
    encoder.write_text(ENCODER)
    options: dict[str, Any] = {"tile_encoder": encoder, "tile_checkpoint": "random", "device": "cpu"}
    read: list[Path] = []

    class Watched(LocalCopies):
        @contextmanager
        def copy_of(self, slide: Path) -> Iterator[Path]:
            with super().copy_of(slide) as copy:
                read.append(copy)
                yield copy

    embed(slides, tmp_path / "plain", **options)
    monkeypatch.setattr("longslide.pipeline.embed.embed.LocalCopies", Watched)
    embed(slides, tmp_path / "copied", cache_dir=tmp_path / "cache", **options)
    assert [path.is_relative_to(tmp_path / "cache") for path in read] == [True] * 3
    assert list((tmp_path / "cache").iterdir()) == []
    for name in "abc":
        plain, copied = (read_features(tmp_path / folder / f"{name}.h5") for folder in ("plain", "copied"))
        assert (plain.features == copied.features).all()
        assert plain.slide == copied.slide
    again = embed(slides, tmp_path / "copied", **options)
    assert [result.reason for result in again] == ["already complete"] * 3

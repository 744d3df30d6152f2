"""What a folder of slides is searched for, and what is said of the rest."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from longslide import LongslideError, SlideReader, open_slide, register
from longslide.data.slides.base import READERS
from longslide.data.slides.folder import looked_at, read_folder
from longslide.data.slides.slide_table import find_slides
from longslide.pipeline.cli import main


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_what_was_not_looked_at_is_listed_by_suffix_and_count_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "a.svs", "b.ome.tif", "c.QPTIFF", "d.ptif", "e.jp2", "f.czi", "sub/g.tif")
    touch(tmp_path, "h.sdpc", "sub/i.SDPC", "j.zip", "notes.xml", "README", "a.jpg", ".hidden.vsi")
    found = find_slides(tmp_path)
    assert [entry.path.name for entry in found] == [
        "a.svs",
        "b.ome.tif",
        "c.QPTIFF",
        "d.ptif",
        "e.jp2",
        "f.czi",
        "g.tif",
    ]
    [record] = caplog.records
    assert record.getMessage() == (f"{tmp_path}: not looked at: 2 .sdpc, 1 without suffix, 1 .jpg, 1 .xml, 1 .zip")


def test_nothing_is_said_of_the_parts_of_slides_and_of_pictures_of_an_earlier_job(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "a.mrxs", "a/Data0000.dat", "a/Slidedat.ini", "case/1.dcm", "case/2.dcm")
    touch(tmp_path, "b.vsi", "_b_/stack1/frame_t.ets")
    touch(tmp_path, "out/summary.csv", "out/qc/a.jpg")
    assert [entry.slide_id for entry in find_slides(tmp_path)] == ["a", "b", "case"]
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path}: not looked at: 1 .csv"]


def test_a_folder_without_slides_says_what_is_in_it(tmp_path: Path) -> None:
    touch(tmp_path, "a.sdpc", "b.sdpc")
    with pytest.raises(LongslideError, match=r"no slides in this folder \(looked for .*; not looked at: 2 \.sdpc\)"):
        find_slides(tmp_path)


class ArrayReader(SlideReader):
    """Slides stored as `.npy` arrays."""

    SUFFIXES = frozenset({".npy"})

    def __init__(self, path: Path) -> None:
        self.pixels = np.load(path)

    def read_region(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        return self.pixels[y : y + height, x : x + width]

    def close(self) -> None: ...


def test_a_folder_is_searched_for_the_suffixes_of_outside_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.npy", "b.svs")
    assert [entry.slide_id for entry in find_slides(tmp_path)] == ["b"]
    assert [entry.slide_id for entry in find_slides(tmp_path, reader=ArrayReader)] == ["a"]
    monkeypatch.setattr(READERS, "_classes", dict(READERS._classes))
    register("array", ArrayReader)
    assert ".npy" in looked_at()
    assert [entry.slide_id for entry in find_slides(tmp_path)] == ["a", "b"]
    assert read_folder(tmp_path, looked_at("array")).passed_over == {".svs": 1}


def test_equal_names_in_different_folders_go_together_with_ids_of_paths(tmp_path: Path) -> None:
    touch(tmp_path, "site_a/1.svs", "site_b/1.svs", "site_b/deep/1.svs", "site_b/case/x.dcm", "2.svs")
    with pytest.raises(LongslideError, match=r"two slides have the id '1': .*or give --id-from path"):
        find_slides(tmp_path)
    ids = [entry.slide_id for entry in find_slides(tmp_path, id_from="path")]
    assert ids == ["2", "site_a__1", "site_b__1", "site_b__case", "site_b__deep__1"]
    both = find_slides([tmp_path / "site_a", tmp_path / "site_b"], id_from="path")
    assert [entry.slide_id for entry in both] == ids[1:]


def test_ids_of_paths_are_of_files_and_cells_as_they_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "site_a/1.svs", "site_b/1.svs")
    monkeypatch.chdir(tmp_path)
    assert [entry.slide_id for entry in find_slides(["site_a/1.svs", "./site_b/1.svs"], id_from="path")] == [
        "site_a__1",
        "site_b__1",
    ]
    rows = [{"slide": "../site_a/1.svs", "slide_id": None}, {"slide": "../site_b/1.svs", "slide_id": "mine"}]
    (tmp_path / "tables").mkdir()
    pd.DataFrame(rows).to_csv("tables/t.csv", index=False)
    assert [entry.slide_id for entry in find_slides("tables/t.csv", id_from="path")] == ["site_a__1", "mine"]


def test_the_command_line_says_what_was_not_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path, "slides/a.svs", "slides/b.sdpc")
    assert main(["doctor", str(tmp_path / "slides")]) == 1
    assert f"{tmp_path / 'slides'}: not looked at: 1 .sdpc" in capsys.readouterr().err


def test_a_folder_that_is_a_slide_is_one_and_its_chunks_are_not_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "a.ome.zarr/0/c/0/0", "a.ome.zarr/zarr.json", "sub/b.zarr/.zattrs", "c.svs")
    assert [entry.slide_id for entry in find_slides(tmp_path)] == ["a", "c", "b"]
    assert [entry.slide_id for entry in find_slides(tmp_path / "a.ome.zarr")] == ["a"]
    assert not caplog.records
    assert [entry.slide_id for entry in find_slides(tmp_path, reader="openslide")] == ["c"]
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path}: not looked at: 2 .zarr"]


@pytest.mark.parametrize("name", ["a.isyntax", "a.vsi", "a.czi"])
def test_a_format_of_an_optional_reader_says_what_to_install(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastslide", None)
    touch(tmp_path, name, "_a_/stack1/frame_t.ets")
    with pytest.raises(LongslideError, match=r"need the package fastslide: pip install 'longslide\[fastslide\]'"):
        open_slide(tmp_path / name)


def test_a_zarr_folder_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    touch(tmp_path, "a.ome.zarr/zarr.json")
    with pytest.raises(LongslideError, match=r"OME-Zarr needs the package zarr: pip install 'longslide\[ome-zarr\]'"):
        open_slide(tmp_path / "a.ome.zarr")

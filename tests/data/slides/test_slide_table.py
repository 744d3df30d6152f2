"""Files, folders and tables as the slides of a job."""

import os
from pathlib import Path

import pandas as pd
import pytest
from longslide.data.slides.dicom import series_of
from longslide.data.slides.slide import open_slide
from longslide.data.slides.slide_table import SlideEntry, find_slides, id_of_name

from ..refusals import refused


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def write_table(path: Path, rows: list[dict[str, object]]) -> Path:
    frame = pd.DataFrame(rows)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    return path


def refusal(*inputs: Path) -> str:
    return refused(find_slides, inputs)


def test_files_keep_the_users_order_whatever_their_suffix(tmp_path: Path) -> None:
    touch(tmp_path / "b.svs", tmp_path / "a.unusual")
    entries = find_slides([tmp_path / "b.svs", str(tmp_path / "a.unusual")])
    assert entries == [SlideEntry(tmp_path / "b.svs", "b"), SlideEntry(tmp_path / "a.unusual", "a")]


@pytest.mark.parametrize("suffix", [".ome.tif", ".OME.TIFF", ".ome.btf"])
def test_the_id_of_an_ome_file_is_its_name_without_ome_wherever_ids_are_made(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path / "slides" / f"a.1{suffix}")
    table = write_table(tmp_path / "table.csv", [{"slide": f"slides/a.1{suffix}"}])
    for given in (tmp_path / "slides", tmp_path / "slides" / f"a.1{suffix}", table):
        assert [entry.slide_id for entry in find_slides(given)] == ["a.1"]
    assert find_slides(tmp_path, id_from="path")[0].slide_id == "slides__a.1"
    assert id_of_name(f"a.1{suffix}", known={"a.1"}) == "a.1"  # as a table of labels may name it
    assert id_of_name(f"a.1{suffix}", known={f"a.1{suffix}"}) == f"a.1{suffix}"


def test_the_id_of_an_ome_zarr_folder_is_its_name_without_ome(tmp_path: Path) -> None:
    (tmp_path / "a.ome.zarr").mkdir()
    assert [entry.slide_id for entry in find_slides(tmp_path)] == ["a"]


def test_of_other_names_only_the_suffix_goes(tmp_path: Path) -> None:
    touch(tmp_path / "a.ome.svs", tmp_path / "b.ome", tmp_path / "chrome.tif")
    assert [find_slides(path)[0].slide_id for path in sorted(tmp_path.iterdir())] == ["a.ome", "b", "chrome"]


def test_a_single_path_is_a_list_of_one(tmp_path: Path) -> None:
    touch(tmp_path / "a.svs")
    assert find_slides(str(tmp_path / "a.svs")) == find_slides([tmp_path / "a.svs"]) == find_slides(tmp_path)


def test_a_folder_is_searched_through_its_subfolders(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("z.SVS", "sub/deep/a.ndpi", "sub/b.tif", "notes.txt", "sub/table.xlsx")))
    assert sorted(entry.slide_id for entry in find_slides([tmp_path])) == ["a", "b", "z"]


def test_hidden_and_mac_files_are_no_slides(tmp_path: Path) -> None:
    touch(tmp_path / "a.svs", tmp_path / "._a.svs", tmp_path / ".cache" / "b.svs", tmp_path / "__MACOSX" / "._c.svs")
    assert [entry.path.name for entry in find_slides([tmp_path])] == ["a.svs"]


def test_pictures_beside_slides_are_no_slides_but_a_folder_of_pictures_alone_is_taken(tmp_path: Path) -> None:
    touch(tmp_path / "slides/a.vms", tmp_path / "slides/a(0,0).jpg", tmp_path / "slides/features/qc/a.jpg")
    touch(tmp_path / "pictures/b.png", tmp_path / "pictures/c.jpg")
    assert [entry.slide_id for entry in find_slides([tmp_path / "slides"])] == ["a"]
    assert [entry.slide_id for entry in find_slides([tmp_path / "pictures"])] == ["b", "c"]


def test_a_link_to_a_slide_that_is_gone_is_not_passed_over(tmp_path: Path) -> None:
    touch(tmp_path / "a.svs")
    (tmp_path / "b.svs").symlink_to("nowhere.svs")
    assert [entry.slide_id for entry in find_slides([tmp_path])] == ["a", "b"]


def test_the_pictures_of_an_earlier_job_are_no_slides(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a.png", "features/summary.csv", "features/a.h5", "features/qc/a.jpg")))
    assert [entry.path.name for entry in find_slides(tmp_path)] == ["a.png"]


@pytest.mark.parametrize("stem", ["a", "S21.1234"])
def test_the_data_folder_of_an_mrxs_is_no_slide(tmp_path: Path, stem: str) -> None:
    touch(tmp_path / f"{stem}.mrxs", *(tmp_path / stem / name for name in ("Index.dat", "label.tif", "deeper/x.tif")))
    assert [entry.path.name for entry in find_slides([tmp_path])] == [f"{stem}.mrxs"]


def test_a_folder_of_dicom_files_is_one_slide_named_after_the_folder(tmp_path: Path) -> None:
    for case in ("case-1", "case-2"):
        touch(*(tmp_path / case / f"level-{number}.dcm" for number in range(3)))
    entries = find_slides([tmp_path])
    assert [entry.slide_id for entry in entries] == ["case-1", "case-2"]
    assert [entry.path.name for entry in entries] == ["level-0.dcm"] * 2
    assert [entry.slide_id for entry in find_slides([tmp_path / "case-2"])] == ["case-2"]


def test_an_empty_folder_or_a_missing_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no slides in this folder" in refusal(tmp_path / "empty")
    assert "missing.svs: no such file" in refusal(tmp_path / "missing.svs")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_says_everything_about_a_slide(tmp_path: Path, suffix: str) -> None:
    absolute = tmp_path / "elsewhere" / "c.svs"
    table = write_table(
        tmp_path / f"cohort{suffix}",
        [
            {
                "slide": "slides/a.svs",
                "slide_id": "007",
                "mpp": 0.265,
                "patient_id": "01",
                "tissue_mask": "masks/a.png",
            },
            {"slide": str(absolute), "slide_id": None, "mpp": None, "patient_id": None, "tissue_mask": None},
        ],
    )
    assert find_slides([table]) == [
        SlideEntry(tmp_path / "slides/a.svs", "007", 0.265, "01", tmp_path / "masks/a.png"),
        SlideEntry(absolute, "c"),
    ]


def test_an_mpp_for_all_gives_way_to_the_tables(tmp_path: Path) -> None:
    table = write_table(
        tmp_path / "cohort.csv", [{"slide": "a.svs", "slide_mpp": 0.265}, {"slide": "b.svs", "slide_mpp": None}]
    )
    assert [entry.slide_mpp for entry in find_slides([table], slide_mpp=0.5)] == [0.265, 0.5]


def test_ids_are_text_and_an_mpp_may_be_unknown(tmp_path: Path) -> None:
    (tmp_path / "cohort.csv").write_text("slide,slide_id,patient_id,mpp\na.svs,NA,null,NA\nb.svs,007,1e3,0.5\n")
    entries = find_slides([tmp_path / "cohort.csv"])
    assert [(entry.slide_id, entry.patient_id, entry.slide_mpp) for entry in entries] == [
        ("NA", None, None),  # an id may be NA, but all patients that are not known are not one patient
        ("007", "1e3", 0.5),
    ]


def test_a_table_without_the_column_says_which_it_has(tmp_path: Path) -> None:
    message = refusal(write_table(tmp_path / "cohort.csv", [{"filename": "a.svs", "label": 1}]))
    assert "cohort.csv: no column `slide`; it has filename, label" in message


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_broken_table_is_one_clear_line(tmp_path: Path, suffix: str) -> None:
    table = tmp_path / f"cohort{suffix}"
    for content in (b"", b"\x00\xff\xfe\x81" * 50):
        table.write_bytes(content)
        assert str(table) in refusal(table)


def test_a_row_without_slide_or_with_a_strange_mpp_is_named(tmp_path: Path) -> None:
    table = write_table(tmp_path / "a.csv", [{"slide": "a.svs", "mpp": "0.5"}, {"slide": "b.svs", "mpp": "40x"}])
    assert "row 2 has `mpp` '40x', not a number" in refusal(table)
    table = write_table(tmp_path / "b.csv", [{"slide": "a.svs", "mpp": "0.5"}, {"slide": None, "mpp": "1"}])
    assert "row 2 has no `slide`" in refusal(table)


def test_two_files_with_one_stem_are_refused_and_both_named(tmp_path: Path) -> None:
    touch(tmp_path / "x/a.svs", tmp_path / "y/A.ndpi")
    message = refusal(tmp_path)
    assert str(tmp_path / "x/a.svs") in message
    assert str(tmp_path / "y/A.ndpi") in message
    assert "slide_id" in message


def test_the_same_file_twice_is_one_slide(tmp_path: Path) -> None:
    touch(tmp_path / "a.svs")
    assert [entry.slide_id for entry in find_slides([tmp_path / "a.svs", tmp_path, tmp_path / "a.svs"])] == ["a"]


def test_a_slide_id_column_tells_one_stem_apart_but_not_one_id(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"slide": "x/a.svs", "slide_id": "x-a"}, {"slide": "y/a.svs", "slide_id": "y-a"}]
    assert [entry.slide_id for entry in find_slides([write_table(tmp_path / "t.csv", rows)])] == ["x-a", "y-a"]
    rows[1]["slide_id"] = "x-a"
    assert "two slides have the id 'x-a'" in refusal(write_table(tmp_path / "t.csv", rows))


@pytest.mark.parametrize("slide_id", ["a/b", "..", "a\\b", ".hidden"])
def test_an_id_that_cannot_be_a_file_name_is_refused(tmp_path: Path, slide_id: str) -> None:
    table = write_table(tmp_path / "t.csv", [{"slide": "a.svs", "slide_id": slide_id}])
    assert "cannot be a file name" in refusal(table)


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".parquet", ".xlsx", "excel"])
def test_the_same_table_in_any_form_lists_the_same_slides(tmp_path: Path, kind: str) -> None:
    frame = pd.DataFrame({"Slide": ["a.svs", "b.svs"], "slide_mpp": [0.253, 0.5], "Case ID": ["007", "1e5"]})
    table = tmp_path / f"t{'.csv' if kind == 'excel' else kind}"
    if kind == ".parquet":
        frame.to_parquet(table)
    elif kind == ".xlsx":
        frame.to_excel(table, index=False)
    elif kind == "excel":
        table.write_bytes(frame.to_csv(index=False, sep=";", decimal=",").encode("utf-8-sig"))
    else:
        table.write_text(frame.to_csv(index=False, sep="," if kind == ".csv" else "\t"))
    assert find_slides([table]) == [
        SlideEntry(tmp_path / "a.svs", "a", 0.253, "007"),
        SlideEntry(tmp_path / "b.svs", "b", 0.5, "1e5"),
    ]


def test_a_column_that_may_be_the_patient_is_asked_for_where_patients_matter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = write_table(tmp_path / "t.csv", [{"slide": "a.svs", "subject": "p"}])
    assert "is the column subject the patient? Give --patient-column subject" in refusal(table)
    assert [entry.patient_id for entry in find_slides([table], patients="subject")] == ["p"]
    assert [entry.patient_id for entry in find_slides([table], patients="none")] == [None]
    assert [entry.patient_id for entry in find_slides([table], ask=False)] == [None]
    assert "Give `predict` --patient-column subject" in caplog.text


def write_dicom(path: Path, series: str, *, implicit: bool = False) -> None:
    """A DICOM file as far as its series, after a sequence of unknown length."""

    def element(group: int, number: int, kind: bytes, value: bytes, plain: bool = False) -> bytes:
        tag = group.to_bytes(2, "little") + number.to_bytes(2, "little")
        return tag + (len(value).to_bytes(4, "little") if plain else kind + len(value).to_bytes(2, "little")) + value

    syntax = b"1.2.840.10008.1.2\0" if implicit else b"1.2.840.10008.1.2.1\0"
    path.parent.mkdir(parents=True, exist_ok=True)
    sequence = b"\x08\x00\x40\x11" + (b"" if implicit else b"SQ\0\0") + b"\xff\xff\xff\xff\xfe\xff\xdd\xe0\0\0\0\0"
    path.write_bytes(
        bytes(128)
        + b"DICM"
        + element(2, 0x10, b"UI", syntax)
        + element(8, 8, b"CS", b"ORIGINAL", implicit)
        + sequence
        + element(0x20, 0xE, b"UI", series.encode(), implicit)
    )


@pytest.mark.parametrize("implicit", [False, True])
def test_each_series_of_a_folder_of_dicom_files_is_one_slide(tmp_path: Path, implicit: bool) -> None:
    for name, series in (("b1", "1.2.3.4"), ("a2", "1.2.3.5"), ("a1", "1.2.3.4"), ("b2", "1.2.3.5")):
        write_dicom(tmp_path / "case" / f"{name}.dcm", series, implicit=implicit)
    assert [(entry.slide_id, entry.path.name) for entry in find_slides(tmp_path)] == [
        ("a1", "a1.dcm"),
        ("a2", "a2.dcm"),
    ]
    for name in ("a2", "b2"):
        (tmp_path / "case" / f"{name}.dcm").unlink()
    assert [entry.slide_id for entry in find_slides(tmp_path)] == ["case"]
    assert [entry.slide_id for entry in find_slides(tmp_path / "case" / "b1.dcm")] == ["b1"]


def test_a_dicom_file_that_cannot_be_read_is_not_passed_over(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a.dcm", "1.2.3.4")
    touch(tmp_path / "b.dcm")
    assert [entry.slide_id for entry in find_slides(tmp_path)] == ["a", "b"]


def test_two_real_series_in_one_folder_are_two_slides() -> None:
    folder = os.environ.get("LONGSLIDE_TEST_CASES")
    if not folder:
        pytest.skip("LONGSLIDE_TEST_CASES, the folder with dicom_two_series, is not set")
    entries = find_slides(Path(folder) / "dicom_two_series")
    assert [entry.slide_id for entry in entries] == ["s1_34553435", "s2_51548755"]
    with open_slide(entries[0].path) as one, open_slide(entries[1].path) as other:
        assert one.quickhash != other.quickhash
        for entry, slide in zip(entries, (one, other), strict=True):
            assert slide.properties["dicom.SeriesInstanceUID"] == series_of(entry.path)

"""`doctor` over a cohort: all duplicates, labels, possible splits, a table to start from."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from longslide import LongslideError, doctor, embed, write_synthetic_slide
from longslide.data.cohort.cohort import read_cohort
from longslide.data.cohort.stratification import make_splits
from longslide.data.slides.slide_table import find_slides
from longslide.pipeline.cli import main
from longslide.pipeline.doctor.label_check import LabelCheck, check_labels
from longslide.pipeline.doctor.slide_check import SlideCheck
from PIL import Image


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites with slides of equal names; `2` of either site is one image, and so are two more."""
    folder = tmp_path_factory.mktemp("cohort")
    for seed, name in enumerate(["a/1", "a/2", "b/1"]):
        (folder / name).parent.mkdir(exist_ok=True)
        write_synthetic_slide(folder / f"{name}.svs", size=(1024, 768), seed=seed)
    for copy in ("b/2", "b/3", "b/4"):
        shutil.copy(folder / "a/2.svs", folder / f"{copy}.svs")
    return folder


def write_csv(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def ids_and_paths(names: list[str]) -> dict[str, Path]:
    return {name: Path(f"{name}.svs") for name in names}


def test_every_copy_of_a_slide_is_listed(slides: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [check for check in doctor(slides, tile_px=64, id_from="path") if isinstance(check, SlideCheck)]
    assert [check.slide_id for check in checks] == ["a__1", "a__2", "b__1", "b__2", "b__3", "b__4"]
    assert [check.problem for check in checks] == ["", "", "", *["same image as a__2"] * 3]
    printed = capsys.readouterr().out
    assert printed.count("same image as a__2") == 3


def test_equal_names_need_ids_of_paths_on_the_command_line_too(
    slides: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(slides)]) == 2
    assert "--id-from path" in capsys.readouterr().err
    assert main(["doctor", str(slides / "a"), str(slides / "b" / "1.svs"), "--id-from", "path", "--tile-px", "64"]) == 0


def test_labels_are_counted_by_class_site_and_patient_and_nobody_is_left_out_silently(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_csv(
        tmp_path / "labels.csv",
        [
            {"slide_id": "a__1", "case_id": "P1", "site": "a", "subtype": "luminal"},
            {"slide_id": "a__2", "case_id": "P2", "site": "a", "subtype": "basal"},
            {"slide_id": "b__1", "case_id": "P1", "site": "b", "subtype": "luminal"},
            {"slide_id": "b__2", "case_id": "P3", "site": "b", "subtype": "luminal"},
            {"slide_id": "b__3", "case_id": "P3", "site": "b", "subtype": ""},
            *({"slide_id": f"gone{n}", "case_id": "P9", "site": "c", "subtype": "basal"} for n in range(5)),
        ],
    )
    [labels] = [
        check
        for check in doctor(slides, tile_px=64, id_from="path", label=table, label_column="subtype")
        if isinstance(check, LabelCheck)
    ]
    assert labels.task == "binary"
    assert (labels.slides, labels.patients) == (4, 3)
    assert labels.classes == {"basal": (1, 1), "luminal": (3, 2)}
    assert labels.sites == {"a": (2, 2), "b": (2, 2)}
    assert labels.without_label == ("b__3", "b__4")
    assert labels.without_slide == tuple(f"gone{n}" for n in range(5))
    assert labels.folds == 0
    assert labels.twins == (("a__2", "b__2"),)
    assert "class 'basal' has 1 patient," in labels.problem
    printed = capsys.readouterr().out
    for words in ("gone0, gone1, gone2, gone3, gone4", "b__3, b__4", "luminal: 3 slides of 2 patients"):
        assert words in printed


def test_one_image_with_two_labels_is_a_problem(slides: Path, tmp_path: Path) -> None:
    rows = [{"slide_id": f"s{n}", "patient_id": f"P{n}", "label": n % 2} for n in range(12)]
    for n in range(12):
        shutil.copy(slides / "a" / "1.svs", tmp_path / f"s{n}.svs") if n < 2 else write_synthetic_slide(
            tmp_path / f"s{n}.svs", size=(512, 512), seed=n
        )
    table = write_csv(tmp_path / "labels.csv", rows)
    [labels] = [check for check in doctor(tmp_path, tile_px=64, label=table) if isinstance(check, LabelCheck)]
    assert labels.problem == f"{table}: one image under two rows that differ: s0 and s1; leave one of each out"


@pytest.mark.parametrize("patients", [3, 4, 5, 9, 12])
def test_the_splits_that_are_promised_are_those_that_training_can_make(tmp_path: Path, patients: int) -> None:
    names = [f"s{n}" for n in range(patients * 2)]
    rows = [
        {"slide_id": name, "patient_id": f"P{n // 2 * 2 + n % 2}", "label": "ab"[n % 2]} for n, name in enumerate(names)
    ]
    check = check_labels(write_csv(tmp_path / "t.csv", rows), ids_and_paths(names))
    # Each class has `patients` patients; the test part of every fold needs one of each.
    assert check.folds == max(k for k in (1, 2, 3, 4, 5, 10) if k <= patients)
    cohort = read_cohort(tmp_path / "t.csv", ids_and_paths(names), task="binary")
    folds = make_splits(cohort, folds=check.folds)
    assert (folds.filter(like="fold_") == "test").sum(axis=1).eq(1).all() or check.folds == 1
    if check.folds < 10:
        with pytest.raises(LongslideError, match="fewer than the 10 folds need"):
            make_splits(cohort, folds=10)


@pytest.mark.parametrize(
    ("values", "task"),
    [
        (["x", "y"], "binary"),
        (["x", "y", "z"], "multiclass"),
        (["0", "1"], "binary"),
        ([f"{n}" for n in range(30)], "regression"),
        (["0.5", "1.5", "2"], "regression"),
    ],
)
def test_a_label_column_is_taken_for_what_it_looks_like(tmp_path: Path, values: list[str], task: str) -> None:
    names = [f"s{n}" for n in range(len(values) * 6)]
    rows = [{"slide_id": name, "label": values[n % len(values)]} for n, name in enumerate(names)]
    assert check_labels(write_csv(tmp_path / "t.csv", rows), ids_and_paths(names)).task == task


def test_survival_and_several_labels_are_counted_too(tmp_path: Path) -> None:
    names = [f"s{n}" for n in range(40)]
    rows = [
        {"slide_id": name, "time": 10 + n, "event": n % 4 == 0, "er": n % 2, "her2": n % 5 == 0}
        for n, name in enumerate(names)
    ]
    rows = [{key: int(cell) if isinstance(cell, bool) else cell for key, cell in row.items()} for row in rows]
    table = write_csv(tmp_path / "t.csv", rows)
    survival = check_labels(table, ids_and_paths(names), ["time", "event"], "survival")
    assert survival.classes == {"event": (10, 10), "censored": (30, 30)}
    assert survival.folds == 10
    several = check_labels(table, ids_and_paths(names), ["er", "her2"])
    assert (several.task, several.classes) == ("multilabel", {"er": (20, 20), "her2": (8, 8)})
    assert several.folds == 5


def test_sites_kept_apart_allow_as_many_folds_as_there_are_sites(tmp_path: Path) -> None:
    names = [f"s{n}" for n in range(60)]
    rows = [{"slide_id": name, "site": f"site{n % 4}", "label": n // 4 % 2} for n, name in enumerate(names)]
    check = check_labels(write_csv(tmp_path / "t.csv", rows), ids_and_paths(names))
    assert (check.folds, check.folds_with_sites_apart) == (10, 4)


def test_a_starter_table_is_taken_by_embed_and_fit_and_never_overwritten(slides: Path, tmp_path: Path) -> None:
    labels = write_csv(
        tmp_path / "labels.csv",
        [{"slide_id": f"{site}__1", "case_id": f"P{site}", "label": site, "age": 50} for site in "ab"],
    )
    table = slides / "slides.csv"
    doctor(slides, tile_px=64, id_from="path", label=labels, write_table=table)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["slide", "slide_id", "patient_id", "slide_mpp", "tissue_mask", "label", "age", "problem"]
    assert rows[0] == {
        "slide": "a/1.svs",
        "slide_id": "a__1",
        "patient_id": "Pa",
        "slide_mpp": "",
        "tissue_mask": "",
        "label": "a",
        "age": "50",
        "problem": "",
    }
    assert [row["problem"] for row in rows[3:]] == ["same image as a__2"] * 3
    assert find_slides(table)[0].path == slides / "a" / "1.svs"
    results = embed(table, tmp_path / "features", "vit_tiny_patch16_224", "random")
    assert [result.status for result in results] == ["done"] * 6
    cohort = read_cohort(table, tmp_path / "features", task="binary", all_classes=False, patients="none")
    assert list(cohort.rows["slide_id"]) == ["a__1", "b__1"]
    with pytest.raises(LongslideError, match="there is such a file already"):
        doctor(slides, tile_px=64, id_from="path", write_table=table)
    table.unlink()


def test_a_plain_image_says_how_much_memory_it_takes(tmp_path: Path) -> None:
    picture = np.full((6000, 5000, 3), 240, np.uint8)
    picture[1000:4000, 1000:4000] = (190, 90, 160)
    picture[1000:4000:7] = (150, 60, 130)
    Image.fromarray(picture).save(tmp_path / "flat.tif", dpi=(50_800, 50_800))
    check, _ = doctor(tmp_path / "flat.tif")
    assert isinstance(check, SlideCheck)
    assert check.memory_bytes == 6000 * 5000 * 4
    assert "takes 0.1 GB of memory" in check.remark or "takes 120.0 MB of memory" in check.remark


@pytest.mark.parametrize(
    "wrong",
    [
        {"label_column": "x"},
        {"label": "missing.csv"},
        {"write_table": "slides.xlsx"},
    ],
)
def test_wrong_usage_is_one_line(slides: Path, wrong: dict[str, str]) -> None:
    with pytest.raises(LongslideError) as caught:
        doctor(slides / "a", **wrong)
    assert len(str(caught.value).splitlines()) == 1


def test_a_table_of_labels_is_looked_at_before_there_are_slides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"slide_id": f"s{n}", "patient_id": f"P{n}", "subtype": "ab"[n % 2]} for n in range(12)]
    table = write_csv(tmp_path / "labels.csv", rows)
    assert main(["doctor", "--label", str(table), "--label-column", "subtype"]) == 0
    printed = capsys.readouterr().out
    assert "a: 6 slides of 6 patients, b: 6 slides of 6 patients" in printed
    assert "disk" not in printed, "nothing is said of slides that were not given"
    assert main(["doctor", "--label", str(table), "--label-column", "subtype", "--write-table", "t.csv"]) == 2
    assert main(["doctor"]) == 2
    assert "name slides, folders of slides or a table of them" in capsys.readouterr().err

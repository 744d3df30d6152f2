"""Patients of a prediction: each from all slides that the output folder has, whichever run they are of."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifier_files import write_classifier
from csv_rows import rows
from longslide import LongslideError, predict, read_features
from longslide.data.features.feature_file import write_features


def test_a_patient_is_the_mean_of_the_slides(home: Path, job: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "broken.svs").write_text("not a slide")
    table = tmp_path / "table.csv"
    table.write_text(
        "slide,patient_id\n"
        + "".join(
            f"{home}/slides/{name},{patient}\n" for name, patient in (("a.svs", "p1"), ("b.svs", "p1"), ("c.tif", "p2"))
        )
        + f"{tmp_path}/broken.svs,p2\n{tmp_path}/broken.svs,p3\n".replace("broken.svs,p3", "gone.svs,p3")
    )
    (tmp_path / "gone.svs").write_text("not a slide either")
    predictions = predict(**job | {"slides": [table], "tile_encoder": str(home / "tiny.yaml")})
    assert [one.level for one in predictions] == ["slide"] * 5 + ["patient"] * 3
    slides, (p1, p2, p3) = {one.slide_id: one for one in predictions[:5]}, predictions[5:]
    assert (p1.patient_id, p2.patient_id, p3.patient_id) == ("p1", "p2", "p3")
    mean = (slides["a"].probability["tumour"] + slides["b"].probability["tumour"]) / 2
    assert p1.probability["tumour"] == pytest.approx(mean, rel=1e-6)
    assert p2.probability == slides["c"].probability
    assert any("1 of 2 slides" in warning for warning in p2.warnings)
    assert p3.status == "failed"
    table_rows = rows(job["output"] / "predictions.csv")
    assert [(row["level"], row["patient_id"], row["slide_id"]) for row in table_rows] == [
        ("slide", "p1", "a"), ("slide", "p1", "b"), ("slide", "p2", "c"), ("patient", "p1", ""), ("patient", "p2", ""),
    ]  # fmt: skip


@pytest.mark.parametrize(("column", "options"), [("Case_ID", {}), ("subject", {"patient_column": "subject"})])
def test_patients_are_predicted_whatever_their_column_is_called(
    home: Path, job: dict[str, Any], tmp_path: Path, column: str, options: dict[str, str]
) -> None:
    table = tmp_path / "table.csv"
    table.write_text(f"slide;{column}\n{home}/slides/a.svs;p1\n", encoding="utf-8-sig")
    assert [one.patient_id for one in predict(**job | {"slides": [table]} | options)] == ["p1", "p1"]
    if options:
        with pytest.raises(LongslideError, match="is the column subject the patient"):
            predict(**job | {"slides": [table]})


def slide_table(path: Path, home: Path, **patients: str) -> Path:
    """A table of slides of `home`, `a="p1"` for the slide a of the patient p1."""
    files = {file.stem: file for file in (home / "slides").iterdir()}
    path.write_text("slide,patient_id\n" + "".join(f"{files[name]},{patient}\n" for name, patient in patients.items()))
    return path


def table_rows(job: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The rows of `predictions.csv`: slides by slide, patients by patient."""
    return {row["slide_id"] or row["patient_id"]: row for row in rows(job["output"] / "predictions.csv")}


@pytest.mark.parametrize("unit", ["slide", "patient"])
def test_slides_that_come_later_join_those_of_the_folder_and_their_patients(
    home: Path, job: dict[str, Any], tmp_path: Path, unit: str
) -> None:
    content = torch.load(home / "best.ckpt", weights_only=True)
    content["longslide"]["bag_unit"] = unit
    torch.save(content, tmp_path / "unit.ckpt")
    job |= {"checkpoint": str(tmp_path / "unit.ckpt")}
    every = slide_table(tmp_path / "every.csv", home, a="p1", b="p2", c="p1")
    predict(**job | {"slides": [every], "output": tmp_path / "at-once"})
    at_once = table_rows(job | {"output": tmp_path / "at-once"})
    assert list(at_once) == ["a", "b", "c", "p1", "p2"]

    predict(**job | {"slides": [slide_table(tmp_path / "first.csv", home, a="p1", b="p2")]})
    first = table_rows(job)
    found = predict(**job | {"slides": [slide_table(tmp_path / "second.csv", home, c="p1")]})
    assert [(one.slide_id, one.patient_id) for one in found] == [("c", "p1"), ("", "p1")], "what was asked about"
    assert table_rows(job) == at_once, "as if all had been predicted in one run"
    assert first["p1"] != at_once["p1"]
    assert {row["slide_id"] for row in rows(job["output"] / "summary.csv")} == {"a", "b", "c"}


def test_a_second_run_on_some_slides_without_their_table_keeps_all_rows(
    home: Path, job: dict[str, Any], tmp_path: Path
) -> None:
    predict(**job | {"slides": [slide_table(tmp_path / "table.csv", home, a="p1", b="p1", c="p2")]})
    before = (job["output"] / "predictions.csv").read_text()
    for options in ({}, {"overwrite": True}):
        found = predict(**job | {"slides": [home / "slides" / "b.svs"]}, **options)
        assert [one.patient_id for one in found] == ["p1", "p1"], "the folder knows whose slide it is"
        assert (job["output"] / "predictions.csv").read_text() == before


def test_a_slide_that_is_predicted_anew_changes_its_row_and_its_patient_alone(
    home: Path, job: dict[str, Any], tmp_path: Path
) -> None:
    job |= {"features": tmp_path / "features"}
    shutil.copytree(home / "features", job["features"])
    predict(**job | {"slides": [slide_table(tmp_path / "table.csv", home, a="p1", b="p1", c="p2")]})
    before = table_rows(job)
    features = read_features(home / "features" / "a.h5")
    write_features(job["features"] / "a.h5", dataclasses.replace(features, features=features.features[::-1] * 0.5))
    *_, p1 = predict(**job | {"slides": [home / "slides" / "a.svs"]}, overwrite=True)
    after = table_rows(job)
    assert {name for name in after if after[name] != before[name]} == {"a", "p1"}
    probabilities = [float(after[name]["probability_tumour"]) for name in ("a", "b")]
    assert p1.probability is not None
    assert p1.probability["tumour"] == pytest.approx(np.mean(probabilities), rel=1e-6)
    (job["features"] / "b.h5").rename(tmp_path / "b.h5")
    predict(**job | {"slides": [home / "slides" / "c.tif"]}, overwrite=True)
    assert table_rows(job) == after, "a patient whose slides have not changed is not predicted anew"


def test_a_patient_of_whose_slides_the_features_are_gone_fails_and_is_tried_again(
    home: Path, job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job |= {"features": tmp_path / "features"}
    shutil.copytree(home / "features", job["features"])
    predict(**job | {"slides": [slide_table(tmp_path / "table.csv", home, a="p1", c="p2")]})
    (job["features"] / "a.h5").rename(tmp_path / "a.h5")
    for _ in range(2):
        *_, p1 = predict(**job | {"slides": [slide_table(tmp_path / "more.csv", home, b="p1")]})
        assert (p1.patient_id, p1.status) == ("p1", "failed")
        assert "failed patient p1: " in capsys.readouterr().out
        assert list(table_rows(job)) == ["a", "b", "c", "p2"]
    *_, lost = predict(**job | {"slides": [home / "slides" / "c.tif"]})
    assert (lost.patient_id, lost.status) == ("p1", "failed"), "no row vanishes without a word"
    (tmp_path / "a.h5").rename(job["features"] / "a.h5")
    predict(**job | {"slides": [home / "slides" / "c.tif"]})
    assert list(table_rows(job)) == ["a", "b", "c", "p1", "p2"]


def test_a_slide_without_a_prediction_stays_a_slide_of_its_patient(
    home: Path, job: dict[str, Any], tmp_path: Path
) -> None:
    job |= {"tile_encoder": str(home / "tiny.yaml")}
    (tmp_path / "broken.svs").write_text("not a slide")
    table = slide_table(tmp_path / "table.csv", home, a="p1", b="p2")
    table.write_text(table.read_text() + f"{tmp_path}/broken.svs,p1\n")
    predict(**job | {"slides": [table]})
    assert "1 of 2 slides" in table_rows(job)["p1"]["warnings"]
    predict(**job | {"slides": [slide_table(tmp_path / "more.csv", home, c="p1")]})
    assert "1 of 3 slides" in table_rows(job)["p1"]["warnings"]
    assert table_rows(job)["p2"]["warnings"] == ""


def test_the_table_of_the_last_run_says_whose_a_slide_is(home: Path, job: dict[str, Any], tmp_path: Path) -> None:
    predict(**job | {"slides": [home / "slides" / "a.svs"]})
    assert list(table_rows(job)) == ["a"]
    for patient in ("p1", "p9"):
        predict(**job | {"slides": [slide_table(tmp_path / "table.csv", home, a=patient)]})
        found = table_rows(job)
        assert list(found) == ["a", patient]
        assert found["a"]["patient_id"] == patient
    assert json.loads((job["output"] / "a.json").read_text())["patient_id"] == "p9"


def test_rows_of_other_checkpoints_are_left_out_and_that_is_said(
    home: Path, job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job |= {"slides": [slide_table(tmp_path / "table.csv", home, a="p1", b="p1", c="p2")]}
    predict(**job)
    write_classifier(tmp_path / "newer.ckpt", home / "features", seed=5)
    newer = job | {"checkpoint": str(tmp_path / "newer.ckpt")}
    capsys.readouterr()
    predict(**newer | {"slides": [home / "slides" / "a.svs"]}, overwrite=True)
    assert "2 slides there were predicted by other checkpoints" in capsys.readouterr().err
    found = table_rows(job)
    assert list(found) == ["a", "p1"]
    assert found["p1"]["probability_tumour"] == found["a"]["probability_tumour"]
    assert "1 of 2 slides has no prediction" in found["p1"]["warnings"]
    predict(**newer, overwrite=True)
    assert list(table_rows(job)) == ["a", "b", "c", "p1", "p2"]
    assert "of 2 slides" not in table_rows(job)["p1"]["warnings"]

"""Prediction of new slides, end to end on real files."""

import csv
import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifier_files import BINARY, ENCODER, write_classifier
from longslide import (
    LongslideError,
    __version__,
    embed,
    explain,
    open_slide,
    predict,
    read_features,
    write_synthetic_slide,
)
from longslide.data.features.feature_file import write_features
from longslide.pipeline.batch.claims import claim
from longslide.pipeline.cli import main
from longslide.pipeline.predict.overlay import GAP
from longslide.pipeline.report.report import report
from longslide.task import Task
from PIL import Image
from training_cohort import quick, write_cohort


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`slides/` a, b, c; their `features/`; the tile encoder `tiny.yaml`; a classifier `best.ckpt`."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "tiny.yaml").write_text(ENCODER)
    (folder / "slides").mkdir()
    for seed, name in enumerate(("a.svs", "b.svs", "c.tif")):
        write_synthetic_slide(folder / "slides" / name, size=(1024, 768), seed=seed)
    embed([folder / "slides"], folder / "features", str(folder / "tiny.yaml"), tile_checkpoint="random", device="cpu")
    write_classifier(folder / "best.ckpt", folder / "features")
    return folder


@pytest.fixture
def job(home: Path, tmp_path: Path) -> dict[str, Any]:
    """Arguments of a prediction from existing features."""
    return {
        "slides": [home / "slides"],
        "checkpoint": str(home / "best.ckpt"),
        "output": tmp_path / "results",
        "features": home / "features",
        "device": "cpu",
        "threads": 2,
    }


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def expected_probability(home: Path, slide_id: str, checkpoint: str = "best.ckpt") -> np.ndarray:
    from longslide.models.classifier.checkpoint import load_classifier

    features = read_features(home / "features" / f"{slide_id}.h5")
    classifier = load_classifier(home / checkpoint)
    one_bag = torch.tensor([0, len(features.coords)], dtype=torch.int32)
    with torch.no_grad():
        outputs = classifier(torch.from_numpy(features.features), torch.from_numpy(features.cells), one_bag)
        return classifier.predict(outputs)["probability"][0].numpy()


@pytest.mark.slow
def test_from_slides_alone_to_prediction_picture_and_scores(home: Path, job: dict[str, Any]) -> None:
    del job["features"]
    output = job["output"]
    command = [sys.executable, "-m", "longslide.pipeline.cli", "predict", str(home / "slides"), "--device", "cpu"]
    command += ["--checkpoint", job["checkpoint"], "--output", str(output), "--tile-encoder", str(home / "tiny.yaml")]
    done = subprocess.run([*command, "--explain", "integrated-gradients"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 done, 0 failed, 0 skipped" in done.stdout
    table = rows(output / "predictions.csv")
    assert [row["slide_id"] for row in table] == ["a", "b", "c"]
    for row in table:
        slide_id = row["slide_id"]
        np.testing.assert_array_equal(
            read_features(output / "features" / f"{slide_id}.h5").features,
            read_features(home / "features" / f"{slide_id}.h5").features,
        )
        expected = expected_probability(home, slide_id)
        found = [float(row["probability_normal"]), float(row["probability_tumour"])]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert row["prediction"] == ("tumour" if expected[1] >= 0.5 else "normal")
        content = json.loads((output / f"{slide_id}.json").read_text())
        assert content["probability"]["tumour"] == found[1]
        features = read_features(home / "features" / f"{slide_id}.h5")
        assert content["quality"]["tiles"] == len(features.coords)
        assert content["software"] == f"longslide {__version__}"
        assert content["quality"]["mpp_source"] == features.settings["mpp_source"]
        pictures = output / "slides" / slide_id
        with Image.open(pictures / "overlay.png") as overlay:
            assert overlay.width == 1024 + GAP + 1024
        assert "log-odds</text>" in (pictures / "overlay.svg").read_text()
        assert (pictures / "overlay.pdf").read_bytes().startswith(b"%PDF")
        scores = rows(pictures / "tiles.csv")
        assert [[int(tile["x"]), int(tile["y"])] for tile in scores] == features.coords.tolist()
        shapes = json.loads((pictures / "tiles.geojson").read_text())["features"]
        assert any(one["properties"].get("classification", {}).get("name") == "Tissue" for one in shapes)
        tiles = [one for one in shapes if one["properties"]["objectType"] == "tile"]
        assert [float(tile["score_tumour"]) for tile in scores] == [
            tile["properties"]["measurements"]["tumour"] for tile in tiles
        ]
        assert len(content["explanation"]["gallery"]) == len(list((pictures / "gallery").glob("*.jpg"))) > 0
        error, change = (content["explanation"][name]["tumour"] for name in ("completeness_error", "change"))
        total = sum(float(tile["score_tumour"]) for tile in scores)
        assert abs(total - change) == pytest.approx(error, abs=1e-5)
    assert {row["status"] for row in rows(output / "summary.csv")} == {"done"}
    assert not list(output.rglob("*.tmp"))


def test_existing_features_are_used_and_the_tile_encoder_is_not_needed(home: Path, job: dict[str, Any]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (home / "features").glob("*.h5")}
    predictions = predict(**job)
    assert [one.status for one in predictions] == ["done"] * 3
    assert {path: path.stat().st_mtime_ns for path in (home / "features").glob("*.h5")} == before
    for one in predictions:
        assert one.probability is not None
        np.testing.assert_allclose(list(one.probability.values()), expected_probability(home, one.slide_id), rtol=1e-6)
    with pytest.raises(dataclasses.FrozenInstanceError):
        predictions[0].predicted = "tumour"  # type: ignore[misc]
    [alone] = predict(home / "slides" / "a.svs", checkpoint=job["checkpoint"], features=job["features"], device="cpu")
    assert alone == predictions[0]
    with (
        open_slide(home / "slides" / "a.svs", slide_id="b") as slide,
        pytest.raises(LongslideError, match=r"b\.h5: made otherwise \(made of another slide"),
    ):
        predict(slide, checkpoint=job["checkpoint"], features=job["features"], device="cpu")


def test_what_test_gave_for_a_feature_file_predict_gives_for_its_slide(tmp_path: Path) -> None:
    options = write_cohort(tmp_path)
    run = tmp_path / "run"
    words = ["--config", "abmil", "--data.task", "binary", "--model.aggregator.width", "32", "--folds", "2"]
    assert main(["crossval", *words, *options, *quick(run, "--trainer.max_epochs", "2")]) == 0
    tested = [row for row in rows(run / "predictions.csv") if (row["part"], row["level"]) == ("test", "slide")]
    assert len(tested) == 40
    for fold in ("0", "1"):
        of_fold = [row for row in tested if row["fold"] == fold][:3]
        slides = []
        for row in of_fold:
            slides.append(tmp_path / f"{row['slide_id']}.svs")
            slides[-1].write_text("the scan itself is archived")
        output = tmp_path / f"results-{fold}"
        predictions = predict(
            slides, str(run / f"fold_{fold}" / "best.ckpt"), output, tmp_path / "features", device="cpu"
        )
        assert list(rows(output / "predictions.csv")[0]) == list(of_fold[0]), "one schema"
        for one, row in zip(predictions, of_fold, strict=True):
            assert one.status == "done", one.reason
            assert one.probability is not None
            assert one.predicted == row["prediction"]
            assert one.probability["positive"] == pytest.approx(float(row["probability_positive"]), abs=1e-6)
            assert "no pictures" in one.warnings[-1]
    both = predict(slides, str(run), features=tmp_path / "features", device="cpu", allow_seen=True)
    assert [one.classifiers for one in both] == [2] * 3
    assert [one.seen for one in both] == [True] * 3, "each fold has trained on the test part of the other"


def test_folds_are_averaged_and_their_spread_is_told(home: Path, job: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    for fold in range(3):
        write_classifier(run / f"fold_{fold}" / "best.ckpt", home / "features", seed=fold)
    predictions = predict(**job | {"checkpoint": str(run)})
    for one in predictions:
        each = np.stack(
            [expected_probability(home, one.slide_id, str(run / f"fold_{k}" / "best.ckpt")) for k in range(3)]
        )
        assert one.probability is not None
        assert one.spread is not None
        np.testing.assert_allclose(list(one.probability.values()), each.mean(0), rtol=1e-5)
        np.testing.assert_allclose(list(one.spread.values()), each.std(0, ddof=1), rtol=1e-3, atol=1e-7)
        assert one.classifiers == 3
        assert "±" in one.text
    assert float(rows(job["output"] / "predictions.csv")[0]["spread_tumour"]) > 0
    write_classifier(tmp_path / "other.ckpt", home / "features", Task("binary", ("label",), ("a", "b")))
    (run / "fold_3").mkdir()
    with pytest.raises(LongslideError, match=r"fold_3/best\.ckpt: not there; finish the cross-validation"):
        predict(**job | {"checkpoint": str(run)})
    (run / "fold_3").rmdir()
    with pytest.raises(LongslideError, match=r"other\.ckpt: classes \('a', 'b'\), but \('normal', 'tumour'\)"):
        predict(**job | {"checkpoint": [str(run), str(tmp_path / "other.ckpt")]})


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
    assert "1 of 2 slides have no prediction" in found["p1"]["warnings"]
    predict(**newer, overwrite=True)
    assert list(table_rows(job)) == ["a", "b", "c", "p1", "p2"]
    assert "of 2 slides" not in table_rows(job)["p1"]["warnings"]


@pytest.mark.parametrize(
    ("task", "there"),
    [
        (Task("multiclass", ("label",), ("a", "b", "c")), {"prediction", "probability_a", "probability_c", "spread_b"}),
        (Task("ordinal", ("label",), ("low", "high")), {"prediction", "probability_low", "spread_high"}),
        (Task("multilabel", ("x", "y"), ("x", "y")), {"prediction_x", "prediction_y", "probability_x", "spread_y"}),
        (Task("regression", ("age",)), {"prediction", "spread_prediction"}),
        (
            Task("survival", ("t", "e"), times=(12.0, 24.0), discrete_time=True),
            {"risk", "survival_12", "survival_24", "spread_risk"},
        ),
        (Task("survival", ("t", "e"), times=(12.0,)), {"risk", "survival_12"}),
    ],
)
def test_every_task_has_its_columns_and_an_overlay(
    home: Path, job: dict[str, Any], tmp_path: Path, task: Task, there: set[str]
) -> None:
    write_classifier(tmp_path / "task.ckpt", home / "features", task)
    job |= {"checkpoint": str(tmp_path / "task.ckpt"), "slides": [home / "slides" / "a.svs"]}
    [one] = predict(**job, explain="gradient-x-input")
    assert one.status == "done", one.reason
    [row] = rows(job["output"] / "predictions.csv")
    assert there <= set(row)
    assert one.text
    if task.kind == "survival" and task.discrete_time:
        assert one.survival is not None
        assert 1 > one.survival[12.0] > one.survival[24.0] > 0
        assert one.survival[24.0] == float(row["survival_24"])
    if task.kind == "survival" and not task.discrete_time:
        assert one.survival is None, "no baseline hazard was fitted"
        assert row["survival_12"] == ""
    assert (job["output"] / "slides" / "a" / "overlay.png").stat().st_size > 10_000
    assert predict(**job) == [one], "as it was written"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tile_mpp": 1.0}, "tile_mpp 0.5 instead of 1.0"),
        ({"tile_encoder": "uni"}, "tile_encoder tiny instead of uni"),
        ({"tile_weights": "random seed=7"}, "tile_weights random seed=0 instead of random seed=7"),
        ({"tile_px": 256}, "tile_px 64 instead of 256"),
        ({"overlap": 16}, "overlap 0 instead of 16"),
    ],
)
def test_features_unlike_those_of_training_are_refused(
    home: Path, job: dict[str, Any], tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    write_classifier(tmp_path / "other.ckpt", home / "features", **change)
    with pytest.raises(LongslideError) as caught:
        predict(**job | {"checkpoint": str(tmp_path / "other.ckpt")})
    assert f"all 3 existing results of these slides were made otherwise ({named})" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(job["output"].glob("*.json"))
    assert not (job["output"] / "summary.csv").exists()
    with pytest.raises(LongslideError, match=f"not like those of training.*{named}"):
        explain(home / "features" / "a.h5", tmp_path / "other.ckpt")


def test_weights_are_the_same_by_their_digest_wherever_the_file_was(
    home: Path, job: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "features"
    folder.mkdir()
    features = read_features(home / "features" / "a.h5")
    write_features(folder / "a.h5", dataclasses.replace(features, weights="/data/model.safetensors sha256:0123"))
    job |= {"features": folder, "slides": [home / "slides" / "a.svs"]}
    for trained, status in (
        ("hf:org/model@abc sha256:0123", "done"),
        ("/data/model.safetensors sha256:9876", "failed"),
    ):
        write_classifier(tmp_path / "other.ckpt", home / "features", tile_weights=trained)
        options = {"checkpoint": str(tmp_path / "other.ckpt"), "output": tmp_path / status}
        if status == "failed":
            with pytest.raises(LongslideError, match="tile_weights"):
                predict(**job | options)
            continue
        [one] = predict(**job | options)
        assert one.status == status, one.reason


def test_another_slide_of_the_same_file_name_gets_nothing_of_the_first(
    home: Path, job: dict[str, Any], tmp_path: Path
) -> None:
    job = {name: value for name, value in job.items() if name != "features"} | {"tile_encoder": str(home / "tiny.yaml")}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_synthetic_slide(elsewhere / "a.svs", size=(1024, 768), seed=77)
    (tmp_path / "first.csv").write_text(f"slide,patient_id\n{home / 'slides' / 'a.svs'},p\n")
    (tmp_path / "both.csv").write_text(f"slide,patient_id\n{elsewhere / 'a.svs'},p\n{home / 'slides' / 'b.svs'},q\n")
    predict(**job | {"slides": [tmp_path / "first.csv"]})
    tables = {name: (job["output"] / name).read_bytes() for name in ("predictions.csv", "summary.csv", "a.json")}
    with pytest.raises(LongslideError, match=r"a\.json: made otherwise \(made of another slide"):
        predict(**job | {"slides": [elsewhere / "a.svs"]})
    assert tables == {name: (job["output"] / name).read_bytes() for name in tables}
    # Its features are not taken either, when the prediction is gone.
    (job["output"] / "a.json").unlink()
    with pytest.raises(LongslideError, match=r"a\.h5: made otherwise \(made of another slide"):
        predict(**job | {"slides": [elsewhere / "a.svs"]})
    # Beside a slide that is new it fails alone, and its patient gets no prediction of the first slide's.
    (job["output"] / "a.json").write_bytes(tables["a.json"])
    slides = [tmp_path / "both.csv", home / "slides" / "c.tif"]
    predict(**job | {"slides": [home / "slides" / "b.svs"]})
    results = predict(**job | {"slides": slides})
    status = {one.slide_id or one.patient_id: one.status for one in results}
    assert status == {"a": "failed", "b": "done", "c": "done", "p": "failed", "q": "done"}
    assert {row["slide_id"] for row in rows(job["output"] / "predictions.csv")} == {"b", "c", ""}
    report([job["output"]])
    page = (job["output"] / "report.html").read_text()
    assert 'id="slide-b"' in page
    assert 'id="slide-a"' not in page


def test_a_given_mpp_far_off_the_files_own_is_a_warning(home: Path, job: dict[str, Any], tmp_path: Path) -> None:
    options = {"features": tmp_path / "features", "tile_encoder": str(home / "tiny.yaml")}
    job |= {"slides": [home / "slides" / "a.svs"], "slide_mpp": 0.4} | options
    [one] = predict(**job)
    assert "slide_mpp 0.4 was given, the file says 0.5" in one.warnings


def test_classifiers_of_different_features_are_no_ensemble(home: Path, job: dict[str, Any], tmp_path: Path) -> None:
    for fold, weights in enumerate(("/one/uni.pth sha256:0123", "/other/uni.pth sha256:0123")):
        write_classifier(tmp_path / "run" / f"fold_{fold}" / "best.ckpt", home / "features", tile_weights=weights)
    moved = tmp_path / "features"
    shutil.copytree(home / "features", moved)
    for path in moved.glob("*.h5"):
        write_features(path, dataclasses.replace(read_features(path), weights="/third/uni.pth sha256:0123"))
    job |= {"checkpoint": str(tmp_path / "run"), "features": moved}
    assert {one.status for one in predict(**job)} == {"done"}, "weights are the same by their digest"
    write_classifier(tmp_path / "run" / "fold_2" / "best.ckpt", home / "features", tile_weights=weights, overlap=32)
    with pytest.raises(LongslideError, match=r"overlap is 0 in .*fold_0.* and 32 in .*fold_2.*one cross-validation"):
        predict(**job | {"output": tmp_path / "other"})


def test_a_slide_unlike_those_of_training_is_predicted_with_a_warning(
    home: Path, job: dict[str, Any], tmp_path: Path
) -> None:
    features = read_features(home / "features" / "a.h5")
    folder = tmp_path / "features"
    folder.mkdir()
    write_features(folder / "a.h5", dataclasses.replace(features, slide_mpp=0.25))
    other = read_features(home / "features" / "b.h5")
    write_features(folder / "b.h5", dataclasses.replace(other, features=other.features + 9))
    shutil.copy(home / "features" / "c.h5", folder / "c.h5")
    mpp, embedding, neither = predict(**job | {"features": folder})
    assert [one.status for one in (mpp, embedding, neither)] == ["done"] * 3
    assert mpp.warnings == ("scanned at 0.25 um/px, training slides at 0.5",)
    assert "times as far from training" in embedding.warnings[0]
    assert neither.warnings == ()
    assert rows(job["output"] / "predictions.csv")[0]["warnings"] == mpp.warnings[0]


def test_features_of_another_tool_are_used_and_what_they_do_not_say_is_told(
    home: Path, job: dict[str, Any], tmp_path: Path
) -> None:
    import h5py

    folder = tmp_path / "features"
    folder.mkdir()
    ours = read_features(home / "features" / "a.h5")
    with h5py.File(folder / "a.h5", "w") as file:
        file["features"] = ours.features
        file["coords"] = ours.coords
    [one] = predict(**job | {"features": folder, "slides": [home / "slides" / "a.svs"]}, explain="occlusion")
    assert one.status == "done", one.reason
    assert "does not say its tile_encoder, tile_weights, tile_mpp, tile_px, overlap" in one.warnings[0]
    assert one.probability is not None
    np.testing.assert_allclose(list(one.probability.values()), expected_probability(home, "a"), rtol=1e-6)


@pytest.mark.slow
def test_one_bad_slide_never_ends_the_job(home: Path, job: dict[str, Any], tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "text.svs").write_text("not a slide")
    Image.new("RGB", (900, 700), "white").save(bad / "blank.png", dpi=(50_800, 50_800))
    shutil.copy(home / "slides" / "a.svs", bad / "half.svs")
    shutil.copytree(home / "features", tmp_path / "features")
    (tmp_path / "features" / "half.h5").write_bytes((home / "features" / "a.h5").read_bytes()[:3000])
    job |= {"slides": [bad, bad / "blank.png", home / "slides"], "features": tmp_path / "features"}
    predictions = {one.slide_id: one for one in predict(**job, tile_encoder=str(home / "tiny.yaml"))}
    assert {name: one.status for name, one in predictions.items()} == {
        "text": "failed", "half": "failed", "blank": "skipped", "a": "done", "b": "done", "c": "done",
    }  # fmt: skip
    assert "no tissue" in predictions["blank"].reason
    assert "truncated" in predictions["half"].reason
    assert "not a slide" in predictions["text"].reason
    assert all("\n" not in one.reason for one in predictions.values())
    assert {row["slide_id"]: row["status"] for row in rows(job["output"] / "summary.csv")}["text"] == "failed"
    assert len(rows(job["output"] / "predictions.csv")) == 3


def test_a_second_run_does_only_what_is_missing(home: Path, job: dict[str, Any]) -> None:
    first = predict(**job)
    before = {path: path.stat().st_mtime_ns for path in job["output"].glob("*.json")}
    (job["output"] / "b.json").unlink()
    again = predict(**job)
    assert [one.status for one in again] == ["done"] * 3
    assert again == first
    after = {path: path.stat().st_mtime_ns for path in job["output"].glob("*.json")}
    assert {path.stem for path in after if after[path] != before[path]} == {"b"}
    lock = claim(job["output"], "c prediction")
    assert lock is not None
    assert predict(**job) == first, "another process is at work on what is done already"
    (job["output"] / "c.json").unlink()
    [*_, busy] = predict(**job)
    lock.release()
    assert (busy.status, busy.ok) == ("skipped", True)
    assert "another process" in busy.reason


def test_an_explanation_can_be_added_and_nothing_else_is_changed_unless_overwrite(
    home: Path, job: dict[str, Any], tmp_path: Path
) -> None:
    job["slides"] = [home / "slides" / "a.svs"]
    predict(**job)
    [one] = predict(**job, explain="attention")
    assert one.status == "done"
    assert json.loads((job["output"] / "a.json").read_text())["explanation"]["method"] == "attention"
    assert not list((job["output"] / "slides" / "a" / "gallery").glob("against-*")), "attention speaks for nothing"
    with pytest.raises(LongslideError, match=r"a\.json: made otherwise \(explain attention instead of occlusion\)"):
        predict(**job, explain="occlusion")
    write_classifier(tmp_path / "newer.ckpt", home / "features", seed=5)
    newer = job | {"checkpoint": str(tmp_path / "newer.ckpt")}
    tables = [job["output"] / name for name in ("predictions.csv", "summary.csv")]
    before = [table.read_text() for table in tables]
    with pytest.raises(LongslideError, match=r"a\.json: a prediction of other checkpoints; .* or --overwrite"):
        predict(**newer)
    assert [table.read_text() for table in tables] == before, "a wrong checkpoint costs nothing"
    [one] = predict(**newer, overwrite=True)
    assert one.status == "done"
    assert len(rows(job["output"] / "predictions.csv")) == 1


def bad_checkpoint(kind: str, home: Path, path: Path) -> None:
    content = torch.load(home / "best.ckpt", weights_only=True)
    if kind == "truncated":
        path.write_bytes((home / "best.ckpt").read_bytes()[:2000])
    elif kind == "code":

        class Opens:
            def __reduce__(self) -> tuple[Any, ...]:
                return (os.mkdir, (str(path.with_name("was-run")),))

        content["longslide"]["fold"] = Opens()
        torch.save(content, path)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path, weights_only=True)
    elif kind == "mae":
        torch.save(content | {"longslide": content["longslide"] | {"kind": "mae"}}, path)
    elif kind == "newer":
        torch.save(content | {"longslide": content["longslide"] | {"schema": 99}}, path)
    elif kind == "other software":
        torch.save({"state_dict": content["state_dict"], "epoch": 3}, path)
    elif kind == "empty folder":
        path.mkdir()


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("truncated", "not a readable checkpoint"),
        ("code", "not a readable checkpoint"),
        ("mae", "'mae', not of a classifier"),
        ("newer", "newer Longslide"),
        ("other software", "not a checkpoint of `longslide fit`"),
        ("empty folder", "neither best.ckpt nor fold_0/best.ckpt"),
        ("missing", "no such checkpoint"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_one_line_before_any_slide_is_touched(
    home: Path, job: dict[str, Any], tmp_path: Path, kind: str, named: str
) -> None:
    bad_checkpoint(kind, home, tmp_path / "bad.ckpt")
    with pytest.raises(LongslideError) as caught:
        predict(**job | {"checkpoint": str(tmp_path / "bad.ckpt")})
    assert named in str(caught.value)
    assert "bad.ckpt" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(job["output"].glob("*.json"))
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("preprocessing", "options", "named"),
    [
        ({}, {}, "No tile encoder 'tiny'"),
        ({}, {}, "--tile-encoder"),
        ({"tile_encoder": "kaiko-vits8", "tile_weights": "hf:x sha256:0123"}, {}, "--tile-checkpoint"),
        ({"tile_weights": "x sha256:0123"}, {"tile_checkpoint": "random"}, "trained on features of x sha256:0123"),
        ({"tile_encoder": None, "tile_px": None}, {}, "does not say the tile_encoder, tile_px"),
        ({"tile_encoder": "virchow2", "tile_weights": None}, {}, "does not say the tile_weights"),
    ],
)
def test_a_tile_encoder_that_cannot_be_had_is_one_line_before_any_slide_is_touched(
    home: Path,
    job: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preprocessing: dict[str, Any],
    options: dict[str, str],
    named: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    write_classifier(tmp_path / "other.ckpt", home / "features", **preprocessing)
    if "tile_checkpoint" in options:
        options = options | {"tile_encoder": str(home / "tiny.yaml")}
    with pytest.raises(LongslideError) as caught:
        predict(**job | {"checkpoint": str(tmp_path / "other.ckpt"), "features": tmp_path / "none"} | options)
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(job["output"].glob("*.json"))


SEGMENTER = """
from pathlib import Path
from longslide.data.tissue.optical_density import OpticalDensity
from longslide.errors import LongslideError

class Learned(OpticalDensity):
    def check(self) -> None:
        if not Path(__file__).with_name("weights.pth").exists():
            raise LongslideError("weights.pth: no such checkpoint")
"""


def test_missing_weights_of_the_segmenter_are_one_line_before_any_slide_is_touched(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "learned_segmenter.py").write_text(SEGMENTER)
    (tmp_path / "weights.pth").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    from learned_segmenter import Learned  # type: ignore[import-not-found]

    tiny = str(home / "tiny.yaml")
    embed([home / "slides"], tmp_path / "features", tiny, "random", tissue=Learned(), device="cpu")
    write_classifier(tmp_path / "best.ckpt", tmp_path / "features")
    job = {"checkpoint": tmp_path / "best.ckpt", "output": tmp_path / "out", "tile_encoder": tiny, "device": "cpu"}
    (tmp_path / "weights.pth").rename(tmp_path / "elsewhere.pth")
    with pytest.raises(LongslideError, match=r"weights\.pth: no such checkpoint"):
        predict([home / "slides"], **job)
    assert not (tmp_path / "out" / "summary.csv").exists()
    (tmp_path / "elsewhere.pth").rename(tmp_path / "weights.pth")
    assert {one.status for one in predict([home / "slides"], **job)} == {"done"}


def test_explain_gives_the_scores_that_predict_writes(home: Path, job: dict[str, Any]) -> None:
    predict(**job | {"slides": [home / "slides" / "a.svs"]}, explain="gradient-x-input")
    found = explain(home / "features" / "a.h5", job["checkpoint"], "gradient-x-input", device="cpu")
    assert found.names == ("normal", "tumour")
    assert found.scores.shape == (len(found.coords), 2)
    written = [float(row["score_tumour"]) for row in rows(job["output"] / "slides" / "a" / "tiles.csv")]
    np.testing.assert_allclose(written, found.scores[:, 1], rtol=1e-5)
    integrated = explain(read_features(home / "features" / "a.h5"), [job["checkpoint"]], device="cpu")
    assert integrated.completeness_error is not None
    assert integrated.completeness_error["tumour"] < 1e-3
    with pytest.raises(LongslideError, match="no way to explain 'lime'"):
        explain(home / "features" / "a.h5", job["checkpoint"], "lime")  # type: ignore[arg-type]


def test_a_classifier_of_slide_embeddings_predicts_and_says_that_it_cannot_be_explained(
    home: Path, job: dict[str, Any], tmp_path: Path
) -> None:
    from longslide.data.features.cache import FeatureCache
    from longslide.data.features.survey import survey_features
    from longslide.models.classifier.classifier import SlideClassifier, TrainingFacts
    from longslide.models.classifier.options import ClassifierOptions

    folder = tmp_path / "features"
    slide = home / "slides" / "a.svs"
    encoders = {"slide_encoder": "gigapath", "slide_checkpoint": "random"}
    embed([slide], folder, str(home / "tiny.yaml"), tile_checkpoint="random", device="cpu", **encoders)
    survey = survey_features([folder / "a.h5"], FeatureCache(slide_embeddings=True), quiet=True)
    facts = TrainingFacts(BINARY, survey.dim, preprocessing=survey.preprocessing.to_dict())
    probe = SlideClassifier(facts, ClassifierOptions("linear-probe"))
    torch.save({"state_dict": probe.state_dict(), "longslide": probe.describe()}, tmp_path / "probe.ckpt")
    job |= {"checkpoint": str(tmp_path / "probe.ckpt"), "slides": [slide]}
    [one] = predict(**job | {"features": folder})
    assert one.status == "done", one.reason
    [made] = predict(
        **job | {"features": tmp_path / "made", "output": tmp_path / "made-results"},
        tile_encoder=str(home / "tiny.yaml"),
    )
    assert made.probability == one.probability, "embedded anew, with the slide encoder that the checkpoint names"
    with pytest.raises(LongslideError, match=r"probe\.ckpt: linear-probe reads slide embeddings.*no tiles to explain"):
        predict(**job | {"features": folder, "output": tmp_path / "x"}, explain="occlusion")
    assert not (tmp_path / "x" / "summary.csv").exists()


@pytest.mark.parametrize("aggregators", [["mean"], ["longnet"], ["abmil", "mean"]])
def test_a_model_without_attention_weights_is_refused_before_any_slide_is_read(
    home: Path, job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], aggregators: list[str]
) -> None:
    run = tmp_path / "run"
    for fold, aggregator in enumerate(aggregators):
        write_classifier(run / f"fold_{fold}" / "best.ckpt", home / "features", aggregator=aggregator)
    options = ["--checkpoint", str(run), "--features", str(job["features"]), "--output", str(job["output"])]
    words = [str(home / "slides"), *options, "--device", "cpu", "--explain"]
    assert main(["predict", *words, "attention"]) == 2
    said = capsys.readouterr()
    assert said.err == (
        f"longslide predict: {run}/fold_{len(aggregators) - 1}/best.ckpt: {aggregators[-1]} has no attention weights to "
        "show; --explain it by one of integrated-gradients, gradient-x-input, occlusion\n"
    )
    assert not any(path.is_file() for path in job["output"].rglob("*"))
    assert main(["predict", *words, "gradient-x-input"]) == 0, "what the line names works"


@pytest.mark.parametrize("failures", [1, 2])
def test_out_of_memory_is_tried_again_layer_by_layer_and_then_one_line(
    home: Path, job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    from longslide.models.explain import classifier as classifier_explanation

    write_classifier(tmp_path / "longnet.ckpt", home / "features", aggregator="longnet")
    whole, calls = classifier_explanation.explain_ensemble, []

    def small_memory(ensemble: Any, *arguments: Any) -> Any:
        calls.append(ensemble.classifiers[0].aggregator.encoder.spec.checkpointing)
        if len(calls) <= failures:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(ensemble, *arguments)

    monkeypatch.setattr(classifier_explanation, "explain_ensemble", small_memory)
    job |= {"checkpoint": str(tmp_path / "longnet.ckpt"), "slides": [home / "slides" / "a.svs"]}
    [one] = predict(**job, explain="gradient-x-input")
    assert calls == [False, True]
    assert one.status == ("done" if failures == 1 else "failed")
    if failures == 2:
        assert "does not fit in the memory of cpu" in one.reason

"""Prediction of new slides, end to end on real files."""

import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifier_files import BINARY, expected_probability, write_classifier
from commands import longslide
from csv_rows import rows
from longslide import (
    LongslideError,
    __version__,
    embed,
    explain,
    open_slide,
    predict,
    read_features,
)
from longslide.pipeline.batch.claims import claim
from longslide.pipeline.cli import main
from longslide.pipeline.predict.overlay import GAP
from longslide.task import Task
from PIL import Image
from training_cohort import quick, write_cohort


@pytest.mark.slow
def test_from_slides_alone_to_prediction_picture_and_scores(home: Path, job: dict[str, Any]) -> None:
    del job["features"]
    output = job["output"]
    command = ["predict", str(home / "slides"), "--device", "cpu"]
    command += ["--checkpoint", job["checkpoint"], "--output", str(output), "--tile-encoder", str(home / "tiny.yaml")]
    done = longslide(*command, "--explain", "integrated-gradients")
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


def test_a_folder_of_feature_files_in_place_of_slides_is_answered_with_the_option_for_it(
    home: Path, job: dict[str, Any]
) -> None:
    with pytest.raises(
        LongslideError, match=r"no slides in this folder .*; name the slides, .* --features .*features$"
    ):
        predict(**job | {"slides": home / "features"})


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

"""Features of new slides are those of training, or refused; encoders that make them are those of the checkpoint."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classifier_files import expected_probability, write_classifier
from csv_rows import rows
from longslide import LongslideError, embed, explain, predict, read_features, write_synthetic_slide
from longslide.data.features.feature_file import write_features
from longslide.pipeline.report.report import report


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

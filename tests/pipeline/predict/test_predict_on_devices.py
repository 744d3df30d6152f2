"""Prediction with a process on each of several devices: features, explanations and patients as of one process."""

from pathlib import Path
from typing import Any

import pytest
from classifier_files import ENCODER, write_classifier
from csv_rows import rows
from longslide import LongslideError, embed, predict, write_synthetic_slide


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    (home / "tiny.yaml").write_text(ENCODER)
    (home / "slides").mkdir()
    for seed in range(3):
        write_synthetic_slide(home / "slides" / f"{seed}.svs", size=(1024, 768), seed=seed)
    (home / "slides.csv").write_text("slide,patient_id\nslides/0.svs,P1\nslides/1.svs,P1\nslides/2.svs,P2\n")
    embed(home / "slides", home / "features", str(home / "tiny.yaml"), tile_checkpoint="random", device="cpu")
    write_classifier(home / "best.ckpt", home / "features")
    return home


def job(home: Path) -> dict[str, Any]:
    return {"checkpoint": home / "best.ckpt", "tile_encoder": home / "tiny.yaml", "explain": "occlusion"}


def test_two_devices_give_what_one_gives(home: Path, tmp_path: Path) -> None:
    one = predict(home / "slides.csv", output=tmp_path / "one", device="cpu", **job(home))
    two = predict(home / "slides.csv", output=tmp_path / "two", devices="cpu,cpu", **job(home))
    assert [(p.level, p.slide_id, p.patient_id, p.status) for p in two] == [
        (p.level, p.slide_id, p.patient_id, p.status) for p in one
    ]
    assert [p.patient_id for p in two if p.level == "patient"] == ["P1", "P2"]
    for first, second in zip(
        rows(tmp_path / "one" / "predictions.csv"), rows(tmp_path / "two" / "predictions.csv"), strict=True
    ):
        assert float(second["probability_tumour"]) == pytest.approx(float(first["probability_tumour"]), rel=1e-5)
    assert {row["status"] for row in rows(tmp_path / "two" / "summary.csv")} == {"done"}
    assert (tmp_path / "two" / "slides" / "2" / "overlay.png").is_file()


def test_predictions_of_other_checkpoints_are_refused_before_any_process_is_started(home: Path, tmp_path: Path) -> None:
    predict(home / "slides", output=tmp_path / "out", device="cpu", **job(home) | {"features": home / "features"})
    write_classifier(tmp_path / "other.ckpt", home / "features", seed=1)
    with pytest.raises(LongslideError, match="a prediction of other checkpoints"):
        predict(
            home / "slides",
            output=tmp_path / "out",
            devices="cpu,cpu",
            **job(home) | {"checkpoint": tmp_path / "other.ckpt"},
        )


def test_shards_and_clusters_need_a_folder(home: Path) -> None:
    with pytest.raises(LongslideError, match="--shard needs --output"):
        predict(home / "slides", shard="1/2", **job(home))
    with pytest.raises(LongslideError, match="--ray needs --output"):
        predict(home / "slides", ray="auto", **job(home))

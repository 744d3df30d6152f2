"""The check before a long run: every problem it finds is one that `embed` would meet."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from classifier_files import ENCODER
from longslide import LongslideError, doctor, write_synthetic_slide
from longslide.pipeline.cli import main
from longslide.pipeline.doctor.machine_check import DiskCheck, EncoderCheck
from longslide.pipeline.doctor.slide_check import SlideCheck
from PIL import Image


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    write_synthetic_slide(folder / "good.svs", size=(1536, 1024))
    write_synthetic_slide(folder / "no-mpp.tif", size=(1536, 1024), mpp=None, seed=1)
    shutil.copy(folder / "good.svs", folder / "twin.svs")
    (folder / "text.ndpi").write_text("not a slide")
    Image.new("RGB", (900, 700), "white").save(folder / "blank.png", dpi=(50_800, 50_800))
    return folder


def by_id(checks: list[SlideCheck | EncoderCheck | DiskCheck]) -> dict[str, SlideCheck]:
    return {check.slide_id: check for check in checks if isinstance(check, SlideCheck)}


def test_each_slide_gets_its_facts_or_its_problem(slides: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = by_id(doctor([slides, slides / "blank.png"], tile_px=64))
    good = checks["good"]
    assert good.ok
    assert (good.width, good.height, good.slide_mpp, good.mpp_source) == (1536, 1024, 0.5, "file")
    assert good.tiles > 20
    assert good.tissue_mm2
    assert good.tiles_per_second
    assert "--slide-mpp" in checks["no-mpp"].problem
    assert "same image as good" in checks["twin"].problem
    assert "not a slide" in checks["text"].problem
    assert "blank.png: no tissue found" in checks["blank"].problem
    printed = capsys.readouterr().out
    for words in ("good", "no-mpp", "same image as good", "GPU", "1 of 5 without problem", "disk"):
        assert words in printed


def test_the_estimate_of_tiles_is_what_embed_makes(slides: Path, tmp_path: Path) -> None:
    from longslide import embed

    check, _ = doctor([slides / "good.svs"], tile_px=64)
    assert isinstance(check, SlideCheck)
    (tmp_path / "tiny.yaml").write_text(ENCODER)
    [result] = embed([slides / "good.svs"], tmp_path, str(tmp_path / "tiny.yaml"), tile_checkpoint="random")
    assert check.tiles == result.tiles


def test_a_given_mpp_cures_the_slide_that_lacks_it(slides: Path) -> None:
    check, _ = doctor([slides / "no-mpp.tif"], slide_mpp=0.5, tile_px=64)
    assert check.ok


def test_the_encoder_is_loaded_and_timed(slides: Path) -> None:
    *_, encoder, _ = doctor(
        [slides / "good.svs"], tile_encoder="vit_tiny_patch16_224", tile_checkpoint="random", device="cpu"
    )
    assert isinstance(encoder, EncoderCheck)
    assert encoder.ok
    assert encoder.tiles_per_second
    assert (encoder.weights, encoder.device, encoder.precision) == ("random seed=0", "cpu", "float32")


def test_weights_that_cannot_be_had_are_a_problem_before_the_job(slides: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"not a checkpoint")
    *_, encoder, _ = doctor(
        [slides / "good.svs"], tile_encoder="vit_tiny_patch16_224", tile_checkpoint=str(tmp_path / "weights.pth")
    )
    assert not encoder.ok
    assert "weights.pth" in encoder.problem


def test_a_precision_that_the_device_lacks_is_a_problem_of_the_encoder(slides: Path) -> None:
    *_, encoder, _ = doctor(
        slides / "good.svs", "vit_tiny_patch16_224", tile_checkpoint="random", device="cpu", precision="float8"
    )
    assert isinstance(encoder, EncoderCheck)
    assert "float8 needs an NVIDIA GPU" in encoder.problem


def test_the_slide_encoder_must_fit_the_tile_encoder(slides: Path, tmp_path: Path) -> None:
    options = {"slides": [slides / "good.svs"], "tile_encoder": "vit_tiny_patch16_224", "tile_checkpoint": "random"}
    *_, encoder, _ = doctor(**options, slide_encoder="gigapath", slide_checkpoint="random")
    assert isinstance(encoder, EncoderCheck)
    assert (encoder.ok, encoder.weights) == (True, "random seed=0")
    *_, encoder, _ = doctor(**options, slide_encoder="gigapath")
    assert "read tile embeddings of 'gigapath'" in encoder.problem
    *_, encoder, _ = doctor(**options, slide_encoder="gigapath", slide_checkpoint=str(tmp_path / "none.pth"))
    assert "none.pth" in encoder.problem


def test_a_disk_that_is_too_small_is_a_problem(slides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    check, disk = doctor([slides / "good.svs"], tile_px=64)
    assert isinstance(check, SlideCheck)
    assert isinstance(disk, DiskCheck)
    assert disk.need == check.tiles * (1536 * 2 + 16)
    assert not disk.ok
    assert "make room" in disk.problem


@pytest.mark.parametrize(
    "wrong",
    [
        {"threads": 0},
        {"tile_mpp": 0.0},
        {"tile_px": 0},
        {"min_tissue": 7.0},
        {"overlap": 256},
        {"slide_mpp": 400.0},
        {"slide_encoder": "gigapath"},
        {"tile_encoder": "uni2h"},
    ],
)
def test_wrong_usage_is_refused_before_any_slide_is_touched(slides: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(LongslideError) as caught:
        doctor([slides / "text.ndpi"], **wrong)
    assert len(str(caught.value).splitlines()) == 1


def test_tissue_below_min_tissue_is_not_called_none(slides: Path) -> None:
    check, _ = doctor([slides / "good.svs"], tile_px=700, min_tissue=1.0)
    assert isinstance(check, SlideCheck)
    assert "no tile has 100% tissue or more (--min-tissue)" in check.problem
    assert not check.ok


def test_the_exit_status_says_whether_there_is_a_problem(slides: Path) -> None:
    def status(*words: str | Path) -> int:
        return main(["doctor", *map(str, words), "--tile-px", "64"])

    assert status(slides / "good.svs") == 0
    assert status(slides) == 1
    assert status(slides / "none.svs") == 2

"""Published tissue networks load from their checkpoint layouts, and masks are what they say of the slide's own pixels."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
import pytest
import torch
from classifier_files import ENCODER
from longslide import LongslideError, doctor, embed, open_slide, read_features
from longslide.data.synthetic import write_pyramid
from longslide.data.tissue.base import settings_of
from longslide.models.tissue_networks import GRANDQC_ARTEFACTS, GRANDQC_TISSUE, HEST, TissueNetwork, classes_of
from longslide.pipeline.cli import main
from longslide.pipeline.embed.learned_tissue import GrandQc, Hest
from torch import nn
from torchvision import transforms

pytestmark = pytest.mark.slow  # the networks take seconds for a patch on a CPU


def random_weights(network: TissueNetwork) -> dict[str, torch.Tensor]:
    """Weights with which the classes vary over a picture, as untrained ones do not."""
    torch.manual_seed(1)
    model = network.build()
    last = [module for module in model.modules() if isinstance(module, nn.Conv2d)][-1]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.02)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 1)  # type: ignore[union-attr]
        model.eval()
        noise = torch.rand(1, 3, 256, 256)
        answer = model(noise)
        answer = answer["out"] if isinstance(answer, dict) else answer
        scale = answer.std((0, 2, 3)).clamp_min(1e-6)
        assert last.bias is not None
        last.bias.sub_(answer.mean((0, 2, 3)))
        last.weight.div_(scale[:, None, None, None])
        last.bias.div_(scale)
    return model.state_dict()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A file of each network, in the layout that is published."""
    pytest.importorskip("segmentation_models_pytorch")
    folder = tmp_path_factory.mktemp("weights")
    hest = {f"model.{name}": tensor for name, tensor in random_weights(HEST).items()}
    hest |= {"model.aux_classifier.0.weight": torch.zeros(1), "model.aux_classifier.4.bias": torch.zeros(1)}
    torch.save({"epoch": 3, "state_dict": hest}, folder / HEST.file)
    for network in (GRANDQC_TISSUE, GRANDQC_ARTEFACTS):
        torch.save(random_weights(network), folder / network.file)
    return {network.name: str(folder / network.file) for network in (HEST, GRANDQC_TISSUE, GRANDQC_ARTEFACTS)}


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    smooth = cv2.GaussianBlur(rng.normal(size=(512, 1024, 3)), (0, 0), 12)
    picture = (200 + 40 * smooth / smooth.std()).clip(0, 255).astype(np.uint8)
    path = tmp_path_factory.mktemp("slides") / "a.tif"
    write_pyramid(path, picture, mpp=1.0)
    return path


def normalised(patch: np.ndarray) -> torch.Tensor:
    steps = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    return transforms.Compose(steps)(patch)[None]


def test_the_mask_of_hest_is_what_its_network_says_of_the_pixels(weights: dict[str, str], slide_path: Path) -> None:
    from torchvision.models.segmentation import deeplabv3_resnet50

    model = deeplabv3_resnet50(weights=None, weights_backbone=None)
    model.classifier[4] = nn.Conv2d(256, 2, kernel_size=1)
    saved = torch.load(weights[HEST.name], weights_only=True)["state_dict"]
    model.load_state_dict({name.replace("model.", ""): value for name, value in saved.items() if "aux" not in name})
    with openslide.OpenSlide(slide_path) as direct, torch.inference_mode():
        patch = np.asarray(direct.read_region((512, 0), 0, (512, 512)).convert("RGB"))
        tissue = model.eval()(normalised(patch))["out"].softmax(1)[0, 1].numpy() > 0.5
    assert 0.05 < tissue.mean() < 0.95
    share = tissue.reshape(64, 8, 64, 8).mean((1, 3))
    with open_slide(slide_path) as slide:
        found = Hest(checkpoint=weights[HEST.name], device="cpu")(slide)
    assert found.mask.shape == (64, 128)
    clear = np.abs(share - 0.5) > 0.02
    np.testing.assert_array_equal(found.mask[:, 64:][clear], (share > 0.5)[clear])
    assert found.method.startswith("hest-deeplabv3 sha256:")


def test_grandqcs_tissue_is_found_in_a_jpeg_of_the_patch_at_10_microns(weights: dict[str, str], tmp_path: Path) -> None:
    import segmentation_models_pytorch as smp

    smooth = cv2.GaussianBlur(np.random.default_rng(1).normal(size=(700, 600, 3)), (0, 0), 8)
    picture = (200 + 40 * smooth / smooth.std()).clip(0, 255).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), picture[..., ::-1])
    model = smp.UnetPlusPlus("timm-efficientnet-b0", encoder_weights=None, classes=2, activation=None)
    model.load_state_dict(torch.load(weights[GRANDQC_TISSUE.name], weights_only=True))
    _, content = cv2.imencode(".jpg", picture[:512, :512], [cv2.IMWRITE_JPEG_QUALITY, 80])
    with torch.inference_mode():
        expected = model.eval()(normalised(cv2.imdecode(content, 1))).argmax(1)[0].numpy() == 0
    assert 0.01 < expected.mean() < 0.99
    with open_slide(tmp_path / "a.png", slide_mpp=10.0) as slide:
        found = GrandQc(checkpoint=weights[GRANDQC_TISSUE.name], device="cpu")(slide)
    assert found.mask.shape == (700, 600)
    assert (found.mask[:512, :512] == expected).mean() > 0.9999
    assert found.left_out == {}


def test_artefacts_are_no_tissue_are_recorded_and_stay_settings(
    weights: dict[str, str], slide_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny.yaml").write_text(ENCODER)
    segmenter = GrandQc(weights[GRANDQC_TISSUE.name], True, weights[GRANDQC_ARTEFACTS.name], device="cpu")
    with open_slide(slide_path) as slide:
        everything = GrandQc(weights[GRANDQC_TISSUE.name], device="cpu")(slide)
        found = segmenter(slide)
    assert set(found.left_out) == {"fold", "dark spot", "pen", "air bubble or edge", "out of focus"}
    lost = np.any([*found.left_out.values()], axis=0)
    assert lost.any()
    np.testing.assert_array_equal(found.mask | lost, everything.mask)
    assert not (found.mask & lost).any()
    job: dict[str, Any] = {
        "slides": [slide_path],
        "output": tmp_path / "out",
        "tile_encoder": str(tmp_path / "tiny.yaml"),
        "tile_checkpoint": "random",
        "tile_mpp": 1.0,
        "device": "cpu",
        "min_tissue": 0.0,
    }
    [result] = embed(**job, tissue=segmenter)
    settings = read_features(result.features or "").settings
    assert json.loads(settings["left_out_mm2"]).keys() <= set(found.left_out)
    assert (result.left_out_mm2 or 0) > 0
    moved = tmp_path / "moved.pth"
    moved.write_bytes(Path(weights[GRANDQC_TISSUE.name]).read_bytes())
    again = GrandQc(str(moved), True, weights[GRANDQC_ARTEFACTS.name], device="cpu", batch_size=1)
    assert embed(**job, tissue=again)[0].reason == "already complete", "weights count by their digest"
    with pytest.raises(LongslideError, match="tissue_settings"):
        embed(**job, tissue=GrandQc(weights[GRANDQC_TISSUE.name], device="cpu"))


def test_a_learned_segmenter_is_chosen_on_the_command_line(
    weights: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(ENCODER)
    cv2.imwrite(str(tmp_path / "a.png"), np.random.default_rng(0).integers(0, 255, (600, 700, 3), np.uint8))
    words = [
        "embed",
        str(tmp_path / "a.png"),
        "--output",
        str(tmp_path / "out"),
        "--slide-mpp",
        "10",
        "--tile-mpp",
        "10",
    ]
    words += ["--tile-encoder", str(tmp_path / "tiny.yaml"), "--tile-checkpoint", "random", "--device", "cpu"]
    words += ["--min-tissue", "0", "--tissue", "grandqc", "--tissue.checkpoint", weights[GRANDQC_TISSUE.name]]
    assert main([*words, "--tissue.device", "cpu"]) == 0, capfd.readouterr().err
    settings = read_features(tmp_path / "out" / "a.h5").settings
    assert settings["tissue_segmenter"] == "grandqc"
    assert json.loads(settings["tissue_settings"])["checkpoint"] == weights[GRANDQC_TISSUE.name]


def test_weights_that_do_not_fit_or_are_not_there_are_named(weights: dict[str, str], tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.full((600, 600, 3), 230, np.uint8))
    with open_slide(tmp_path / "a.png", slide_mpp=10.0) as slide:
        with pytest.raises(LongslideError, match="does not fit grandqc-tissue"):
            GrandQc(weights[GRANDQC_ARTEFACTS.name], device="cpu")(slide)
        with pytest.raises(LongslideError, match=r"no such checkpoint.*--tissue\.checkpoint"):
            GrandQc(str(tmp_path / "none.pth"), device="cpu")(slide)
        with pytest.raises(LongslideError, match="coarser than the 1 that hest-deeplabv3 needs"):
            Hest(weights[HEST.name], device="cpu")(slide)


@pytest.mark.parametrize("job", [embed, doctor])
def test_weights_that_are_not_there_end_the_job_before_the_first_slide(
    job: Callable[..., object], slide_path: Path, tmp_path: Path
) -> None:
    tissue = Hest(checkpoint=str(tmp_path / "absent.ckpt"))
    with pytest.raises(LongslideError, match=r"absent\.ckpt: no such checkpoint"):
        job(slide_path, output=tmp_path / "out", tile_encoder="kaiko-vits8", tile_checkpoint="random", tissue=tissue)
    assert not (tmp_path / "out").exists()


def test_where_it_runs_is_no_setting(weights: dict[str, str]) -> None:
    one, other = Hest(weights[HEST.name], device="cpu"), Hest(weights[HEST.name], device="cuda:1", batch_size=2)
    assert settings_of(one) == settings_of(other)
    assert one.method == other.method


def test_two_classes_are_taken_by_a_threshold(weights: dict[str, str]) -> None:
    patch = np.random.default_rng(0).integers(0, 255, (1, 512, 512, 3), np.uint8)
    model = GRANDQC_TISSUE.load(Path(weights[GRANDQC_TISSUE.name]), torch.device("cpu"))
    strict, loose = (classes_of(GRANDQC_TISSUE, model, patch, threshold).sum() for threshold in (0.9, 0.1))
    assert strict < loose

"""Slide encoders of other architectures, and those with code of their own, in the jobs: embed, fit, predict, explain."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import yaml
from classifier_files import ENCODER
from longslide import (
    Features,
    LongslideError,
    create_slide_encoder,
    embed,
    explain,
    predict,
    read_features,
    write_synthetic_slide,
)
from longslide.data.features.feature_file import write_features
from longslide.models.aggregators.registry import AggregatorChoice
from longslide.models.classifier.checkpoint import load_classifier
from longslide.models.slide_encoder.checkpoint import to_published
from longslide.models.slide_encoder.spec import PublishedSpec, list_slide_encoders, load_slide_encoder_spec
from longslide.pipeline.cli import main
from training_cohort import quick, write_cohort

PUBLISHED = [name for name in list_slide_encoders() if isinstance(load_slide_encoder_spec(name), PublishedSpec)]

BRIEF = ("--epochs", "2", "--min-steps", "4")
"""Enough for a checkpoint."""

SMALL: dict[str, dict[str, Any]] = {
    "titan": {"layers": 1, "width": 16, "heads": 4, "pool_heads": 2, "ffn_width": 16},
    "moozy": {"layers": 1, "width": 16, "heads": 4, "ffn_width": 16, "registers": 2},
    "chief": {"hidden": 8, "attention_width": 4},
    "feather": {"width": 8, "attention_width": 4},
    "madeleine": {"width": 8, "heads": 2},
    "prism": {"latents": 3, "width": 16, "depth": 3, "layers": 1, "heads": 2},
    "cobra": {"reads": 6, "width": 32, "layers": 1, "heads": 2, "attention_width": 4, "state": 4},
}


def write_spec(path: Path, architecture: str, **facts: Any) -> Path:
    """The YAML file of a small one that reads the features of `write_cohort`."""
    content = {
        "name": f"small-{architecture}",
        "architecture": architecture,
        "arguments": SMALL[architecture],
        "hub_id": None,
        "hub_file": None,
        "tile_encoder": "toy",
        "tile_dim": 6,
        "licence": "none",
        "gated": False,
        "paper": "none",
    }
    path.write_text(yaml.safe_dump(content | facts))
    return path


def write_tiles(path: Path, dim: int, encoder: str | None) -> Path:
    column, row = np.meshgrid(np.arange(5), np.arange(3))
    features = Features(
        slide_id=path.stem,
        features=np.random.default_rng(0).normal(size=(15, dim)).astype(np.float32),
        coords=np.stack([column.ravel(), row.ravel()], 1) * 512,
        step_level0=512,
        tile_size_level0=512,
        tile_px=256,
        overlap=0,
        encoder=encoder,
    )
    path.parent.mkdir(exist_ok=True)
    write_features(path, features)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_each_embeds_feature_files_of_its_tile_encoder(name: str, tmp_path: Path) -> None:
    spec = load_slide_encoder_spec(name)
    path = write_tiles(tmp_path / "in" / "s.h5", spec.tile_dim, spec.tile_encoder)
    if name == "prism":  # 100 million parameters, of which 15 tiles are read eight times
        name = "small-prism"
        choice = write_spec(tmp_path / "prism.yaml", "prism", tile_encoder=spec.tile_encoder, tile_dim=spec.tile_dim)
    else:
        choice = Path(name)
    options = ["--slide-encoder", str(choice), "--slide-checkpoint", "random", "--device", "cpu"]
    assert main(["embed", str(path.parent), "--output", str(tmp_path / "out"), *options]) == 0
    made = read_features(tmp_path / "out" / "s.h5")
    encoder = create_slide_encoder(str(choice), checkpoint="random")
    with torch.inference_mode():
        expected = encoder(torch.from_numpy(made.features).float()[None], torch.from_numpy(made.cells)[None])[0]
    np.testing.assert_allclose(made.slide_embedding, expected, rtol=1e-4, atol=1e-5)
    assert (made.slide_encoder, made.slide_weights, made.pool) == (name, "random seed=0", None)


@pytest.mark.slow
def test_tiles_and_slides_are_embedded_at_once(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(ENCODER)
    spec = write_spec(tmp_path / "small.yaml", "titan", tile_encoder="tiny", tile_dim=48)
    torch.save(to_published(create_slide_encoder(spec, checkpoint="random")), tmp_path / "weights.pt")
    write_synthetic_slide(tmp_path / "a.svs", size=(1024, 768), seed=0)
    tiles = ["--tile-encoder", str(tmp_path / "tiny.yaml"), "--tile-checkpoint", "random"]
    slide = ["--slide-encoder", str(spec), "--slide-checkpoint", str(tmp_path / "weights.pt"), "--device", "cpu"]
    assert main(["embed", str(tmp_path / "a.svs"), "--output", str(tmp_path / "out"), *tiles, *slide]) == 0
    made = read_features(tmp_path / "out" / "a.h5")
    assert made.slide_embedding is not None
    assert made.slide_embedding.shape == (16,)
    assert made.slide_weights is not None
    assert made.slide_weights.startswith(f"{tmp_path / 'weights.pt'} sha256:")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["titan", "prism", "cobra"])
def test_one_is_fine_tuned_from_the_command_line(architecture: str, tmp_path: Path) -> None:
    data = write_cohort(tmp_path, 16)
    spec = write_spec(tmp_path / "small.yaml", architecture)
    torch.save(to_published(create_slide_encoder(spec, checkpoint="random")), tmp_path / "weights.pt")
    run = tmp_path / "run"
    model = [
        "--model.aggregator", architecture, "--model.aggregator.slide_encoder", str(spec),
        "--model.checkpoint", str(tmp_path / "weights.pt"),
    ]  # fmt: skip
    assert main(["fit", "--config", "binary", *data, *model, *quick(run, *BRIEF)]) == 0
    checkpoint = next(run.rglob("best.ckpt"))
    description = torch.load(checkpoint, weights_only=True)["longslide"]
    assert description["aggregator"]["name"] == architecture
    assert description["aggregator"]["architecture"]["weights"].startswith(f"{tmp_path / 'weights.pt'} sha256:")
    (tmp_path / "weights.pt").unlink()  # what was trained needs it no longer
    spec.unlink()
    assert np.isfinite(explain(tmp_path / "features" / "s0.h5", checkpoint, method="occlusion").scores).all()


@pytest.mark.parametrize("architecture", SMALL)
def test_each_has_gradients_comes_back_from_a_checkpoint_and_is_explained(architecture: str, tmp_path: Path) -> None:
    from classifier_files import write_classifier

    write_cohort(tmp_path, 4)
    spec = write_spec(tmp_path / "small.yaml", architecture)
    torch.save(to_published(create_slide_encoder(spec, checkpoint="random")), tmp_path / "weights.pt")
    choice = AggregatorChoice(architecture, {"slide_encoder": str(spec)})
    checkpoint, slide = tmp_path / "best.ckpt", tmp_path / "features" / "s0.h5"
    classifier = write_classifier(checkpoint, slide.parent, aggregator=choice, checkpoint=tmp_path / "weights.pt")
    spec.unlink()
    (tmp_path / "weights.pt").unlink()
    features = read_features(slide)
    tiles = torch.from_numpy(features.features).float(), torch.from_numpy(features.cells)
    bounds = torch.tensor([0, len(features.coords)], dtype=torch.int32)
    output = classifier(*tiles, bounds)
    torch.testing.assert_close(load_classifier(checkpoint)(*tiles, bounds), output)
    output.sum().backward()
    encoder = classifier.aggregator.encoder
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in encoder.parameters())

    gated = architecture in ("chief", "feather", "madeleine", "cobra")
    for method in ["gradient-x-input", "occlusion", *["attention"] * gated]:
        scores = explain(slide, checkpoint, method=method).scores
        assert np.isfinite(scores).all()
    if gated:
        assert scores.sum() == pytest.approx(1, abs=1e-5)
    else:
        with pytest.raises(LongslideError, match="has no attention weights to show"):
            explain(slide, checkpoint, method="attention")


@pytest.mark.slow
def test_a_frozen_one_stays_as_it_is_and_a_linear_probe_reads_its_embeddings(tmp_path: Path) -> None:
    data = write_cohort(tmp_path, 16)
    spec = write_spec(tmp_path / "small.yaml", "feather")
    torch.save(to_published(create_slide_encoder(spec, checkpoint="random", seed=5)), tmp_path / "weights.pt")
    model = [
        "--model.aggregator", "feather", "--model.aggregator.slide_encoder", str(spec), "--model.aggregator.frozen", "true",
        "--model.checkpoint", str(tmp_path / "weights.pt"),
    ]  # fmt: skip
    assert main(["fit", "--config", "binary", *data, *model, *quick(tmp_path / "frozen", *BRIEF)]) == 0
    trained = torch.load(next((tmp_path / "frozen").rglob("best.ckpt")), weights_only=True)["state_dict"]
    published = create_slide_encoder(spec, checkpoint=tmp_path / "weights.pt").state_dict()
    assert all(torch.equal(trained[f"aggregator.encoder.{name}"], value) for name, value in published.items())

    options = ["--slide-encoder", str(spec), "--slide-checkpoint", str(tmp_path / "weights.pt"), "--device", "cpu"]
    assert main(["embed", str(tmp_path / "features"), "--output", str(tmp_path / "with"), *options]) == 0
    probe = [*data[:3], str(tmp_path / "with"), *data[4:], "--model.aggregator", "linear-probe"]
    assert main(["fit", "--config", "binary", *probe, *quick(tmp_path / "probe", *BRIEF)]) == 0


@pytest.mark.parametrize(
    ("tiles", "weights", "said"),
    [
        (
            (768, "uni"),
            "chief",
            "tile embeddings of 'uni', but slide encoder 'chief' reads those of 'chief-ctranspath'",
        ),
        (
            (1024, "chief-ctranspath"),
            "chief",
            "tile embeddings of length 1024, but slide encoder 'chief' reads 768 (those of",
        ),
        ((768, "chief-ctranspath"), "feather", "does not fit slide encoder 'chief'; missing: attention_net.0."),
        ((768, "chief-ctranspath"), None, "has no weights on the hub: give them with --slide-checkpoint"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    tiles: tuple[int, str], weights: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tiles(tmp_path / "in" / "s.h5", *tiles)
    words = ["embed", str(path), "--output", str(tmp_path / "out"), "--slide-encoder", "chief", "--device", "cpu"]
    if weights is not None:
        torch.save(to_published(create_slide_encoder(weights, checkpoint="random")), tmp_path / "weights.pt")
        words += ["--slide-checkpoint", str(tmp_path / "weights.pt")]
    assert main(words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_closed_gate_is_one_line_that_names_the_terms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def closed(*_: Any, **__: Any) -> str:
        raise GatedRepoError("403 Client Error", response=MagicMock(status_code=403, headers={}))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", closed)
    path = write_tiles(tmp_path / "in" / "s.h5", 768, load_slide_encoder_spec("titan").tile_encoder)
    words = ["embed", str(path), "--output", str(tmp_path / "out"), "--slide-encoder", "titan", "--device", "cpu"]
    assert main(words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "no access to its weights. Accept the terms at https://huggingface.co/MahmoodLab/TITAN" in line


def test_an_aggregator_takes_slide_encoders_of_its_architecture_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_cohort(tmp_path, 8)
    spec = write_spec(tmp_path / "small.yaml", "chief")
    for aggregator, encoder, said in (
        ("titan", str(spec), "slide encoder 'small-chief' is no titan: it is another aggregator"),
        ("gigapath", str(spec), "slide encoder 'small-chief' is a chief, not a LongNet such as gigapath"),
        ("titan", "gigapath", "slide encoder 'gigapath' is no titan"),
    ):
        model = ["--model.aggregator", aggregator, "--model.aggregator.slide_encoder", encoder]
        words = [*data, *model, "--model.checkpoint", "random", *quick(tmp_path / "run")]
        assert main(["fit", "--config", "binary", *words]) == 2
        assert said in capsys.readouterr().err


CONFIGURATION = """
from transformers import PretrainedConfig


class TinyConfig(PretrainedConfig):
    model_type = "tiny_slides"

    def __init__(self, dim=6, **kwargs):
        self.dim = dim
        super().__init__(**kwargs)
"""

MODELLING = """
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .configuration_tiny import TinyConfig

Path("{ran}").touch()


class TinySlides(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.projection = torch.nn.Linear(config.dim, 3)
        self.post_init()

    def {method}(self, features, coords=None, patch_size_lv0=None):
        near = 0 if coords is None else (coords.float() / patch_size_lv0).mean()
        return {result}
"""


def write_model(folder: Path, method: str = "encode_slide_from_patch_features", result: str = "") -> Path:
    """A folder as on the hub, with weights and code of its own, which leaves a file `ran` where it is run."""
    from safetensors.torch import save_file

    folder.mkdir()
    result = result or "self.projection(features).mean(1) + near"
    code = MODELLING.replace("{ran}", str(folder / "ran")).replace("{method}", method).replace("{result}", result)
    (folder / "configuration_tiny.py").write_text(CONFIGURATION)
    (folder / "modeling_tiny.py").write_text(code)
    auto = '{"AutoConfig": "configuration_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinySlides"}'
    (folder / "config.json").write_text(f'{{"model_type": "tiny_slides", "dim": 6, "auto_map": {auto}}}')
    generator = torch.Generator().manual_seed(0)
    weights = {"projection.weight": torch.randn(3, 6, generator=generator), "projection.bias": torch.zeros(3)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def _own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies code to where it imports it from."""
    dynamic = pytest.importorskip("transformers.dynamic_module_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("_own_modules")
def test_code_of_its_own_runs_on_the_users_word_and_is_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "tiny-slides")
    path = write_tiles(tmp_path / "in" / "s.h5", 6, "toy")
    words = ["embed", str(path), "--output", str(tmp_path / "out"), "--slide-encoder", str(model), "--device", "cpu"]
    assert main(words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"slide encoder '{model}' is run by code of its own, which may do all that you may" in line
    assert "--trust-remote-code" in line
    assert not (model / "ran").exists()
    assert not (tmp_path / "out" / "s.h5").exists()

    assert main([*words, "--trust-remote-code"]) == 0
    assert (model / "ran").exists()
    made = read_features(tmp_path / "out" / "s.h5")
    projection = torch.nn.Linear(6, 3)
    generator = torch.Generator().manual_seed(0)
    projection.load_state_dict({"weight": torch.randn(3, 6, generator=generator), "bias": torch.zeros(3)})
    with torch.inference_mode():
        expected = projection(torch.from_numpy(made.features)).mean(0) + made.cells.mean()
    np.testing.assert_allclose(made.slide_embedding, expected, rtol=1e-5, atol=1e-6)
    assert made.slide_encoder == "tiny-slides"
    assert made.slide_weights is not None
    assert made.slide_weights.startswith(f"{model} remote code sha256:")

    # Other code is another slide encoder.
    (model / "modeling_tiny.py").write_text((model / "modeling_tiny.py").read_text() + "\n# changed\n")
    with pytest.raises(LongslideError, match="otherwise"):
        embed([path], tmp_path / "out", slide_encoder=model, device="cpu", trust_remote_code=True)


@pytest.mark.slow
@pytest.mark.usefixtures("_own_modules")
@pytest.mark.parametrize(
    ("method", "result", "said"),
    [
        ("slide_representations", '{"image_embedding": self.projection(features).mean(1)}', None),
        ("forward_features", "(self.projection(features).mean(1), {})", None),
        ("something_else", "1", "TinySlides has none of encode_slide_from_patch_features, slide_representations"),
        ("forward_features", "features", r"its own forward_features gives \(1, 15, 6\), and not one embedding"),
        ("forward_features", "features.nothing", "its own forward_features fails .AttributeError"),
    ],
)
def test_what_such_a_model_gives_is_looked_at(method: str, result: str, said: str | None, tmp_path: Path) -> None:
    model = write_model(tmp_path / f"tiny-{abs(hash((method, result)))}", method, result)
    path = write_tiles(tmp_path / "in" / "s.h5", 6, "toy")
    options: dict[str, Any] = {"slide_encoder": model, "device": "cpu", "trust_remote_code": True}
    if said is None:
        [one] = embed([path], tmp_path / "out", **options)
        assert one.status == "done", one.reason
        return
    if method == "something_else":
        with pytest.raises(LongslideError, match=said):
            embed([path], tmp_path / "out", **options)
        return
    [one] = embed([path], tmp_path / "out", **options)
    assert one.status == "failed"
    assert re.search(said, one.reason)


@pytest.mark.slow
@pytest.mark.usefixtures("_own_modules")
def test_a_checkpoint_alone_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A classifier of slide embeddings names where they came from; to predict, the user must name it too."""
    from classifier_files import write_classifier

    (tmp_path / "tiny.yaml").write_text(ENCODER)
    (tmp_path / "stranger.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    write_synthetic_slide(tmp_path / "a.svs", size=(1024, 768), seed=0)
    spec = write_spec(tmp_path / "small.yaml", "titan", tile_encoder="tiny", tile_dim=48)
    tiles: dict[str, Any] = {"tile_encoder": tmp_path / "tiny.yaml", "tile_checkpoint": "random", "device": "cpu"}
    embed([tmp_path / "a.svs"], tmp_path / "features", **tiles, slide_encoder=spec, slide_checkpoint="random")
    said = (
        ("stranger/slides", "give --slide-encoder stranger/slides --trust-remote-code"),
        (
            "stranger:slides",
            "code outside Longslide, which a file alone may not run.*One of your own is given with --slide",
        ),
    )
    files = [tmp_path / "repository.ckpt", tmp_path / "factory.ckpt"]
    for file, (name, _) in zip(files, said, strict=True):
        write_classifier(file, tmp_path / "features", aggregator="linear-probe", slide_encoder=name)
    shutil.rmtree(tmp_path / "features")
    options: dict[str, Any] = {**tiles, "output": tmp_path / "out", "trust_remote_code": True}
    for file, (_, message) in zip(files, said, strict=True):
        with pytest.raises(LongslideError, match=message):
            predict(tmp_path / "a.svs", checkpoint=file, **options)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_moozys_case_transformer_reads_the_slide_embeddings_of_patients(tmp_path: Path) -> None:
    data = write_cohort(tmp_path, 24, slides_a_patient=2)
    model = [
        "--model.aggregator", "moozy-case", "--model.aggregator.heads", "2", "--model.aggregator.ffn_width", "8",
        "--model.checkpoint", "random", "--data.bags", "patient",
    ]  # fmt: skip
    assert main(["fit", "--config", "binary", *data, *model, *quick(tmp_path / "run", *BRIEF)]) == 0
    description = torch.load(next((tmp_path / "run").rglob("best.ckpt")), weights_only=True)["longslide"]
    assert description["bag_unit"] == "patient"
    assert description["aggregator"]["architecture"]["weights"] == "random"

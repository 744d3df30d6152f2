import hashlib
import pickle
from unittest.mock import MagicMock

import pytest
import torch
import transformers
import yaml
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError
from longslide.errors import LongslideError
from longslide.models.tile_encoder.encoder import create_tile_encoder
from safetensors.torch import load_file, save_file

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 14}


def write_spec(path, architecture="vit_tiny_patch16_224", crop=56, pooling="cls", **changes):
    """A YAML file of a ViT of two layers and 48 channels on 56-pixel tiles."""
    small = {"img_size": crop, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3}
    spec = {
        "name": path.stem,
        "architecture": architecture,
        "timm_args": small | changes.pop("timm_args", {}),
        "dim": 96 if pooling == "cls+mean" else 48,
        "resize": crop,
        "interpolation": "bicubic",
        "crop": crop,
        "mean": [0.5, 0.4, 0.6],
        "std": [0.2, 0.25, 0.3],
        "pooling": pooling,
        "precision": "float32",
        "tile_mpp": 0.5,
        "tile_px": crop,
        "licence": "none",
        "gated": False,
        "paper": "none",
        "hub_id": None,
    }
    path.write_text(yaml.safe_dump(spec | changes))
    return path


@pytest.fixture
def spec(tmp_path):
    return write_spec(tmp_path / "small.yaml")


@pytest.fixture
def state(spec):
    return create_tile_encoder(spec, checkpoint="random", seed=3).network.state_dict()


def tiles(count=3, size=56):
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def shaken(model):
    """Random weights everywhere, so that no mix-up of tensors stays hidden behind zeros and ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.ndim == 1) * 0.3)
    return model.eval()


def theirs(model, encoder, pooling, prefix_tokens):
    with torch.inference_mode():
        tokens = model(encoder.transform(tiles())).last_hidden_state
    mean = tokens[:, prefix_tokens:].mean(dim=1)
    return tokens[:, 0] if pooling == "cls" else torch.cat([tokens[:, 0], mean], dim=-1)


SWIGLU = {"init_values": 1.0, "mlp_layer": "SwiGLUPacked", "act_layer": "silu", "mlp_ratio": 256 / 48}
REGISTERS = {"reg_tokens": 4, "no_embed_class": True}
FORMATS = {
    "vit": (
        lambda: transformers.ViTModel(
            transformers.ViTConfig(intermediate_size=192, image_size=56, **SIZES), add_pooling_layer=False
        ),
        {"norm_eps": 1e-12},
        "cls",
        1,
    ),
    "dinov2": (
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(image_size=56, **SIZES)),
        {"timm_args": {"init_values": 1.0}},
        "cls+mean",
        1,
    ),
    "dinov2 trained at another size": (
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(image_size=126, use_swiglu_ffn=True, **SIZES)),
        {"timm_args": SWIGLU},
        "cls+mean",
        1,
    ),
    "dinov2 with registers": (
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(image_size=56, use_swiglu_ffn=True, **SIZES)
        ),
        {"timm_args": SWIGLU | REGISTERS},
        "cls+mean",
        5,
    ),
    "dinov2 with registers trained at another size": (
        lambda: transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(image_size=126, **SIZES)),
        {"timm_args": {"init_values": 1.0} | REGISTERS},
        "cls",
        5,
    ),
}


def test_a_clip_model_of_transformers_gives_its_image_features(tmp_path):
    vision = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}
    text = vision | {"vocab_size": 99, "max_position_embeddings": 8}
    config = transformers.CLIPConfig(
        vision_config=vision | {"image_size": 56, "patch_size": 14}, text_config=text, projection_dim=32
    )
    model = shaken(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path / "hub")
    small = {"architecture": "vit_base_patch32_clip_quickgelu_224", "pooling": "timm", "dim": 32}
    spec = write_spec(tmp_path / "small.yaml", **small, timm_args={"num_classes": 32})
    encoder = create_tile_encoder(spec, checkpoint=tmp_path / "hub")
    with torch.inference_mode():
        features = model.visual_projection(model.vision_model(encoder.transform(tiles())).pooler_output)
        torch.testing.assert_close(encoder(tiles()), features, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_a_folder_of_transformers_gives_the_embeddings_of_transformers(tmp_path, format):
    build, changes, pooling, prefix_tokens = FORMATS[format]
    model = shaken(build())
    model.save_pretrained(tmp_path / "hub")
    encoder = create_tile_encoder(
        write_spec(tmp_path / "small.yaml", pooling=pooling, **changes), checkpoint=tmp_path / "hub"
    )
    with torch.inference_mode():
        ours = encoder(tiles())
    torch.testing.assert_close(ours, theirs(model, encoder, pooling, prefix_tokens), atol=1e-5, rtol=1e-5)


def test_the_classifier_of_transformers_is_left_out_and_its_prefix_taken_off(tmp_path):
    config = transformers.Dinov2Config(image_size=56, num_labels=2, **SIZES)
    model = shaken(transformers.Dinov2ForImageClassification(config))
    model.save_pretrained(tmp_path / "hub")
    assert any(key.startswith("dinov2.") for key in load_file(tmp_path / "hub" / "model.safetensors"))
    spec = write_spec(tmp_path / "small.yaml", timm_args={"init_values": 1.0})
    encoder = create_tile_encoder(spec, checkpoint=tmp_path / "hub")
    with torch.inference_mode():
        torch.testing.assert_close(encoder(tiles()), theirs(model.dinov2, encoder, "cls", 1), atol=1e-5, rtol=1e-5)


def test_a_checkpoint_of_the_dinov2_repository_is_read(tmp_path):
    spec = write_spec(tmp_path / "small.yaml", timm_args=SWIGLU | REGISTERS)
    source = shaken(create_tile_encoder(spec, checkpoint="random"))
    state = {}
    for key, value in source.network.state_dict().items():
        names = {"reg_token": "register_tokens", "mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"}
        for ours, dinov2 in names.items():
            key = key.replace(ours, dinov2)
        state["backbone." + key] = value
    class_position = torch.randn(1, 1, 48)
    state["backbone.cls_token"] = state["backbone.cls_token"] - class_position
    state["backbone.pos_embed"] = torch.cat([class_position, state["backbone.pos_embed"]], dim=1)
    state |= {"backbone.mask_token": torch.zeros(1, 48), "dino_head.mlp.0.weight": torch.zeros(2, 2)}
    chunked = {key.replace(".blocks.", ".blocks.0."): value for key, value in state.items()}
    for teacher in (state, chunked):
        torch.save({"teacher": teacher, "iteration": 3}, tmp_path / "teacher.pth")
        encoder = create_tile_encoder(spec, checkpoint=tmp_path / "teacher.pth")
        torch.testing.assert_close(encoder(tiles()), source(tiles()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".torch"])
def test_a_weights_file_of_any_kind_is_read_and_its_digest_recorded(tmp_path, spec, state, suffix):
    file = tmp_path / f"weights{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    encoder = create_tile_encoder(spec, checkpoint=str(file))
    assert all(torch.equal(value, state[key]) for key, value in encoder.network.state_dict().items())
    assert encoder.weights == f"{file} sha256:{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "teacher"])
@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.backbone."])
def test_wrappers_and_prefixes_are_taken_off(tmp_path, spec, state, wrapper, prefix):
    content = {wrapper: {prefix + key: value for key, value in state.items()}, "epoch": 7}
    torch.save(content, tmp_path / "weights.pth")
    encoder = create_tile_encoder(spec, checkpoint=tmp_path / "weights.pth")
    assert all(torch.equal(value, state[key]) for key, value in encoder.network.state_dict().items())


def test_half_precision_weights_become_float32(tmp_path, spec, state):
    save_file({key: value.half() for key, value in state.items()}, tmp_path / "weights.safetensors")
    encoder = create_tile_encoder(spec, checkpoint=tmp_path / "weights.safetensors")
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_the_classifier_of_a_timm_checkpoint_is_left_out(tmp_path, spec, state):
    save_file(
        state | {"head.weight": torch.zeros(1000, 48), "head.bias": torch.zeros(1000)}, tmp_path / "w.safetensors"
    )
    create_tile_encoder(spec, checkpoint=tmp_path / "w.safetensors")


def test_a_network_with_buffers_of_its_own_loads_too(tmp_path):
    source = create_tile_encoder("resnet18", checkpoint="random")
    save_file(source.network.state_dict(), tmp_path / "resnet.safetensors")
    encoder = create_tile_encoder("resnet18", checkpoint=tmp_path / "resnet.safetensors")
    torch.testing.assert_close(encoder(tiles()), source(tiles()))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s.pop("norm.weight"), "missing: norm.weight"),
        (lambda s: s.update({"extra.thing": torch.zeros(1)}), "unexpected: extra.thing"),
        (lambda s: s.update({"norm.bias": torch.zeros(7)}), r"wrong shape: norm.bias \(7,\) instead of \(48,\)"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 82, 48)), r"wrong shape: pos_embed \(1, 82, 48\) instead of"),
        (lambda s: [s.pop(key) for key in list(s) if "blocks.1" in key], r"missing: blocks\.1.* and 7 more"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_the_tensors_named(tmp_path, spec, state, change, complaint):
    change(state)
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(LongslideError, match=complaint) as refusal:
        create_tile_encoder(spec, checkpoint=tmp_path / "weights.safetensors")
    assert "weights.safetensors" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_position_embeddings_of_a_vit_are_never_resampled(tmp_path):
    config = transformers.ViTConfig(intermediate_size=192, image_size=126, **SIZES)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "hub")
    with pytest.raises(LongslideError, match="wrong shape: pos_embed"):
        create_tile_encoder(write_spec(tmp_path / "small.yaml"), checkpoint=tmp_path / "hub")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            {"model": {"a": torch.zeros(1)}, "state_dict": {"a": torch.zeros(1)}},
            r"several state dicts \(model, state_dict\)",
        ),
        ({"student": {"a": torch.zeros(1)}, "teacher": {"a": torch.zeros(1)}}, "several state dicts"),
        ({"epoch": 3, "weights": {"a": torch.zeros(1)}}, "no state dict among epoch, weights"),
        (torch.zeros(3), "no tensors by name"),
        ({}, "no tensors by name"),
    ],
)
def test_a_file_without_one_clear_state_dict_is_refused(tmp_path, spec, content, complaint):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(LongslideError, match=complaint):
        create_tile_encoder(spec, checkpoint=tmp_path / "weights.pth")


class Payload:
    def __reduce__(self):
        return (exec, ("raise AssertionError('unpickled')",))


def test_nothing_is_unpickled(tmp_path, spec):
    (tmp_path / "weights.pth").write_bytes(pickle.dumps({"model": Payload()}, protocol=2))
    with pytest.raises(LongslideError, match="not a readable checkpoint"):
        create_tile_encoder(spec, checkpoint=tmp_path / "weights.pth")
    torch.save({"model": Payload()}, tmp_path / "zip.pth")
    with pytest.raises(LongslideError, match="not a readable checkpoint"):
        create_tile_encoder(spec, checkpoint=tmp_path / "zip.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_broken_weights_file_is_refused_in_one_line(tmp_path, spec, state, suffix):
    file = tmp_path / f"weights{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    for broken in (file.read_bytes()[:1000], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        file.write_bytes(broken)
        with pytest.raises(LongslideError, match="not a readable checkpoint") as refusal:
            create_tile_encoder(spec, checkpoint=file)
        assert str(file) in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path, spec):
    with pytest.raises(LongslideError, match="no such checkpoint"):
        create_tile_encoder(spec, checkpoint=tmp_path / "none.pth")
    with pytest.raises(LongslideError, match=r"no model\.safetensors or pytorch_model\.bin"):
        create_tile_encoder(spec, checkpoint=tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_come_from_the_cache_of_the_hub_without_a_network(tmp_path, hub, state, file):
    snapshot = hub / "models--someone--small" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (hub / "models--someone--small" / "refs").mkdir()
    (hub / "models--someone--small" / "refs" / "main").write_text("0123abcd")
    save_file(state, snapshot / file) if file.endswith("safetensors") else torch.save(state, snapshot / file)
    encoder = create_tile_encoder(write_spec(tmp_path / "small.yaml", hub_id="someone/small"))
    digest = hashlib.sha256((snapshot / file).read_bytes()).hexdigest()[:16]
    assert encoder.weights == f"hf:someone/small@0123abcd sha256:{digest}"


def test_offline_without_a_cache_the_error_says_what_to_give(hub):
    with pytest.raises(LongslideError) as refusal:
        create_tile_encoder("gigapath")
    for hint in ("huggingface.co/prov-gigapath/prov-gigapath", "HF_TOKEN", "HF_HUB_OFFLINE", "--tile-checkpoint"):
        assert hint in str(refusal.value)


def test_a_page_without_a_weights_file_is_named(monkeypatch):
    def refuse(*args, **kwargs):
        raise EntryNotFoundError("404 Client Error")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(
        LongslideError, match=r"huggingface\.co/MahmoodLab/UNI has no model\.safetensors or pytorch_model"
    ):
        create_tile_encoder("uni")


def test_a_gated_model_without_a_token_names_the_page_and_the_variable(monkeypatch):
    def refuse(*args, **kwargs):
        raise GatedRepoError("401 Client Error", response=MagicMock(status_code=401, headers={}))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(LongslideError, match=r"https://huggingface\.co/MahmoodLab/UNI and set HF_TOKEN"):
        create_tile_encoder("uni")


def test_an_encoder_without_a_hub_page_asks_for_its_weights(spec):
    with pytest.raises(LongslideError, match="--tile-checkpoint"):
        create_tile_encoder(spec)


def test_an_encoder_whose_weights_are_elsewhere_says_where(tmp_path):
    with pytest.raises(
        LongslideError, match=r"from https://github\.com/hms-dbmi/CHIEF and give them with --tile-checkp"
    ):
        create_tile_encoder("chief-ctranspath")


def test_weights_of_another_name_are_found_in_the_cache_of_the_hub_and_in_a_folder(tmp_path, hub, state):
    snapshot = hub / "models--someone--small" / "snapshots" / "0123abcd"
    (hub / "models--someone--small" / "refs").mkdir(parents=True)
    (hub / "models--someone--small" / "refs" / "main").write_text("0123abcd")
    snapshot.mkdir(parents=True)
    torch.save(state, snapshot / "teacher.pt")
    spec = write_spec(tmp_path / "small.yaml", hub_id="someone/small", hub_file="teacher.pt")
    assert create_tile_encoder(spec).weights.startswith("hf:someone/small@0123abcd")
    assert create_tile_encoder(spec, checkpoint=snapshot).weights.startswith(str(snapshot / "teacher.pt"))


@pytest.mark.parametrize("name", ["conch-v1", "conch-v15", "keep", "musk", "musk-multiscale", "plip"])
@pytest.mark.parametrize("other", ["another", "grey"])
def test_weights_of_another_model_are_refused_in_one_line(tmp_path, state, name, other):
    prefix = {"conch-v1": "visual.trunk.", "conch-v15": "trunk.", "keep": "visual."}.get(name, "")
    odd = {"pos_embed": torch.zeros(1, 7, 3), "grey": torch.zeros(1)}
    save_file(
        {prefix + key: value for key, value in (state if other == "another" else odd).items()},
        tmp_path / "w.safetensors",
    )
    with pytest.raises(LongslideError, match=f"w.safetensors: does not fit tile encoder '{name}' .*missing") as refusal:
        create_tile_encoder(name, checkpoint=tmp_path / "w.safetensors")
    assert "\n" not in str(refusal.value)

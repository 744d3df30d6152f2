"""Tile encoders held against the published code; `reference/README.md` says how its numbers were made."""

import re
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from longslide import open_slide, read_features, write_synthetic_slide
from longslide.models.checkpoint_file import check_tensors
from longslide.models.tile_encoder.encoder import build_network, create_tile_encoder
from longslide.models.tile_encoder.published_names import to_timm
from longslide.models.tile_encoder.spec import load_tile_encoder_spec
from longslide.pipeline.cli import main

REFERENCE = Path(__file__).parent / "reference"
NAMES = sorted(path.stem for path in REFERENCE.glob("*.npz"))
PUBLISHED_AS = {"chief-ctranspath": "ctranspath"}
POSITIONS = ("pos_embed", "cls_token", "query", "positional_embedding", "embed_positions.A.weight")


def seeded(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Weights of about unit gain that follow from a tensor's name."""
    values = np.asarray(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape), np.float32)
    if name.endswith("running_var"):
        values = 1 + 0.2 * np.abs(values)
    elif len(shape) <= 1:
        values = 0.2 * values + name.endswith(("weight", "gamma"))
    else:
        values *= np.float32(0.5 if name.endswith(POSITIONS) else np.prod(shape[1:]) ** -0.5)
    return torch.from_numpy(np.asarray(values, np.float32))


def images(size: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, size, size)).astype(np.float32))


def layout(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in the published checkpoint."""
    lines = bytes(np.load(REFERENCE / f"{PUBLISHED_AS.get(name, name)}.npz")["layout"]).decode().splitlines()
    pairs = (line.partition(" ")[::2] for line in lines)
    return {key: tuple(int(size) for size in shape.split(",") if size) for key, shape in pairs}


def of_two_blocks(name: str) -> dict[str, torch.Tensor]:
    """A checkpoint in the published layout, with seeded weights; of towers of texts a single tensor."""
    whole = layout(name)
    if name in ("ctranspath", "chief-ctranspath"):
        return {key: seeded(key, shape) for key, shape in whole.items() if "attn_mask" not in key}
    texts = r"text|beit3\.text_embed|transformer\.|token_embedding|language_head|.*\.B\."
    images_alone = {key for key in whole if not re.match(texts, key)}
    first = {key for key in images_alone if int((re.search(r"(?:blocks|layers)\.(\d+)\.", key) or [0, 0])[1]) < 2}
    text = sorted(whole.keys() - images_alone)[:1]
    state = {key: seeded(key, whole[key]) for key in (*(key for key in whole if key in first), *text)}
    periods = {"rope_embed.periods": 100 ** (torch.arange(16, dtype=torch.bfloat16) / 16)}  # not learned
    return state | {key: value for key, value in periods.items() if key in state}


def spec_of_two_blocks(name: str, folder: Path) -> Path:
    spec = load_tile_encoder_spec(name)
    cut = {} if "ctranspath" in name else {"depth": 2}
    path = folder / "small.yaml"
    content = asdict(replace(spec, name="small", timm_args=dict(spec.timm_args) | cut))
    path.write_text(
        yaml.safe_dump({key: list(value) if isinstance(value, tuple) else value for key, value in content.items()})
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_gives_the_embeddings_of_the_published_code(name: str, tmp_path: Path) -> None:
    torch.save({"model": of_two_blocks(name)}, tmp_path / "published.pth")
    encoder = create_tile_encoder(spec_of_two_blocks(name, tmp_path), checkpoint=tmp_path / "published.pth")
    with torch.inference_mode():
        found = encoder._pool(images(encoder.spec.crop))
    expected = torch.from_numpy(np.load(REFERENCE / f"{name}.npz")["embeddings"])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", [*NAMES, *PUBLISHED_AS])
def test_the_tensors_of_the_published_checkpoint_fit(name: str) -> None:
    with torch.device("meta"):
        network = build_network(load_tile_encoder_spec(name))
        published = {key: torch.empty(shape) for key, shape in layout(name).items()}
        ours = network.from_published(published) if hasattr(network, "from_published") else to_timm(published, network)
    check_tensors(ours, network.state_dict(), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conch-v15", "ctranspath"])
def test_a_slide_is_embedded_with_the_published_weights_from_the_command_line(name: str, tmp_path: Path) -> None:
    torch.save(of_two_blocks(name), tmp_path / "published.pth")
    spec = spec_of_two_blocks(name, tmp_path)
    write_synthetic_slide(tmp_path / "a.svs", size=(1024, 768), mpp=0.5, seed=3)
    words = [
        "embed",
        str(tmp_path / "a.svs"),
        "--output",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "--precision",
        "float32",
    ]
    assert main([*words, "--tile-encoder", str(spec), "--tile-checkpoint", str(tmp_path / "published.pth")]) == 0
    found = read_features(tmp_path / "out" / "a.h5")
    encoder = create_tile_encoder(spec, checkpoint=tmp_path / "published.pth")
    assert found.weights == encoder.weights
    with open_slide(tmp_path / "a.svs") as slide, torch.inference_mode():
        x, y = found.coords[0]
        pixels = slide.read_region(int(x), int(y), 0, encoder.spec.tile_px, encoder.spec.tile_px)
        expected = encoder(torch.from_numpy(pixels)[None])[0]
    torch.testing.assert_close(torch.from_numpy(found.features[0]).float(), expected, atol=2e-3, rtol=2e-3)

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from longslide.errors import LongslideError
from longslide.models.tile_encoder.encoder import TileEncoder, build_network
from longslide.models.tile_encoder.spec import list_tile_encoders, load_tile_encoder_spec

# Published counts, less what is not loaded (mask token) or folded (class position, and 518 -> 224 position embeddings).
PARAMETERS = {
    "gigapath": 1_134_953_984,
    "uni": 303_350_784,
    "uni2-h": 681_394_176,
    "virchow": 631_229_184,
    "virchow2": 631_239_424,
    "h-optimus-0": 1_134_774_272,
    "h-optimus-1": 1_134_774_272,
    "phikon": 85_798_656,
    "phikon-v2": 303_351_808 - 1024,
    "hibou-b": 85_741_056 - 768 - 768,
    "hibou-l": 303_659_264 - 1024 - 1024,
    "midnight-12k": 1_136_480_768 - 1536 - (37 * 37 - 16 * 16) * 1536,
}
ROUNDED = {  # millions, as the papers, model cards and LazySlide's register give them
    "chief-ctranspath": 27.5,
    "ctranspath": 27.5,
    "gpfm": 303.2,
    "lunit-vits16": 21.7,
    "mstar": 303.4,
    "h0-mini": 85.7,
    "kaiko-vits8": 21.7,
    "kaiko-vits16": 21.7,
    "gigapath-flash": 21.7,
    "kaiko-vitb8": 85.8,
    "kaiko-vitb16": 85.8,
    "kaiko-vitl14": 304.4,
    "lunit-vits8": 21.7,
    "lunit-vits8-imagenet": 21.7,
}
NOT_SHOWN = {"pathorchestra"}
PUBLISHED_CODE = {  # held against the published code, by test_published.py and test_weights.py
    *(path.stem for path in (Path(__file__).parent / "reference").glob("*.npz")),
    *("chief-ctranspath", "midnight-12k", "phikon", "phikon-v2", "plip"),
}
EXAMPLE = {
    "name": "mine",
    "architecture": "vit_tiny_patch16_224",
    "dim": 192,
    "resize": 224,
    "interpolation": "bicubic",
    "crop": 224,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "pooling": "cls",
    "precision": "float32",
    "tile_mpp": 0.5,
    "tile_px": 224,
    "licence": "MIT",
    "gated": False,
    "paper": "none",
    "hub_id": None,
}


def write(path, **changes):
    content = {key: value for key, value in (EXAMPLE | changes).items() if value != "left out"}
    path.write_text(yaml.safe_dump(content))
    return path


def test_what_was_shown_is_known_of_every_encoder():
    assert set(list_tile_encoders()) == PARAMETERS.keys() | ROUNDED.keys() | NOT_SHOWN | PUBLISHED_CODE


@pytest.mark.parametrize("name", list_tile_encoders())
def test_the_table_of_the_documentation_states_the_facts_of_each_encoder(name):
    spec = load_tile_encoder_spec(name)
    tiles = f"{spec.tile_px} px" + (f" at {spec.tile_mpp:g}" if spec.tile_mpp else "")
    counted = "parameters" if name in PARAMETERS.keys() | ROUNDED.keys() else "not shown"
    cells = (
        f"`{name}`",
        f"{spec.dim:,}",
        tiles,
        f"{spec.crop} px",
        "yes" if spec.gated else "no",
        spec.licence,
        "code" if name in PUBLISHED_CODE else counted,
        f"[paper]({spec.paper})",
    )
    page = Path(__file__).parents[3] / "docs" / "encoders.md"
    assert f"| {' | '.join(cells)} |" in page.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", list_tile_encoders())
def test_the_name_of_an_encoder_is_the_name_of_its_file(name):
    assert load_tile_encoder_spec(name).name == name


@pytest.mark.parametrize("name", list_tile_encoders())
def test_every_encoder_builds_with_the_published_number_of_parameters_and_its_dimension(name):
    spec = load_tile_encoder_spec(name)
    with torch.device("meta"):
        network = build_network(spec)
        embeddings = TileEncoder(spec, network, "none")._pool(torch.empty(1, 3, spec.crop, spec.crop))
    assert embeddings.shape == (1, spec.dim)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == PARAMETERS.get(name, count)
    assert count / 1e6 == pytest.approx(ROUNDED.get(name, count / 1e6), rel=2e-3)


def test_virchow2_leaves_its_registers_out_of_the_mean():
    with torch.device("meta"):
        assert build_network(load_tile_encoder_spec("virchow2")).num_prefix_tokens == 5


def test_listing_and_reading_encoders_needs_neither_torch_nor_timm():
    program = (
        "import sys; from longslide.models.tile_encoder.spec import *;"
        "[load_tile_encoder_spec(name) for name in list_tile_encoders()];"
        "assert not {'torch', 'timm'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("name", "dim", "resize", "crop"),
    [
        ("vit_tiny_patch16_224", 192, 248, 224),
        ("vit_small_patch14_dinov2.lvd142m", 384, 518, 518),
        ("resnet18", 512, 235, 224),
    ],
)
def test_any_timm_model_takes_its_transform_from_timm(name, dim, resize, crop):
    spec = load_tile_encoder_spec(name)
    assert (spec.dim, spec.resize, spec.crop, spec.pooling) == (dim, resize, crop, "timm")
    assert spec.hub_id.startswith("timm/")


@pytest.mark.parametrize(
    ("wrong", "near"), [("gigapth", "gigapath"), ("uni2h", "uni2-h"), ("vit_tiny_patch16_225", "vit_tiny_patch16_224")]
)
def test_an_unknown_encoder_is_refused_with_near_matches(wrong, near):
    with pytest.raises(LongslideError, match=f"did you mean .*{near}"):
        load_tile_encoder_spec(wrong)


def test_an_encoder_is_given_by_the_path_of_its_file(tmp_path):
    spec = load_tile_encoder_spec(write(tmp_path / "mine.yaml"))
    assert (spec.name, spec.mean, spec.timm_args) == ("mine", (0.5, 0.5, 0.5), {})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"mpps": 1}, "unknown key mpps"),
        ({"dim": "left out", "std": "left out"}, "missing key dim, std"),
        ({"interpolation": "lanczos"}, "interpolation: Expected .*'bilinear', 'bicubic'"),
        ({"pooling": "max"}, "pooling: Expected .*'cls'"),
        ({"dim": "many"}, "dim: .*invalid literal"),
        ({"dim": 0}, "dim: .*v>0"),
        ({"dim": 192.5}, "dim: .*not an integer"),
        ({"mean": [0.5]}, "mean: Expected a tuple with 3 elements"),
        ({"std": [0.5, 0.5, 0]}, "std must be positive"),
        ({"crop": 256}, "must not be larger than resize"),
        ({"gated": "perhaps"}, "gated: Expected .*bool"),
        ({"name": "uni"}, "the name 'uni' is taken"),
    ],
)
def test_a_wrong_file_is_refused_by_name_with_the_key(tmp_path, changes, complaint):
    path = write(tmp_path / "mine.yaml", **changes)
    with pytest.raises(LongslideError, match=complaint) as refusal:
        load_tile_encoder_spec(path)
    assert str(path) in str(refusal.value)


def test_a_file_that_is_not_there_or_not_yaml_is_refused(tmp_path):
    with pytest.raises(LongslideError, match="no such tile encoder file"):
        load_tile_encoder_spec(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("name: [")
    with pytest.raises(LongslideError, match="not YAML"):
        load_tile_encoder_spec(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(LongslideError, match="is a mapping"):
        load_tile_encoder_spec(tmp_path / "list.yaml")

"""Slide encoders of other architectures: the published numbers, packed slides, memory, and what they refuse."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from longslide import LongslideError, create_slide_encoder
from longslide.models.aggregators.moozy_case import MOOZYCase
from longslide.models.slide_encoder import alibi_transformer
from longslide.models.slide_encoder.checkpoint import to_published
from longslide.models.slide_encoder.gated_attention import GatedSlideEncoder
from longslide.models.slide_encoder.mamba import BLOCK, Mamba2, state_space_scan
from longslide.models.slide_encoder.published import PublishedSlideEncoder
from torch import Tensor

REFERENCE = Path(__file__).parent / "reference"
"""Numbers of the published implementations with random weights, in float32 on a CPU; all weights under published names."""

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "titan": ("titan", {"tile_dim": 24, "layers": 2, "width": 48, "heads": 12, "pool_heads": 8, "ffn_width": 48}),
    "chief": ("chief", {"tile_dim": 32, "hidden": 24, "attention_width": 16}),
    "feather": ("feather", {"tile_dim": 32, "width": 24, "attention_width": 16}),
    "madeleine": ("madeleine", {"tile_dim": 32, "width": 16, "heads": 4}),
    "prism": ("prism", {"tile_dim": 24, "latents": 6, "width": 16, "depth": 4, "layers": 2, "heads": 8}),
    "cobra2": (
        "cobra2-uni",
        {"tile_dim": 24, "reads": 24, "width": 32, "layers": 1, "heads": 4, "attention_width": 8, "state": 8},
    ),
    "cobra": (
        "cobra2-uni",
        {"tile_dim": 24, "reads": 24, "width": 32, "layers": 2, "heads": 8, "attention_width": 8, "state": 8},
    ),
    "moozy": (
        "moozy",
        {"tile_dim": 24, "layers": 2, "width": 24, "heads": 12, "ffn_width": 32, "registers": 4},
    ),
}


def read_reference(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights, and the rest."""
    with np.load(REFERENCE / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file}
    weights = {key.removeprefix("weights/"): arrays.pop(key) for key in list(arrays) if key.startswith("weights/")}
    return weights, arrays


def write_weights(weights: dict[str, Tensor], path: Path) -> Path:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        if key.startswith(("teacher_slide_encoder.", "case_transformer.")):  # MOOZY's are in one file
            part, _, key = key.partition(".")
            parts.setdefault(part, {})[key] = value
    torch.save(parts or weights, path)
    return path


def small(name: str, checkpoint: str | Path = "random") -> PublishedSlideEncoder:
    encoder, sizes = SMALL[name]
    made = create_slide_encoder(encoder, checkpoint=checkpoint, **sizes)
    assert isinstance(made, PublishedSlideEncoder)
    return made


@pytest.mark.parametrize("name", SMALL)
def test_the_numbers_of_the_published_implementation_hold(name: str, tmp_path: Path) -> None:
    weights, arrays = read_reference(name)
    encoder = small(name, write_weights(weights, tmp_path / "weights.pt"))
    assert not encoder.training
    features, cells = arrays["tile_features"], arrays["grid_cells"]
    with torch.inference_mode():
        output = encoder(features[None], cells[None])
    assert output.shape == (1, encoder.width)
    assert (output[0] - arrays["output"]).abs().max() < 2e-6 * max(1, float(arrays["output"].abs().max()))
    if isinstance(encoder, GatedSlideEncoder):
        with torch.inference_mode():
            attention = encoder.attention_weights(features, cells, torch.tensor([0, len(features)]))
        assert (attention - arrays["attention"]).abs().max() < 1e-6
        assert attention.max() > 2 * attention.min(), "weights that are all alike would show nothing"


def slides(name: str, lengths: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Packed slides for an encoder, none like the other."""
    dim = SMALL[name][1]["tile_dim"]
    features = torch.randn(sum(lengths), dim, dtype=dtype, generator=torch.Generator().manual_seed(0))
    cells = torch.cat([torch.stack([torch.arange(n) % 7, torch.arange(n) // 7], 1) for n in lengths])
    return features, cells, torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_packed_slides_give_what_they_give_one_at_a_time_and_so_do_their_gradients(
    name: str, checkpointing: bool
) -> None:
    encoder = small(name).double()
    lengths = [1, 30, 6]
    features, cells, cu_seqlens = slides(name, lengths)
    weight = torch.randn(3, encoder.width, dtype=torch.float64)
    begins = cu_seqlens.tolist()
    alone = torch.cat([encoder(features[a:b][None], cells[a:b][None]) for a, b in itertools.pairwise(begins)])
    wanted = torch.autograd.grad((alone * weight).sum(), list(encoder.parameters()))
    encoder.checkpointing = checkpointing
    together = encoder(features, cells, cu_seqlens)
    found = torch.autograd.grad((together * weight).sum(), list(encoder.parameters()))
    torch.testing.assert_close(together, alone)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["titan", "moozy"])
def test_distances_in_blocks_of_queries_are_those_at_once_and_so_are_the_gradients(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = small(name).double()
    features, cells, _ = slides(name, [60])
    features.requires_grad_()
    whole = encoder(features[None], cells[None])
    wanted = torch.autograd.grad(whole.square().sum(), [features, *encoder.parameters()])
    monkeypatch.setattr(alibi_transformer, "MOST_BIASES", 12 * 65 * 7)  # nine or ten blocks
    blocks = encoder(features[None], cells[None])
    found = torch.autograd.grad(blocks.square().sum(), [features, *encoder.parameters()])
    torch.testing.assert_close(blocks, whole)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["titan", "moozy"])
def test_it_matters_how_far_tiles_are_from_one_another_and_not_where_the_slide_is(name: str) -> None:
    encoder = small(name)
    features, cells, _ = slides(name, [40], torch.float32)
    with torch.inference_mode():
        here, there, apart = (
            encoder(features[None], where[None]) for where in (cells, cells + torch.tensor([900, 40]), cells * 3)
        )
    torch.testing.assert_close(here, there)
    assert (here - apart).abs().max() > 1e-4


@pytest.mark.parametrize("name", [name for name in SMALL if not small(name).READS_CELLS])
def test_it_does_not_matter_where_the_tiles_are_to_those_that_do_not_read_it(name: str) -> None:
    features, cells, _ = slides(name, [40], torch.float32)
    encoder = small(name)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(features[None], cells[None]), encoder(features[None], cells[None] * 0))


def test_impossible_cells_are_refused_where_they_are_read() -> None:
    features, cells, _ = slides("titan", [40], torch.float32)
    with pytest.raises(LongslideError, match="two tiles in one grid cell"):
        small("titan")(features[None], cells[None] // 2)
    with pytest.raises(LongslideError, match="grid cell below 0"):
        small("moozy")(features[None], cells[None] - 1)


@pytest.mark.parametrize("name", SMALL)
def test_shapes_that_do_not_fit_and_empty_slides_are_refused(name: str) -> None:
    encoder = small(name)
    features, cells, _ = slides(name, [8], torch.float32)
    with pytest.raises(LongslideError, match="reads tile embeddings of length"):
        encoder(features[None, :, :-1], cells[None])
    with pytest.raises(LongslideError, match="each slide has at least one tile"):
        encoder(features, cells, torch.tensor([0, 8, 8]))
    with pytest.raises(LongslideError, match="must be integers"):
        encoder(features[None], cells[None].float())


@pytest.mark.parametrize("name", SMALL)
def test_written_under_the_published_names_and_read_again_the_weights_are_equal(name: str, tmp_path: Path) -> None:
    encoder = small(name)
    torch.save(to_published(encoder), tmp_path / "weights.pt")
    again = small(name, tmp_path / "weights.pt")
    state = encoder.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    assert again.weights.startswith(f"{tmp_path / 'weights.pt'} sha256:")
    assert again.weights != encoder.weights == "random seed=0"


@pytest.mark.parametrize("other", SMALL)
@pytest.mark.parametrize("name", SMALL)
def test_weights_of_another_model_are_refused_in_one_line_that_names_tensors(
    name: str, other: str, tmp_path: Path
) -> None:
    if name == other:
        return
    file = write_weights(read_reference(other)[0], tmp_path / "weights.pt")
    with pytest.raises(LongslideError, match=r"weights\.pt: does not fit slide encoder") as caught:
        small(name, file)
    assert (
        "missing: " in str(caught.value) or "wrong shape: " in str(caught.value) or "unexpected: " in str(caught.value)
    )
    assert len(str(caught.value).splitlines()) == 1


def test_tensors_of_prism_that_are_one_in_the_model_must_be_one_in_the_file(tmp_path: Path) -> None:
    weights, _ = read_reference("prism")
    weights["image_resampler.perceiver.layers.3.xattn.xattn.to_q.weight"] += 1
    with pytest.raises(LongslideError, match=r"two tensors image_resampler\.perceiver\.layers\.1\.xattn\.xattn\.to_q"):
        small("prism", write_weights(weights, tmp_path / "weights.pt"))


def test_a_pooling_that_an_architecture_does_not_have_is_refused() -> None:
    with pytest.raises(LongslideError, match="has a pooling of its own: leave --pool cls out"):
        create_slide_encoder("titan", checkpoint="random", pool="cls")


def test_arguments_that_an_architecture_does_not_take_are_refused() -> None:
    with pytest.raises(LongslideError, match=r"slide encoder 'chief': .*no_such_thing"):
        create_slide_encoder("chief", checkpoint="random", no_such_thing=1)
    with pytest.raises(LongslideError, match="slide encoder 'titan': width 100 must be a multiple of heads 12"):
        create_slide_encoder("titan", checkpoint="random", width=100)
    for name, argument in (("titan", {"pool_heads": 7}), ("titan", {"heads": 0}), ("chief", {"hidden": -1})):
        with pytest.raises(LongslideError, match=f"slide encoder '{name}': [^\n]+$"):
            create_slide_encoder(name, checkpoint="random", **argument)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("titan", 48_539_904),  # "48.5M" in the README of Feather
        ("chief", 656_641),  # without its heads; "0.9M" with them
        ("feather", 788_097),  # without its head of 108 classes
        ("moozy", 42_828_288),  # with a case transformer of 21,270,528 and a ViT-S/8 of 21.67 million "85.77M"
    ],
)
def test_the_sizes_are_the_published_ones(name: str, parameters: int) -> None:
    with torch.device("meta"):
        encoder = create_slide_encoder(name, checkpoint="random")
    count = sum(parameter.numel() for parameter in encoder.parameters())
    if name == "titan":  # the published count has the pooling for the text decoder, of 128 queries, and a projection
        width = 768
        pool = 128 * width + 4 * width * width + 4 * width + 4 * width
        count += pool + width * width
    assert count == parameters


@pytest.mark.slow
def test_a_mamba_layer_gives_what_that_of_transformers_gives() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    width, state, heads = 64, 16, 2
    config = transformers.Mamba2Config(
        hidden_size=width, num_heads=heads, head_dim=64, state_size=state, n_groups=1, expand=2, chunk_size=32
    )
    theirs = Mamba2Mixer(config, layer_idx=0).eval()
    ours = Mamba2(width, state).eval()
    names = {
        "into.weight": "in_proj.weight",
        "convolution.weight": "conv1d.weight",
        "convolution.bias": "conv1d.bias",
        "step_bias": "dt_bias",
        "log_rate": "A_log",
        "skip": "D",
        "norm": "norm.weight",
        "out.weight": "out_proj.weight",
    }
    ours.load_state_dict({our: theirs.state_dict()[name] for our, name in names.items()})
    tokens = torch.randn(BLOCK + 77, width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens), theirs(tokens[None])[0], rtol=1e-4, atol=1e-5)


def test_the_scan_in_blocks_is_the_recurrence() -> None:
    generator = torch.Generator().manual_seed(0)
    x, into, out = (
        torch.randn(BLOCK + 40, *size, dtype=torch.float64, generator=generator) for size in ((2, 3), (4,), (4,))
    )
    log_decay = -torch.rand(BLOCK + 40, 2, dtype=torch.float64, generator=generator)
    state, expected = torch.zeros(2, 3, 4, dtype=torch.float64), []
    for t in range(len(x)):
        state = log_decay[t].exp()[:, None, None] * state + x[t][..., None] * into[t]
        expected.append(state @ out[t])
    torch.testing.assert_close(state_space_scan(x, log_decay, into, out), torch.stack(expected))


@pytest.mark.slow
def test_titan_holds_the_distances_of_few_tiles_at_once() -> None:
    """4,000 tiles have 192 million distances of heads: 732 MiB in float32."""
    code = """
import resource, torch
from longslide import create_slide_encoder
from longslide.models.slide_encoder import alibi_transformer
alibi_transformer.MOST_BIASES //= 16  # 64 MiB
encoder = create_slide_encoder("titan", checkpoint="random", layers=1, width=48, heads=12, pool_heads=4, ffn_width=48)
cells = torch.stack([torch.arange(4_000) % 100, torch.arange(4_000) // 100], 1)
features = torch.randn(1, 4_000, 768)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.inference_mode():
    assert encoder(features, cells[None]).isfinite().all()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.3


def test_moozys_patients_have_the_numbers_of_the_published_implementation(tmp_path: Path) -> None:
    weights, arrays = read_reference("moozy")
    sizes: dict[str, Any] = {"layers": 2, "heads": 12, "ffn_width": 32}
    file = write_weights(weights, tmp_path / "moozy.pt")
    case = MOOZYCase(24, checkpoint=str(file), **sizes).eval()
    slides = arrays["slides"]
    packed = torch.cat([slides, slides[:1]])
    with torch.inference_mode():
        found = case(packed, torch.zeros(4, 2, dtype=torch.long), torch.tensor([0, 3, 4], dtype=torch.int32))
        alone = case(slides[:1], torch.zeros(1, 2, dtype=torch.long), torch.tensor([0, 1], dtype=torch.int32))
    assert (found[0] - arrays["case"]).abs().max() < 2e-6
    torch.testing.assert_close(found[1:], alone)
    again = MOOZYCase(24, architecture=case.architecture(), **sizes)
    again.load_state_dict(case.state_dict())
    with pytest.raises(LongslideError, match="encoder 'lunit-vits8-imagenet', but these features are of 'uni'"):
        again.use_features_of("uni")
    with pytest.raises(LongslideError, match=r"moozy\.pt: does not fit MOOZY's case transformer; missing: "):
        MOOZYCase(24, checkpoint=str(file), **sizes | {"layers": 3})


def test_a_frozen_case_transformer_does_not_train() -> None:
    case = MOOZYCase(24, heads=2, ffn_width=8, layers=1, frozen=True, checkpoint="random").train()
    assert not case.training
    assert not any(parameter.requires_grad for parameter in case.parameters())

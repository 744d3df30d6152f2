"""The engine gives what the plain encoder gives, of any encoder, in any batches; and says what an encoder does not stand."""

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from longslide import LongslideError, create_tile_encoder
from longslide.models.tile_encoder import engine as engine_file
from longslide.models.tile_encoder.compilation import compile_transform, repeated_blocks
from longslide.models.tile_encoder.encoder import TileEncoder, build_network
from longslide.models.tile_encoder.engine import TileEngine, placed
from longslide.models.tile_encoder.float8 import Float8Linear, fidelity, quantise
from longslide.models.tile_encoder.spec import list_tile_encoders, load_tile_encoder_spec
from torch import Tensor, nn

CPU = torch.device("cpu")
TILES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (11, 64, 64, 3), np.uint8))


def small(name: str) -> TileEncoder:
    """An encoder of the package with few narrow layers for tiles of 64 px, and LayerScale that lets them matter.

    The networks of the package's own have two blocks of their own width; a Swin is whole.
    """
    spec = load_tile_encoder_spec(name)
    if ":" in spec.architecture:
        spec = replace(spec, timm_args=spec.timm_args | ({} if "ctranspath" in name else {"depth": 2}))
        torch.manual_seed(0)
        return TileEncoder(spec, build_network(spec), "random").eval()
    patch = spec.timm_args.get(
        "patch_size", 8 if "patch8" in spec.architecture else 16 if "patch16" in spec.architecture else 14
    )
    edge = 4 * patch
    size = {"depth": 5, "embed_dim": 192, "num_heads": 4, "img_size": edge}
    dim = spec.timm_args.get("num_classes") or (384 if spec.pooling == "cls+mean" else 192)
    spec = replace(spec, timm_args=spec.timm_args | size, dim=dim, resize=edge, crop=edge, tile_px=edge)
    torch.manual_seed(0)
    network = build_network(spec)
    for key, parameter in network.named_parameters():
        if key.endswith("gamma"):
            nn.init.uniform_(parameter, 0.1, 1)
    return TileEncoder(spec, network, "random").eval()


@torch.inference_mode()
def plain(encoder: nn.Module, tiles: Tensor = TILES) -> Tensor:
    return torch.cat([encoder(tile[None]) for tile in tiles])


@pytest.fixture(scope="module")
def encoder() -> TileEncoder:
    return small("virchow2")  # SwiGLU, registers, LayerScale, class token and mean


OWN = {"conch-v1-224px", "ctranspath", "genbio-pathfm", "keep"}
LARGER = {"chief-ctranspath", "conch-v1", "conch-v15", "musk-multiscale"}
"""Encoders whose layers are those of another, and which take many times as long: 448 px, two scales."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in OWN else [])
        for name in list_tile_encoders()
        if name not in LARGER
    ],
)
def test_every_encoder_of_the_package_runs_with_its_weights_in_half_precision(name: str) -> None:
    encoder = small(name)
    wanted = plain(encoder, TILES[:2])
    engine = TileEngine(encoder, CPU, "float16")
    found = engine(TILES[:2])
    assert engine.remarks == []
    assert found.dtype == torch.float16
    assert torch.cosine_similarity(found.float(), wanted).min() > 0.9999
    assert next(encoder.parameters()).dtype == torch.float32, "the encoder itself stays as it is"


@pytest.mark.parametrize("batch_size", [1, 3, 4, 8, 64])
@pytest.mark.parametrize("pads", [False, True])
def test_float32_gives_the_embeddings_of_the_plain_encoder_whatever_the_batch(
    encoder: TileEncoder, batch_size: int, pads: bool
) -> None:
    engine = TileEngine(encoder, CPU, "float32", batch_size, pads=pads)
    wanted = plain(encoder)
    torch.testing.assert_close(engine(TILES), wanted, rtol=1e-5, atol=1e-5)
    parts = list(engine.stream([TILES[:5].numpy(), TILES[5:6].numpy(), TILES[6:].numpy()]))
    torch.testing.assert_close(torch.from_numpy(np.concatenate(parts)), wanted, rtol=1e-5, atol=1e-5)


def test_padded_batches_have_one_size(encoder: TileEncoder) -> None:
    sizes = []
    hook = encoder.register_forward_pre_hook(lambda _, tiles: sizes.append(len(tiles[0])))
    engine = TileEngine(encoder, CPU, "float32", 8, pads=True)
    for count in (11, 8, 5, 1):
        assert len(engine(TILES[:count])) == count
    hook.remove()
    assert sizes == [8] * 5


def test_a_cnn_keeps_its_batch_norms_in_float32() -> None:
    encoder = create_tile_encoder("resnet10t", checkpoint="random")
    tiles = TILES.repeat(1, 3, 3, 1)[:, :176, :176]
    engine = TileEngine(encoder, CPU, "bfloat16")
    assert torch.cosine_similarity(engine(tiles).float(), plain(encoder, tiles)).min() > 0.999
    assert engine.remarks == []
    network = placed(encoder, CPU, torch.bfloat16)
    dtypes = {type(m).__name__: m.weight.dtype for m in network.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)}
    assert dtypes == {"Conv2d": torch.bfloat16, "BatchNorm2d": torch.float32}


def test_weights_that_are_where_they_should_be_are_shared(encoder: TileEncoder) -> None:
    copy = placed(encoder, CPU, torch.float32)
    pairs = zip(copy.parameters(), encoder.parameters(), strict=True)
    assert all(a is not b and a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert not any(parameter.requires_grad for parameter in copy.parameters())


class SetsDtypes(nn.Module):
    """Someone's module, which makes its images float32 whatever its weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 8)

    def forward(self, tiles: Tensor) -> Tensor:
        return self.layer(tiles.float().mean((1, 2)))  # type: ignore[no-any-return]


def test_a_module_that_sets_its_dtypes_runs_by_autocast_and_that_is_said() -> None:
    module = SetsDtypes().eval()
    engine = TileEngine(module, CPU, "bfloat16")
    assert torch.cosine_similarity(engine(TILES).float(), plain(module)).min() > 0.999
    assert len(engine.remarks) == 1
    assert "runs by autocast" in engine.remarks[0]
    engine(TILES)
    assert len(engine.remarks) == 1


def test_a_module_that_cannot_be_copied_runs_as_it_is_and_that_is_said() -> None:
    module = SetsDtypes().eval()
    module.lock = threading.Lock()
    engine = TileEngine(module, CPU, "bfloat16")
    assert torch.cosine_similarity(engine(TILES).float(), plain(module)).min() > 0.999
    assert ["cannot be copied" in remark for remark in engine.remarks] == [True]


class Breaks(nn.Module):
    """A block that no graph holds: what it computes depends on a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum().item() > 0 else x - 1


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Breaks() for _ in range(4)))

    def forward(self, tiles: Tensor) -> Tensor:
        return self.blocks(tiles.float().mean((1, 2)))  # type: ignore[no-any-return]


def test_blocks_that_cannot_be_compiled_run_as_they_are_and_that_is_said() -> None:
    module = Broken().eval()
    engine = TileEngine(module, CPU, "float32", compiles=True)
    torch.testing.assert_close(engine(TILES), module(TILES))
    assert len(engine.remarks) == 1
    assert "cannot be compiled" in engine.remarks[0]


def test_an_error_of_the_encoder_itself_is_not_taken_for_one_of_the_way_it_runs(encoder: TileEncoder) -> None:
    wrong = TileEncoder(replace(encoder.spec, dim=7), encoder.network, "random")
    with pytest.raises(LongslideError, match="its `dim` is 7"):
        TileEngine(wrong, CPU, "float16")(TILES)
    with pytest.raises(ValueError, match="uint8"):
        TileEngine(encoder, CPU, "float32")(TILES.float())


@pytest.mark.slow
def test_a_compiled_transform_gives_the_same_images_with_and_without_resampling() -> None:
    for resize in (64, 40):
        spec = replace(small("lunit-vits8").spec, resize=resize, crop=32)
        network = TileEncoder(spec, nn.Identity(), "")
        wanted = network.transform(TILES)
        compile_transform(network, torch.float32)
        torch.testing.assert_close(network.transform(TILES), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_one_graph_serves_the_blocks_of_all_depths(encoder: TileEncoder) -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    engine = TileEngine(encoder, CPU, "float32", 8, compiles=True, pads=True)
    torch.testing.assert_close(engine(TILES[:8]), plain(encoder, TILES[:8]), rtol=1e-4, atol=1e-4)
    assert engine.remarks == []
    assert counters["stats"]["unique_graphs"] == 2, "the transform is the other one"
    assert len(repeated_blocks(encoder)) == 5
    assert "forward" not in vars(repeated_blocks(encoder)[0]), "the encoder itself is not compiled"


def test_rows_in_float8_are_those_that_went_in_to_a_sixteenth() -> None:
    x = torch.randn(50, 64) * torch.logspace(-6, 6, 50)[:, None]
    x[7] = 0
    rows, scale = quantise(x)
    assert rows.dtype == torch.float8_e4m3fn
    found = rows.float() * scale
    assert ((found - x).abs() <= x.abs() / 16 + x.abs().amax(1, keepdim=True) * 2**-16).all()


def test_a_float8_layer_is_the_layer_nearly() -> None:
    """By `torch._scaled_mm`, no public name: the tensors, scales and dtypes here are what it takes."""
    layer = nn.Linear(64, 32)
    x = torch.randn(2, 5, 64)
    try:
        found = Float8Linear(layer, torch.float32)(x)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"no float8 products on this CPU: {error}")
    assert found.shape == (2, 5, 32)
    wanted = layer(x)
    assert (found - wanted).norm() < 0.06 * wanted.norm()


def test_fidelity_is_the_cosine_and_the_neighbours_kept() -> None:
    exact = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    measured = fidelity(3 * exact, exact)
    assert measured.mean_cosine == pytest.approx(1)
    assert (measured.neighbours_kept, measured.tiles) == (1, 4)
    found = exact.clone()
    found[1] = torch.tensor([0.05, 1.0])
    measured = fidelity(found, exact)
    assert measured.least_cosine == pytest.approx((0.05 + 0.1) / (1.0025**0.5 * 1.01**0.5))
    assert measured.neighbours_kept == 0
    assert "4 tiles" in str(measured)


def test_float8_is_refused_where_there_is_none(encoder: TileEncoder) -> None:
    with pytest.raises(LongslideError, match=r"float8 needs an NVIDIA GPU .* not cpu; use float16"):
        TileEngine(encoder, CPU, "float8")


def coarse_linear(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """Stands for a layer in float8 on a CPU that has none; far coarser."""
    layer = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, dtype=dtype)
    layer.load_state_dict({key: (value * 2).round() / 2 for key, value in linear.state_dict().items()})
    return layer


def test_float8_that_is_too_coarse_for_the_first_tiles_is_refused_from_then_on(
    encoder: TileEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_file, "has_float8", lambda device: True)
    monkeypatch.setattr(engine_file, "product_dtype", lambda device: torch.float16)
    monkeypatch.setattr(engine_file, "Float8Linear", coarse_linear)
    engine = TileEngine(encoder, CPU, "float8")
    for _ in range(2):
        with pytest.raises(LongslideError, match=r"float8 is too coarse .* Use --precision float16"):
            list(engine.stream([TILES.numpy()]))
    assert engine.fidelity is not None
    assert engine.fidelity.tiles == len(TILES)


def test_float8_that_is_fine_says_how_fine(encoder: TileEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def exact_linear(linear: nn.Linear, dtype: torch.dtype) -> Any:
        layer = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, dtype=dtype)
        layer.load_state_dict(linear.state_dict())
        return layer

    monkeypatch.setattr(engine_file, "has_float8", lambda device: True)
    monkeypatch.setattr(engine_file, "product_dtype", lambda device: torch.float16)
    monkeypatch.setattr(engine_file, "Float8Linear", exact_linear)
    engine = TileEngine(encoder, CPU, "float8")
    list(engine.stream([TILES[:3].numpy(), TILES[3:].numpy()]))
    assert engine.fidelity is not None
    assert engine.fidelity.least_cosine > 0.99999
    assert engine.fidelity.tiles == 8, "measured again where a batch has more tiles"


def test_an_encoder_without_linear_layers_has_no_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_file, "has_float8", lambda device: True)
    monkeypatch.setattr(engine_file, "product_dtype", lambda device: torch.float16)
    encoder = create_tile_encoder("resnet10t", checkpoint="random")
    with pytest.raises(LongslideError, match="no linear layers"):
        TileEngine(encoder, CPU, "float8")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs, float8")
GPU = torch.device("cuda")


@needs_gpu
@pytest.mark.parametrize(("precision", "cosine"), [("float32", 0.9999999), ("float16", 0.99999), ("bfloat16", 0.999)])
def test_on_a_gpu_graphs_of_compiled_blocks_give_the_embeddings_of_any_number_of_tiles(
    encoder: TileEncoder, precision: Any, cosine: float
) -> None:
    engine = TileEngine(encoder, GPU, precision, 8)
    wanted = plain(encoder)
    for count in (11, 8, 3, 11):
        found = engine(TILES[:count])
        assert found.device.type == "cuda"
        assert torch.cosine_similarity(found.double().cpu(), wanted[:count].double()).min() > cosine
    parts = [TILES[:5].numpy(), TILES[5:6].numpy(), TILES[6:].numpy()]
    for _ in range(3):
        streamed = np.concatenate(list(engine.stream(parts * 4)))
        assert torch.cosine_similarity(torch.from_numpy(streamed).double(), wanted.repeat(4, 1).double()).min() > cosine
    assert engine.remarks == []


@needs_gpu
def test_on_a_gpu_a_stream_that_is_given_up_leaves_the_engine_as_it_was(encoder: TileEncoder) -> None:
    engine = TileEngine(encoder, GPU, "float16", 4)
    wanted = engine(TILES).cpu()
    stream = engine.stream([TILES.numpy()] * 20)
    next(stream)
    stream.close()
    assert torch.equal(torch.from_numpy(np.concatenate(list(engine.stream([TILES.numpy()])))), wanted)


@needs_gpu
def test_on_a_gpu_an_embedding_is_the_same_to_the_last_bit_in_whatever_batch_it_is_made(encoder: TileEncoder) -> None:
    engine = TileEngine(encoder, GPU, "float16", 4)
    wanted = engine(TILES).cpu().numpy()
    flushed = np.concatenate([*engine.push(TILES[:5].numpy()), *engine.flush()])
    assert np.array_equal(flushed, wanted[:5])
    rest = [part for first in range(5, 11) for part in engine.push(TILES[first : first + 1].numpy())]
    assert np.array_equal(np.concatenate([*rest, *engine.flush()]), wanted[5:])
    assert list(engine.flush()) == []


@needs_gpu
def test_on_a_gpu_an_encoder_that_asks_the_host_runs_without_graphs_and_that_is_said() -> None:
    module = Broken().eval()
    engine = TileEngine(module, GPU, "float32", 4)
    torch.testing.assert_close(engine(TILES).cpu(), plain(module), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(engine(TILES).cpu(), plain(module), rtol=1e-5, atol=1e-4)
    assert len(engine.remarks) == 1
    assert "without CUDA graphs" in engine.remarks[0]


@needs_gpu
def test_on_a_gpu_running_out_of_memory_halves_the_batch(encoder: TileEncoder) -> None:
    def small_memory(module: nn.Module, tiles: tuple[Tensor]) -> None:
        if len(tiles[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    wanted = plain(encoder)
    hook = encoder.register_forward_pre_hook(small_memory)
    engine = TileEngine(encoder, GPU, "float16", 8)
    hook.remove()
    streamed = np.concatenate(list(engine.stream([TILES.numpy()])))
    assert engine.batch_size == 2
    assert torch.cosine_similarity(torch.from_numpy(streamed).float(), wanted).min() > 0.99999


@needs_gpu
def test_on_a_gpu_float8_is_near_float32_and_says_how_near(
    encoder: TileEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not engine_file.has_float8(GPU):
        pytest.skip("needs a GPU with float8")
    monkeypatch.setattr(engine_file, "LEAST_COSINE", 0.99)
    monkeypatch.setattr(engine_file, "LEAST_MEAN_COSINE", 0.99)
    engine = TileEngine(encoder, GPU, "float8", 8)
    streamed = np.concatenate(list(engine.stream([TILES.numpy()])))
    assert streamed.dtype == np.float16
    assert engine.fidelity is not None
    assert 0.99 < engine.fidelity.least_cosine < 0.999999
    assert engine.remarks == []

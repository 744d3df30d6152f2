"""The GigaPath slide encoders: the published numbers, positions, pooling, and what they refuse."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from longslide import LongslideError, create_slide_encoder
from longslide.models.slide_encoder.checkpoint import to_published
from longslide.models.slide_encoder.encoder import SlideEncoder
from longslide.models.slide_encoder.positions import POSITION_BASE, grid_positions
from longslide.models.slide_encoder.spec import list_slide_encoders, load_slide_encoder_spec
from torch import Tensor

REFERENCE = Path(__file__).parent / "reference" / "gigapath_slide_encoder_2l64d.npz"
SMALL = {"layers": 2, "width": 64, "ffn_width": 256, "tile_dim": 48}


def cells(columns: int, rows: int) -> Tensor:
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([column, row], -1).reshape(1, -1, 2)


@pytest.fixture(scope="module")
def small() -> SlideEncoder:
    return create_slide_encoder("gigapath", checkpoint="random", **SMALL)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_numbers_of_the_published_implementation_hold(pool: str, tmp_path: Path) -> None:
    with np.load(REFERENCE) as reference:
        arrays = {name: torch.from_numpy(reference[name]) for name in reference}
    weights = {name.removeprefix("weights/"): value for name, value in arrays.items() if name.startswith("weights/")}
    torch.save({"model": weights}, tmp_path / "slide_encoder.pth")
    encoder = create_slide_encoder("gigapath", checkpoint=tmp_path / "slide_encoder.pth", pool=pool, **SMALL)
    with torch.inference_mode():
        output = encoder(arrays["tile_features"], arrays["grid_cells"])
        layers = encoder.layer_embeddings(arrays["tile_features"], arrays["grid_cells"])
    assert layers.shape == (3, 2, 64)
    assert (output - arrays[f"{pool}_output"]).abs().max() < 1e-5
    assert (layers - arrays[f"{pool}_per_layer"]).abs().max() < 1e-5


def test_gigapath_has_the_published_tensors_and_segment_lengths() -> None:
    spec = load_slide_encoder_spec("gigapath")
    with torch.device("meta"):
        published = to_published(SlideEncoder(spec))
    assert len(published) == 247
    assert sum(tensor.numel() for tensor in published.values()) == 86_330_880
    assert spec.segment_lengths == (1024, 5792, 32768, 185363, 1048576)


def test_the_siblings_are_there() -> None:
    assert {"gigapath", "gigapath-12l1536d", "gigapath-24l1024d", "gigapath-flash"} <= set(list_slide_encoders())
    wide, deep = load_slide_encoder_spec("gigapath-12l1536d"), load_slide_encoder_spec("gigapath-24l1024d")
    assert (wide.layers, wide.width, wide.ffn_width) == (12, 1536, 6144)
    assert (deep.layers, deep.width, deep.ffn_width) == (24, 1024, 4096)


def test_gigapath_flash_has_the_published_number_of_parameters() -> None:
    spec = load_slide_encoder_spec("gigapath-flash")
    with torch.device("meta"):
        published = to_published(SlideEncoder(spec))
    assert sum(tensor.numel() for tensor in published.values()) == 21_489_408


def test_the_position_is_the_row_in_the_first_half_and_the_column_in_the_second() -> None:
    column, row, width = 123_457, 3, 64
    omega = 10_000.0 ** (-np.arange(width // 4) / (width / 4))
    expected = np.concatenate([f(axis * omega) for axis in (row, column) for f in (np.sin, np.cos)])
    position = grid_positions(torch.tensor([column, row]), width)
    np.testing.assert_allclose(position.numpy(), expected, atol=1e-6)
    assert position.dtype == torch.float32


def test_the_kernel_gives_the_same_positions() -> None:
    pytest.importorskip("triton")
    from longslide.models.slide_encoder.positions_fused import fused_grid_positions

    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.randint(0, 123_457, (3, 7, 2), generator=torch.Generator().manual_seed(0))
    frequencies = POSITION_BASE ** (-torch.arange(15, dtype=torch.float64) / 15)
    found = fused_grid_positions(where.to(device), frequencies.to(device), torch.float32)
    torch.testing.assert_close(found.cpu(), grid_positions(where, 60), rtol=0, atol=1e-6)


def test_the_embedding_depends_on_where_the_tiles_are(small: SlideEncoder) -> None:
    x = torch.randn(1, 20, 48)
    with torch.inference_mode():
        here, there = small(x, cells(5, 4)), small(x, cells(4, 5))
    assert (here - there).abs().max() > 1e-3


def test_the_embedding_depends_on_the_order_of_the_tiles(small: SlideEncoder) -> None:
    x, where, order = torch.randn(1, 20, 48), cells(5, 4), torch.randperm(20)
    with torch.inference_mode():
        ordered, shuffled = small(x, where), small(x[:, order], where[:, order])
    assert (ordered - shuffled).abs().max() > 1e-4  # each dilated branch keeps other tiles


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_batch_gives_what_its_slides_give_one_at_a_time(pool: str) -> None:
    encoder = create_slide_encoder("gigapath", checkpoint="random", pool=pool, **SMALL)
    x, where = torch.randn(3, 30, 48), cells(6, 5).expand(3, -1, -1)
    with torch.inference_mode():
        batch = encoder(x, where)
        for i in range(3):
            torch.testing.assert_close(encoder(x[i : i + 1], where[i : i + 1])[0], batch[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_slides_give_what_they_give_one_at_a_time_and_so_do_their_gradients(checkpointing: bool) -> None:
    encoder = create_slide_encoder("gigapath", checkpoint="random", checkpointing=checkpointing, **SMALL).double()
    lengths, where = [1, 30, 6], [cells(1, 1)[0], cells(6, 5)[0], cells(2, 3)[0]]
    x = [torch.randn(n, 48, dtype=torch.float64) for n in lengths]
    weight = torch.randn(3, 64, dtype=torch.float64)
    alone = torch.cat([encoder(a[None], b[None]) for a, b in zip(x, where, strict=True)])
    (alone * weight).sum().backward()
    wanted = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    packed = (torch.cat(x), torch.cat(where), torch.tensor([0, 1, 31, 37]))
    together = encoder(*packed)
    (together * weight).sum().backward()
    torch.testing.assert_close(together, alone)
    for parameter, grad in zip(encoder.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    assert encoder.layer_embeddings(*packed).shape == (3, 3, 64)


def test_a_dropped_path_is_dropped_for_whole_slides() -> None:
    encoder = create_slide_encoder("gigapath", checkpoint="random", drop_path=0.5, **SMALL).train()
    last = encoder.layers[-1]
    x, cu_seqlens = torch.randn(60, 64), torch.arange(0, 61, 5, dtype=torch.int32)
    torch.manual_seed(0)
    changed = (torch.add(*last(x, cu_seqlens)) - x).abs().amax(1).view(12, 5)
    dropped = changed == 0
    assert dropped.any(), "with half of the halves left out some slide loses both"
    assert (dropped.all(1) == dropped.any(1)).all()


def test_an_empty_slide_among_packed_ones_is_refused(small: SlideEncoder) -> None:
    with pytest.raises(LongslideError, match="at least one tile"):
        small(torch.zeros(2, 48), cells(2, 1)[0], torch.tensor([0, 2, 2]))


def test_one_tile_is_enough(small: SlideEncoder) -> None:
    assert small(torch.randn(1, 1, 48), torch.zeros(1, 1, 2, dtype=torch.long)).shape == (1, 64)


def test_the_layers_start_with_the_embedding_and_the_gradient_reaches_every_weight() -> None:
    encoder = create_slide_encoder("gigapath", checkpoint="random", **SMALL)
    assert encoder.layer_embeddings(torch.randn(2, 12, 48), cells(4, 3).expand(2, -1, -1)).shape == (3, 2, 64)
    encoder(torch.randn(1, 12, 48), cells(4, 3)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in encoder.parameters())


@pytest.mark.parametrize(
    ("features", "where", "message"),
    [
        (torch.zeros(1, 2, 48), torch.zeros(1, 2, 2, dtype=torch.long), "two tiles in one grid cell"),
        (torch.zeros(1, 2, 48), torch.tensor([[[0, 0], [0, -1]]]), "grid cell below 0"),
        (torch.zeros(1, 2, 48), torch.tensor([[[0, 0], [2**22, 0]]]), "grid cell .* of 4,194,304 or more"),
        (torch.zeros(1, 2, 48), torch.tensor([[[0.0, 0.0], [256.0, 0.0]]]), "integers"),
        (torch.zeros(1, 2, 1536), torch.tensor([[[0, 0], [1, 0]]]), "length 48"),
        (torch.zeros(1, 3, 48), torch.tensor([[[0, 0], [1, 0]]]), r"\(1, 3, 48\)"),
        (torch.zeros(1, 0, 48), torch.zeros(1, 0, 2, dtype=torch.long), "N at least 1"),
    ],
)
def test_input_whose_positions_cannot_be_right_is_refused(
    small: SlideEncoder, features: Tensor, where: Tensor, message: str
) -> None:
    with pytest.raises(LongslideError, match=message):
        small(features, where)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: streams")
@pytest.mark.parametrize("tiles", [600, 20_000])
@pytest.mark.parametrize("trained", [False, True])
def test_cells_are_checked_beside_the_encoder_but_not_before_they_are_there(tiles: int, trained: bool) -> None:
    encoder = create_slide_encoder("gigapath", checkpoint="random", **SMALL).to("cuda", torch.bfloat16)
    features = torch.randn(1, tiles, 48, device="cuda", dtype=torch.bfloat16)
    right = cells(tiles // 10, 10).cuda()
    with torch.set_grad_enabled(trained):
        encoder(features, right)
        late = torch.zeros_like(right)
        torch.cuda._sleep(50_000_000)
        late.copy_(right)
        encoder(features, late)
        torch.cuda._sleep(50_000_000)
        late[0, 0].copy_(right[0, 1])
        with pytest.raises(LongslideError, match="two tiles in one grid cell"):
            encoder(features, late)


def test_the_same_cell_on_two_slides_of_a_batch_is_no_clash(small: SlideEncoder) -> None:
    assert small(torch.randn(2, 6, 48), cells(3, 2).expand(2, -1, -1)).shape == (2, 64)


def test_random_weights_are_seeded_and_leave_the_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, same, other = (create_slide_encoder("gigapath", checkpoint="random", seed=s, **SMALL) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.layers[0].qkv.weight, same.layers[0].qkv.weight)
    assert not torch.equal(first.layers[0].qkv.weight, other.layers[0].qkv.weight)
    assert first.weights == "random seed=0"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_runs_in_half_precision_by_cast_and_by_autocast(small: SlideEncoder, dtype: torch.dtype) -> None:
    x, where = torch.randn(1, 200, 48), cells(20, 10)
    with torch.inference_mode():
        exact = small(x, where)
        with torch.autocast("cpu", dtype):
            mixed = small(x, where)
        cast = create_slide_encoder("gigapath", checkpoint="random", **SMALL).to(dtype)(x.to(dtype), where).float()
    assert mixed.dtype == torch.float32, "the residuals are not rounded"
    for half in (mixed, cast):
        assert ((half - exact).norm() / exact.norm()) < (0.01 if dtype == torch.float16 else 0.06)


def test_an_unknown_name_is_answered_with_near_ones() -> None:
    with pytest.raises(LongslideError, match="did you mean gigapath"):
        create_slide_encoder("gigapaht", checkpoint="random")


def test_an_unknown_setting_and_pool_are_refused() -> None:
    with pytest.raises(LongslideError, match="no depth"):
        create_slide_encoder("gigapath", checkpoint="random", depth=3)
    with pytest.raises(LongslideError, match="pool 'max'"):
        create_slide_encoder("gigapath", checkpoint="random", pool="max", **SMALL)


def without_network(code: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    environment.pop("HF_TOKEN", None)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_without_network_and_weights_the_error_says_what_to_do(tmp_path: Path) -> None:
    code = (
        "import longslide\n"
        "try: longslide.create_slide_encoder('gigapath')\n"
        "except longslide.LongslideError as error: print(error)"
    )
    done = without_network(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) == 1
    for words in ("https://huggingface.co/prov-gigapath/prov-gigapath", "HF_TOKEN", "--slide-checkpoint"):
        assert words in done.stdout


@pytest.mark.slow
def test_without_network_the_hubs_cache_is_enough(tmp_path: Path, small: SlideEncoder) -> None:
    repository = tmp_path / "hub" / "models--prov-gigapath--prov-gigapath"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    torch.save({"model": to_published(small)}, repository / "snapshots" / "abc" / "slide_encoder.pth")
    code = f"import longslide; print(longslide.create_slide_encoder('gigapath', **{SMALL}).weights)"
    done = without_network(code, tmp_path)
    assert done.stdout.startswith("hf:prov-gigapath/prov-gigapath@abc sha256:"), done.stderr


def test_published_siblings_without_weights_ask_for_a_file() -> None:
    with pytest.raises(LongslideError, match=r"no weights on the hub: give them with --slide-checkpoint"):
        create_slide_encoder("gigapath-24l1024d")


def test_hooks_of_the_layers_are_called() -> None:
    """FSDP shards and gathers a layer's weights in its hooks."""
    encoder = create_slide_encoder("gigapath", checkpoint="random", **SMALL)
    calls = []
    for layer in encoder.layers:
        layer.register_forward_hook(lambda module, *_: calls.append(module))
    encoder(torch.randn(1, 6, 48), cells(3, 2))
    assert calls == list(encoder.layers)

"""The published checkpoints: read and written under their names, and refused when anything does not fit."""

import pickle
from pathlib import Path

import pytest
import torch
from longslide import LongslideError, create_slide_encoder
from longslide.models.slide_encoder.checkpoint import to_published
from safetensors.torch import save_file
from torch import Tensor

SMALL = {"layers": 2, "width": 64, "ffn_width": 128, "tile_dim": 16}


@pytest.fixture
def published() -> dict[str, Tensor]:
    return to_published(create_slide_encoder("gigapath", checkpoint="random", seed=3, **SMALL))


@pytest.mark.parametrize("kind", ["published", "bare", "safetensors"])
def test_written_and_read_again_the_weights_are_equal_to_the_last_bit(
    kind: str, published: dict[str, Tensor], tmp_path: Path
) -> None:
    file = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        save_file({name: value.contiguous() for name, value in published.items()}, file)
    else:
        torch.save({"model": published} if kind == "published" else published, file)
    encoder = create_slide_encoder("gigapath", checkpoint=file, **SMALL)
    again = to_published(encoder)
    assert again.keys() == published.keys()
    assert all(torch.equal(again[name], published[name]) for name in published)
    assert encoder.weights.startswith(f"{file} sha256:")
    assert not encoder.training


def test_the_table_of_positions_that_some_files_hold_is_left_out(published: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"model": published | {"pos_embed": torch.zeros(1, 101, 64)}}, tmp_path / "weights.pth")
    create_slide_encoder("gigapath", checkpoint=tmp_path / "weights.pth", **SMALL)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (
            lambda state: state.pop("encoder.layers.1.self_attn.k_proj.weight"),
            "missing: encoder.layers.1.self_attn.k_proj",
        ),
        (lambda state: state.update({"decoder.weight": torch.zeros(1)}), "unexpected: decoder.weight"),
        (
            lambda state: state.update({"patch_embed.proj.weight": torch.zeros(64, 1536)}),
            r"wrong shape: patch_embed.proj.weight \(64, 1536\) instead of \(64, 16\)",
        ),
        (lambda state: state.pop("norm.bias"), "missing: norm.bias"),
        (lambda state: state.clear(), "missing: cls_token"),
    ],
)
def test_tensors_that_do_not_fit_are_named(damage, named: str, published: dict[str, Tensor], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    damage(published)
    torch.save({"model": published}, tmp_path / "weights.pth")
    with pytest.raises(LongslideError, match=named) as caught:
        create_slide_encoder("gigapath", checkpoint=tmp_path / "weights.pth", **SMALL)
    assert "weights.pth" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


class Evil:
    """Makes a file when unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("content", ["text", "empty", "truncated", "pickle", "list"])
def test_what_is_no_checkpoint_is_refused_and_nothing_is_unpickled(
    content: str, published: dict[str, Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"model": published}, file)
    whole = file.read_bytes()
    if content == "list":
        torch.save([1, 2], file)
    else:
        evil = pickle.dumps(Evil(tmp_path / "unpickled"))
        data = {"text": b"hello", "empty": b"", "truncated": whole[: len(whole) // 2], "pickle": evil}
        file.write_bytes(data[content])
    with pytest.raises(LongslideError, match=r"weights\.pth"):
        create_slide_encoder("gigapath", checkpoint=file, **SMALL)
    assert not (tmp_path / "unpickled").exists()


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(LongslideError, match=r"nowhere\.pth: no such checkpoint"):
        create_slide_encoder("gigapath", checkpoint="nowhere.pth", **SMALL)

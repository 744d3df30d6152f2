"""A slide spread over processes trains the encoder as in one: embeddings, gradients, a Lightning training."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from longslide import LongslideError, create_slide_encoder
from longslide.bag_lengths import lengths_of, with_lengths
from longslide.models.slide_encoder.sequence_parallel import own_parts, own_tiles
from longslide.models.slide_encoder.spec import load_slide_encoder_spec

RANKS = Path(__file__).parent / "encoder_ranks.py"


@pytest.mark.slow
def test_four_ranks_embed_and_train_as_one_process_does(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(RANKS), str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


GIGAPATH = load_slide_encoder_spec("gigapath")


@pytest.mark.parametrize(("tiles", "ranks"), [(0, 3), (2, 5), (100, 7), (64, 4)])
def test_each_tile_has_one_rank_and_parts_of_one_segment_are_even(tiles: int, ranks: int) -> None:
    parts = [range(tiles)[own_tiles(tiles, rank, ranks, GIGAPATH)] for rank in range(ranks)]
    assert [tile for part in parts for tile in part] == list(range(tiles))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_ranks_whose_tiles_see_fewer_keys_have_more_of_them() -> None:
    tiles = 500_000  # the third segment of 185,363 is shorter than the others
    first, second = (own_tiles(tiles, rank, 2, GIGAPATH) for rank in range(2))
    assert (first.start, first.stop, second.stop) == (0, second.start, tiles)
    keys = torch.tensor([4.0 * GIGAPATH.width]).repeat(tiles)
    for width, ratio in zip(GIGAPATH.segment_lengths, GIGAPATH.dilated_ratios, strict=True):
        for start in range(0, tiles, width):
            keys[start : start + width] += min(width, tiles - start) / ratio**2
    assert 240_000 < first.stop < 249_000
    assert keys[first].sum().item() == pytest.approx(keys[second].sum().item(), rel=1e-3)


def test_each_rank_holds_a_part_of_every_slide_of_a_batch() -> None:
    batch = {
        "tile_features": torch.arange(10)[:, None].float(),
        "grid_cells": torch.arange(20).view(10, 2),
        "cu_seqlens": torch.tensor([0, 2, 7, 8, 10], dtype=torch.int32),
    }
    first, second = (own_parts(batch, rank, 2, GIGAPATH) for rank in range(2))
    assert first["tile_features"].flatten().tolist() == [0, 2, 3, 4, 7, 8]
    assert first["cu_seqlens"].tolist() == [0, 1, 4, 5, 6]
    assert second["grid_cells"][:, 0].tolist() == [2, 10, 12, 18]
    assert second["cu_seqlens"].tolist() == [0, 1, 3, 3, 4]


def test_the_lengths_of_parts_are_known_without_asking_the_device() -> None:
    lengths = [2, 5, 1, 2]
    batch = {
        "tile_features": torch.zeros(10, 1, device="meta"),  # which has no values to ask for
        "grid_cells": torch.zeros(10, 2, dtype=torch.int64, device="meta"),
        "cu_seqlens": with_lengths(torch.zeros(5, dtype=torch.int32, device="meta"), lengths),
    }
    parts = [own_parts(batch, rank, 2, GIGAPATH) for rank in range(2)]
    assert [sum(pair) for pair in zip(*(lengths_of(part["cu_seqlens"]) for part in parts), strict=True)] == lengths
    assert [len(part["tile_features"]) for part in parts] == [6, 4]


def test_other_patterns_than_dilated_stay_on_one_device() -> None:
    encoder = create_slide_encoder("gigapath", checkpoint="random", layers=1, width=64, ffn_width=64, pattern="dense")
    with pytest.raises(LongslideError, match="only 'dilated' spreads"):
        encoder.shard_sequence(object())  # type: ignore[arg-type]


def test_the_tokens_of_a_slide_over_several_ranks_are_refused() -> None:
    """They would have been attended to within each rank alone."""
    encoder = create_slide_encoder("gigapath", checkpoint="random", layers=1)
    encoder.shard_sequence(object())  # type: ignore[arg-type]
    with pytest.raises(LongslideError, match="spread over several ranks"):
        encoder.tile_tokens(torch.zeros(2, 1536), torch.tensor([[0, 0], [1, 0]]), torch.tensor([0, 2]))

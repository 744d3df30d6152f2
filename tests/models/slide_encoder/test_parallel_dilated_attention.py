"""Sequences spread over processes give what they give in one; only what the queries see travels."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from longslide import dilated_attention
from longslide.models.slide_encoder.dilated_attention.parallel import SequenceShards, parallel_dilated_self_attention
from longslide.models.slide_encoder.dilated_attention.windows import Windows, class_windows, make_windows

RANKS = Path(__file__).parent / "attention_ranks.py"


Result = tuple[str, list[list[int]], tuple[object, ...], float]
"""Data type, tokens of each sequence on each rank, configuration, and the largest relative error of output and gradients."""


def results_of(folder: Path, ranks: int, backend: str) -> list[Result]:
    command = [sys.executable, str(RANKS), str(folder), str(ranks), backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    return [result for rank in range(ranks) for result in torch.load(folder / f"rank{rank}.pt")]


def assert_close(results: list[Result], bounds: dict[str, float]) -> None:
    assert {dtype for dtype, *_ in results} == set(bounds)
    for dtype, lengths, configuration, error in results:
        assert error < bounds[dtype], (dtype, lengths, configuration)


UNEQUAL = """
import sys
import torch
import torch.distributed as dist
from longslide import LongslideError
from longslide.models.slide_encoder.dilated_attention.parallel import SequenceShards

def run(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        SequenceShards.agree([5] * (2 + rank), dist.group.WORLD, torch.device("cpu"))
    except LongslideError as error:
        print(error)
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(run, (sys.argv[1],), 2)
"""


@pytest.mark.slow
def test_ranks_with_different_numbers_of_slides_are_told_so_in_one_line_each(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(UNEQUAL)
    command = [sys.executable, str(tmp_path / "ranks.py"), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert {line.partition(":")[0] for line in lines} == {"the ranks that share slides have 2, 3 slides in one batch"}


@pytest.mark.slow
def test_outputs_and_gradients_in_plain_pytorch_are_those_of_one_process(tmp_path: Path) -> None:
    results = results_of(tmp_path, 3, "gather")
    assert {len(result[1]) for result in results} == {2, 3}
    assert_close(results, {"torch.float64": 1e-10, "torch.float32": 2e-6, "torch.bfloat16": 2e-2})


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs Triton does not interpret")
def test_outputs_and_gradients_of_the_kernels_are_those_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    results = results_of(tmp_path, 3, "fused")
    assert {len(result[1]) for result in results} == {2, 3}
    assert_close(results, {"torch.float32": 2e-6, "torch.float16": 2e-3})


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_outputs_and_gradients_over_two_gpus_are_those_of_one_process(tmp_path: Path) -> None:
    assert_close(results_of(tmp_path, 2, "fused"), {"torch.float32": 1e-4, "torch.bfloat16": 2e-2})


def seen_keys(length: int, heads: int, widths: list[int], ratios: list[int]) -> torch.Tensor:
    """(L, H, L) whether a query sees a key: with equal logits and unit vectors for values the output is the weights."""
    nothing = torch.zeros(1, length, heads, length)
    values = torch.eye(length)[None, :, None].expand(1, length, heads, length)
    return dilated_attention(nothing, nothing, values, widths, ratios, backend="naive")[0] > 0


@pytest.mark.parametrize(
    ("lengths", "widths", "ratios"),
    [
        ((9, 0, 14, 1), [8, 24], [1, 4]),
        ((20, 21), [7, 41], [2, 8]),
        ((37, 5, 30), [4, 9, 22, 72], [1, 2, 4, 8]),
        ((5, 5, 5), [15], [1]),
    ],
)
def test_windows_hold_the_keys_that_queries_see_and_few_more(
    lengths: tuple[int, ...], widths: list[int], ratios: list[int]
) -> None:
    heads = 3
    seen = seen_keys(sum(lengths), heads, widths, ratios)
    low, high = (x[:, 0] for x in class_windows(torch.tensor(lengths)[:, None], heads, widths, ratios))
    position = torch.arange(sum(lengths))
    residue = position % low.shape[2]
    for rank, count in enumerate(lengths):
        own = slice(sum(lengths[:rank]), sum(lengths[:rank]) + count)
        wanted = seen[own].any(0)
        held = (position >= low[rank][:, residue]) & (position < high[rank][:, residue])
        assert not (wanted & ~held).any()
        held[:, own], wanted[:, own] = False, False
        # A class has the tokens of two offsets of the largest ratio.
        assert held.sum() <= 2 * wanted.sum() + 2 * heads * len(widths)


class Rank:
    """All that planning asks of a process group."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def rank(self) -> int:
        return self._rank


def windows_of(
    lengths: list[list[int]], rank: int, heads: int, widths: tuple[int, ...], ratios: tuple[int, ...]
) -> Windows:
    counts = tuple(map(tuple, lengths))
    return make_windows(counts, Rank(rank), heads, widths, ratios, torch.device("cpu"))  # type: ignore[arg-type]


def test_nothing_travels_where_shards_end_with_segments() -> None:
    windows = windows_of([[64], [128], [64]], 1, 4, (16, 64), (1, 4))
    assert not windows.travels
    assert windows.send_sizes == windows.receive_sizes == [0, 0, 0]


def test_every_rank_sends_what_the_others_expect() -> None:
    lengths = [[30, 1, 9, 0], [31, 0, 50, 1], [0, 4, 21, 8]]
    sent, received = (
        torch.tensor([getattr(windows_of(lengths, rank, 4, (16, 20, 60), (1, 2, 4)), sizes) for rank in range(3)])
        for sizes in ("send_sizes", "receive_sizes")
    )
    assert torch.equal(sent, received.T)
    assert sent.sum() > 0


def test_what_travels_does_not_grow_with_the_sequence() -> None:
    widths, ratios = (32, 512), (1, 8)
    received = [
        sum(windows_of([[1000]] * ranks, ranks // 2, 8, widths, ratios).receive_sizes) for ranks in (3, 5, 9, 33)
    ]
    assert max(received) <= 8 * sum(2 * (width * 2 / ratio + 8) for width, ratio in zip(widths, ratios, strict=True))


@pytest.mark.parametrize(
    ("length", "branches", "message"), [(5, [4], "rank 0"), (6, [4, 5], "one of each"), (6, [0], "positive")]
)
def test_input_that_does_not_fit_is_refused(length: int, branches: list[int], message: str) -> None:
    shards = SequenceShards(group=None, rank=0, lengths=((6,), (2,)))  # type: ignore[arg-type]
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        parallel_dilated_self_attention(torch.zeros(length, 3, 2, 4), branches, [1], cu_seqlens, shards)

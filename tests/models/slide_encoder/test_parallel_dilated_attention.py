"""A sequence spread over processes gives what it gives in one; only what the queries see travels."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from longslide import dilated_attention
from longslide.models.slide_encoder.dilated_attention.parallel import SequenceShards, parallel_dilated_attention
from longslide.models.slide_encoder.dilated_attention.parallel_plan import make_plan

RANKS = Path(__file__).parent / "attention_ranks.py"


Result = tuple[str, list[int], tuple[object, ...], float]
"""Data type, shards, configuration, and the largest relative error of output and gradients on one rank."""


def results_of(folder: Path, backend: str, ranks: int) -> list[Result]:
    command = [sys.executable, str(RANKS), str(folder), backend, str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [result for rank in range(ranks) for result in torch.load(folder / f"rank{rank}.pt")]


@pytest.fixture(scope="module")
def gloo_results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    return results_of(tmp_path_factory.mktemp("gloo"), "gloo", 4)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(
    ("dtype", "bound"), [("torch.float64", 1e-10), ("torch.float32", 2e-6), ("torch.bfloat16", 2e-2)]
)
def test_outputs_and_gradients_are_those_of_one_process(
    gloo_results: list[Result], ranks: int, dtype: str, bound: float
) -> None:
    errors = [result[::-1] for result in gloo_results if (result[0], len(result[1])) == (dtype, ranks)]
    assert len(errors) >= 4
    assert max(errors)[0] < bound, max(errors)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_outputs_and_gradients_over_two_gpus_are_those_of_one_process(tmp_path: Path) -> None:
    bounds = {"torch.float64": 1e-10, "torch.float32": 1e-4, "torch.bfloat16": 4e-2}
    results = results_of(tmp_path, "nccl", 2)
    assert len(results) >= 20
    for dtype, lengths, configuration, error in results:
        assert error < bounds[dtype], (dtype, lengths, configuration)


def seen_keys(length: int, heads: int, branches: tuple[tuple[int, int], ...], causal: bool) -> torch.Tensor:
    """(L, H, L) whether a query sees a key: with equal logits and unit vectors for values the output is the weights."""
    nothing = torch.zeros(1, length, heads, length)
    values = torch.eye(length)[None, :, None].expand(1, length, heads, length)
    widths, ratios = zip(*branches, strict=True)
    return dilated_attention(nothing, nothing, values, widths, ratios, causal, backend="naive")[0] > 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("lengths", "branches"),
    [
        ((9, 0, 14, 1), ((8, 1), (24, 3))),
        ((20, 21), ((7, 2), (41, 5))),
        ((5, 5, 5), ((15, 1),)),
    ],
)
def test_exactly_the_keys_travel_that_queries_of_another_rank_see(
    lengths: tuple[int, ...], branches: tuple[tuple[int, int], ...], causal: bool
) -> None:
    heads, ranks = 3, range(len(lengths))
    seen = seen_keys(sum(lengths), heads, branches, causal)
    first = [sum(lengths[:rank]) for rank in ranks]
    plans = [make_plan(lengths, rank, heads, branches, causal, torch.device("cpu")) for rank in ranks]
    for sender in ranks:
        for reader, rows in enumerate(plans[sender].send.split(plans[sender].send_sizes)):
            here, there = (slice(first[rank], first[rank] + lengths[rank]) for rank in (sender, reader))
            wanted = seen[there, :, here].any(0).T if sender != reader else torch.zeros(lengths[sender], heads)
            assert rows.tolist() == wanted.flatten().nonzero().flatten().tolist()
            assert plans[reader].receive_sizes[sender] == len(rows)


def test_nothing_travels_where_shards_end_with_segments() -> None:
    plan = make_plan((64, 128, 64), 1, 4, ((16, 1), (64, 4)), False, torch.device("cpu"))
    assert plan.send_sizes == plan.receive_sizes == [0, 0, 0]


def test_what_travels_does_not_grow_with_the_sequence() -> None:
    branches = ((32, 1), (512, 8))
    received = [
        sum(make_plan((1000,) * ranks, ranks // 2, 8, branches, False, torch.device("cpu")).receive_sizes)
        for ranks in (3, 5, 9, 33)
    ]
    assert max(received) <= 8 * sum(2 * (width / ratio + 1) for width, ratio in branches)


@pytest.mark.parametrize(
    ("length", "branches", "message"), [(5, [4], "rank 0"), (6, [4, 5], "one of each"), (6, [0], "positive")]
)
def test_input_that_does_not_fit_is_refused(length: int, branches: list[int], message: str) -> None:
    shards = SequenceShards(group=None, rank=0, lengths=(6, 2))  # type: ignore[arg-type]
    x = torch.zeros(1, length, 2, 4)
    with pytest.raises(ValueError, match=message):
        parallel_dilated_attention(x, x, x, branches, [1], shards=shards)

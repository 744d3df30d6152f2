"""Ranks of the test of parallel dilated attention: `python attention_ranks.py FOLDER RANKS BACKEND` starts them."""

import random
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from longslide import dilated_attention
from longslide.models.slide_encoder.dilated_attention.parallel import SequenceShards, parallel_dilated_self_attention
from torch.multiprocessing import start_processes

Configuration = tuple[list[list[int]], int, int, list[int], list[int], bool]
"""Tokens of each sequence on each rank, heads, head dimension, segment lengths, ratios, causal."""


def configurations(backend: str, count: int) -> list[Configuration]:
    """GigaPath's shape in small, what is awkward, and random ones."""
    found: list[Configuration] = [
        ([[50], [50]], 4, 12, [8, 20, 100], [1, 2, 4], False),
        ([[50], [50]], 4, 12, [8, 20, 100], [1, 2, 4], True),
        ([[83], [61]], 16, 12, [8, 20, 50, 100, 300], [1, 2, 4, 8, 16], False),  # GigaPath's ratios
        ([[83], [60]], 3, 16, [9, 21, 143], [2, 4, 8], True),  # no columns to spare for log-sum-exps
        ([[32], [32], [32]], 4, 8, [8, 16, 32], [1, 2, 4], False),  # borders of segments: nothing travels
        ([[0], [1], [0]], 2, 8, [4], [1], False),
        ([[0], [40], [33]], 3, 8, [16, 73], [1, 4], True),
        ([[1], [1], [1]], 5, 8, [2, 3], [1, 8], False),  # more heads' offsets than slots
        ([[61], [3], [7]], 6, 8, [1000], [8], False),  # one segment over every rank
        ([[30, 1, 9], [31, 0, 50]], 4, 12, [8, 20, 100], [1, 2, 8], False),  # packed
        ([[30, 1, 9, 0], [31, 0, 50, 1], [0, 4, 21, 8]], 4, 16, [16, 20, 40], [1, 2, 4], True),
    ]
    if backend == "gather":
        found += [([[9], [20]], 5, 7, [7, 11, 40], [3, 2, 5], causal) for causal in (False, True)]
    rng = random.Random(1)
    for ranks in (2, 3) * (count // 2):
        branches = rng.randint(1, 4)
        sequences = rng.randint(1, 3)
        lengths = [[rng.choice([0, 1, rng.randint(2, 40), rng.randint(2, 90)]) for _ in range(sequences)] for _ in range(ranks)]
        for sequence in range(sequences):
            lengths[rng.randrange(ranks)][sequence] += 1
        widths, ratios = ([rng.choice(some) for _ in range(branches)] for some in (range(1, 150), (1, 2, 4, 8)))
        found.append((lengths, rng.randint(1, 5), rng.choice([5, 16]), widths, ratios, rng.random() < 0.5))
    return found


def main(rank: int, folder: Path, ranks: int, backend: str) -> None:
    gpus = torch.cuda.device_count() >= ranks
    dist.init_process_group("nccl" if gpus else "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    if gpus:
        torch.cuda.set_device(rank)
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    groups = {size: dist.new_group(list(range(size))) for size in range(2, ranks + 1)}
    dtypes = [torch.float32] if backend == "fused" else [torch.float64, torch.float32, torch.bfloat16]
    if backend == "fused":  # Triton's interpreter has no products of bfloat16
        dtypes.append(torch.bfloat16 if gpus else torch.float16)
    results = []
    for number, (lengths, heads, dim, widths, ratios, causal) in enumerate(configurations(backend, 16)):
        if not rank < len(lengths) <= ranks:
            continue
        shards = SequenceShards.agree(lengths[rank], groups[len(lengths)], device)
        assert shards.lengths == tuple(map(tuple, lengths))
        totals, rows = torch.tensor(shards.totals), shards.rows()
        ends, own_ends = (
            torch.cat([torch.zeros(1), x.cumsum(0)]).int() for x in (totals, torch.tensor(lengths[rank]))
        )
        for dtype in dtypes[: None if number < 4 else 1]:
            generator = torch.Generator().manual_seed(number)
            qkv, direction = (
                torch.randn(sum(shards.totals), *shape, generator=generator, dtype=torch.float64).to(dtype)
                for shape in ((3, heads, dim), (heads, dim))
            )
            own = qkv[rows].to(device).requires_grad_()
            runs = []
            for _ in range(2):
                output = parallel_dilated_self_attention(
                    own, widths, ratios, own_ends.to(device), shards, causal, backend=backend
                )
                runs.append([output, *torch.autograd.grad(output, own, direction[rows].to(device))])
            assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), "not the same in every run"

            whole = qkv.double().requires_grad_()
            expected = dilated_attention(*whole.unbind(1), widths, ratios, causal, cu_seqlens=ends, backend="naive")
            wanted = [expected, *torch.autograd.grad(expected, whole, direction.double())]
            # The floor: where the true gradient is zero (one key alone) only rounding is left to compare.
            errors = [
                ((a.cpu().double() - b[rows]).norm() / (b.norm() + 1)).item()
                for a, b in zip(runs[0], wanted, strict=True)
            ]
            results.append((str(dtype), lengths, (heads, dim, widths, ratios, causal), max(errors)))
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":  # forked: everything is imported once
    start_processes(
        main, (Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]), nprocs=int(sys.argv[2]), start_method="fork"
    )

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


def configurations(backend: str, gpus: bool) -> list[Configuration]:
    """GigaPath's shape in small, what is awkward, and random ones. Triton's interpreter is slow: few of them there."""
    rng = random.Random(1)
    if gpus:  # as GigaPath is, so that kernels are compiled once
        return [
            (_lengths(rng, 2, 3, 2000), 16, 48, rng.sample(range(16, 5000), 5), [1, 2, 4, 8, 16], False)
            for _ in range(6)
        ]
    found: list[Configuration] = [
        ([[26], [26]], 2, 12, [9, 20, 52], [1, 2, 4], False),
        ([[20, 1, 9, 0], [11, 0, 30, 1], [0, 4, 11, 8]], 1, 16, [16, 20, 32], [1, 2, 4], True),  # nothing left over
        ([[32], [32], [32]], 1, 12, [8, 16, 32], [1, 2, 4], False),  # borders of segments: nothing travels
        ([[170], [31]], 1, 12, [64, 201], [1, 2], False),  # several blocks of a class
        ([[0], [1], [0]], 1, 8, [4], [1], False),
    ]
    if backend == "fused":
        return found
    found += [
        ([[83], [61]], 16, 12, [8, 20, 50, 100, 300], [1, 2, 4, 8, 16], False),
        ([[0], [40], [33]], 3, 8, [16, 73], [1, 4], True),
        ([[1], [1], [1]], 5, 8, [2, 3], [1, 7], False),  # more heads' offsets than slots
        ([[61], [3], [7]], 6, 8, [1000], [5], False),  # one segment over every rank
    ]
    for ranks in (2, 3) * 8:
        widths, ratios = ([rng.randint(1, most) for _ in range(rng.randint(1, 4))] for most in (100, 9))
        branches = min(len(widths), len(ratios))
        lengths = _lengths(rng, ranks, rng.randint(1, 3), 40)
        found.append((lengths, rng.randint(1, 9), 8, widths[:branches], ratios[:branches], rng.random() < 0.5))
    return found


def _lengths(rng: random.Random, ranks: int, sequences: int, most: int) -> list[list[int]]:
    """Of sequences that are not empty, but their parts may be."""
    lengths = [
        [rng.choice([0, 1, rng.randint(2, most), rng.randint(2, most)]) for _ in range(sequences)] for _ in range(ranks)
    ]
    for sequence in range(sequences):
        lengths[rng.randrange(ranks)][sequence] += 1
    return lengths


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
    for number, (lengths, heads, dim, widths, ratios, causal) in enumerate(configurations(backend, gpus)):
        if not rank < len(lengths) <= ranks:
            continue
        shards = SequenceShards.agree(lengths[rank], groups[len(lengths)], device)
        assert shards.lengths == tuple(map(tuple, lengths))
        totals, rows = torch.tensor(shards.totals), shards.rows()
        ends, own_ends = (torch.cat([torch.zeros(1), x.cumsum(0)]).int() for x in (totals, torch.tensor(lengths[rank])))
        for dtype in dtypes if gpus or number == 0 or backend == "gather" else dtypes[:1]:
            generator = torch.Generator().manual_seed(number)
            qkv, direction = (
                torch.randn(sum(shards.totals), *shape, generator=generator, dtype=torch.float64).to(dtype)
                for shape in ((3, heads, dim), (heads, dim))
            )
            own = qkv[rows].to(device).requires_grad_()
            runs = []
            for _ in range(2 if gpus or (number == 0 and dtype == dtypes[0]) or backend == "gather" else 1):
                output = parallel_dilated_self_attention(
                    own, widths, ratios, own_ends.to(device), shards, causal, backend=backend
                )
                runs.append([output, *torch.autograd.grad(output, own, direction[rows].to(device))])
            assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True)), (
                "not the same in every run"
            )

            whole = qkv.to(device).double().requires_grad_()
            reference = "gather" if gpus else "naive"  # which is too slow for what a GPU is given here
            expected = dilated_attention(
                *whole.unbind(1), widths, ratios, causal, cu_seqlens=ends.to(device), backend=reference
            )
            wanted = [expected, *torch.autograd.grad(expected, whole, direction.to(device).double())]
            # The floor: where the true gradient is zero (one key alone) only rounding is left to compare.
            errors = [
                ((a.double() - b[rows.to(device)]).norm() / (b.norm() + 1)).item()
                for a, b in zip(runs[0], wanted, strict=True)
            ]
            results.append((str(dtype), lengths, (heads, dim, widths, ratios, causal), max(errors)))
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":  # forked: everything is imported once
    start_processes(
        main, (Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]), nprocs=int(sys.argv[2]), start_method="fork"
    )

"""Ranks of the test of parallel dilated attention: `python attention_ranks.py FOLDER BACKEND RANKS` starts them."""

import random
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from longslide import dilated_attention
from longslide.models.slide_encoder.dilated_attention.parallel import SequenceShards, parallel_dilated_attention
from torch.multiprocessing import start_processes


def configurations(count: int) -> list[tuple[list[int], int, list[int], list[int], bool]]:
    """Shards, heads, segment lengths, ratios, causal: GigaPath's shape in small, what is awkward, and random ones."""
    found = [
        ([50, 50], 4, [8, 20, 100], [1, 2, 4], False),
        ([50, 50], 4, [8, 20, 100], [1, 2, 4], True),
        ([32, 32, 32, 32], 8, [8, 16, 32], [1, 2, 4], False),  # borders of segments: nothing travels
        ([0, 1, 0, 0], 2, [4], [1], False),
        ([0, 40, 0, 33], 3, [16, 73], [1, 3], True),
        ([1, 1, 1], 5, [2, 3], [1, 7], False),  # more heads' offsets than slots
        ([61, 3, 2, 7], 6, [1000], [5], False),  # one segment over every rank
    ]
    rng = random.Random(1)
    for ranks in (2, 3, 4) * (count // 3):
        branches = rng.randint(1, 4)
        lengths = [rng.choice([0, 1, rng.randint(2, 40), rng.randint(2, 40)]) for _ in range(ranks)]
        lengths[rng.randrange(ranks)] += 1
        widths, ratios = ([rng.randint(1, most) for _ in range(branches)] for most in (100, 9))
        found.append((lengths, rng.randint(1, 9), widths, ratios, rng.random() < 0.5))
    return found


def main(rank: int, folder: Path, backend: str, ranks: int) -> None:
    dist.init_process_group(backend, f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    groups = {size: dist.new_group(list(range(size))) for size in range(2, ranks + 1)}
    results = []
    for number, (lengths, heads, widths, ratios, causal) in enumerate(configurations(45)):
        if not rank < len(lengths) <= ranks:
            continue
        for dtype in (torch.float64, torch.float32, torch.bfloat16)[: 3 if number < 10 else 1]:
            generator = torch.Generator().manual_seed(number)
            whole = [torch.randn(2, sum(lengths), heads, 8, generator=generator, dtype=torch.float64) for _ in range(4)]
            first = sum(lengths[:rank])
            *qkv, direction = (x[:, first : first + lengths[rank]].to(device, dtype) for x in whole)
            qkv = [x.requires_grad_() for x in qkv]
            group = groups[len(lengths)]
            shards = SequenceShards.agree(lengths[rank], group, device)
            assert shards.lengths == tuple(lengths)
            runs = []
            for _ in range(2):
                output = parallel_dilated_attention(*qkv, widths, ratios, causal, shards=shards)
                runs.append([output, *torch.autograd.grad(output, qkv, direction)])
            assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), "not the same in every run"

            *whole_qkv, whole_direction = (x.to(dtype).double() for x in whole)
            whole_qkv = [x.requires_grad_() for x in whole_qkv]
            expected = dilated_attention(*whole_qkv, widths, ratios, causal, backend="naive")
            wanted = [expected, *torch.autograd.grad(expected, whole_qkv, whole_direction)]
            # The floor: where the true gradient is zero (one key alone) only rounding is left to compare.
            errors = [
                ((a.cpu().double() - b[:, first : first + lengths[rank]]).norm() / (b.norm() + 1)).item()
                for a, b in zip(runs[0], wanted, strict=True)
            ]
            results.append((str(dtype), lengths, (heads, widths, ratios, causal), max(errors)))
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":  # forked: everything is imported once
    start_processes(
        main, (Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])), nprocs=int(sys.argv[3]), start_method="fork"
    )

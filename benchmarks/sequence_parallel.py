"""GigaPath's slide encoder with one slide spread over all ranks, beside one rank alone: seconds, memory, what travels.

    torchrun --nproc-per-node 2 benchmarks/sequence_parallel.py [--tokens 250000 1000000] [--layers 12]

Random weights, bfloat16, forward and backward with the layers computed again (`checkpointing`), medians of the slowest rank.
`received` is what a rank receives in the forward of one layer, the most of any. `alone` is the first rank with the whole
slide.
"""

import argparse
import os
import statistics
import time

import torch
import torch.distributed as dist
from longslide import create_slide_encoder
from longslide.models.slide_encoder.dilated_attention.parallel_plan import make_plan
from longslide.models.slide_encoder.encoder import SlideEncoder
from longslide.models.slide_encoder.sequence_parallel import own_tiles

CUDA = torch.cuda.is_available()


def grid(tokens: int) -> torch.Tensor:
    index = torch.arange(tokens)
    return torch.stack([index % 4096, index // 4096], -1)


def step(encoder: SlideEncoder, tokens: int, part: slice, repeats: int) -> tuple[float, float]:
    """Seconds of a forward and backward, and peak GiB."""
    device = encoder.cls_token.device
    cells = grid(tokens)[part][None].to(device)
    features = torch.randn(1, cells.shape[1], 1536, device=device, dtype=torch.bfloat16)
    seconds = []
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats + 1):
        encoder.zero_grad(set_to_none=True)
        start = time.perf_counter()
        encoder(features, cells).float().square().sum().backward()
        if CUDA:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), torch.cuda.max_memory_allocated() / 2**30 if CUDA else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[100_000, 250_000, 1_000_000])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if CUDA else torch.device("cpu")
    if CUDA:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if CUDA else "gloo")
    encoder = create_slide_encoder("gigapath", checkpoint="random", layers=options.layers, checkpointing=True)
    encoder = encoder.train().to(device, torch.bfloat16)
    if rank == 0:
        name = torch.cuda.get_device_name() if CUDA else "CPU"
        print(f"gigapath, {options.layers} layers, {ranks} x {name}, torch {torch.__version__}, bfloat16")
        print(f"{'tiles':>10} {'s':>8} {'GiB':>7} {'received MB':>12} {'alone s':>9} {'GiB':>7} {'ratio':>6}")
    for tokens in options.tokens:
        encoder.shard_sequence(dist.group.WORLD)
        together = torch.tensor(step(encoder, tokens, own_tiles(tokens, rank, ranks), options.repeats), device=device)
        spec = encoder.spec
        parts = [own_tiles(tokens, other, ranks) for other in range(ranks)]
        lengths = tuple(part.stop - part.start + (part.start == 0) for part in parts)
        branches = zip(spec.segment_lengths, spec.dilated_ratios, strict=True)
        widths = tuple((min(length, tokens + 1), ratio) for length, ratio in branches)
        rows = sum(make_plan(lengths, rank, spec.heads, widths, False, device).receive_sizes)
        received = torch.tensor(2 * 2 * rows * spec.width / spec.heads / 1e6, device=device)
        for value in (together, received):
            dist.all_reduce(value, dist.ReduceOp.MAX)
        encoder.shard_sequence(None)
        if rank == 0:
            try:
                alone = step(encoder, tokens, slice(None), options.repeats)
            except torch.OutOfMemoryError:
                alone = (float("nan"), float("nan"))
            print(
                f"{tokens:10,} {together[0]:8.3f} {together[1]:7.1f} {received:12.1f} {alone[0]:9.3f} {alone[1]:7.1f} "
                f"{alone[0] / together[0]:6.2f}",
                flush=True,
            )
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

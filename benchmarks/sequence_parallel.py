"""GigaPath's slide encoder with one slide spread over all ranks, beside one rank alone: seconds, memory, what travels.

    torchrun --nproc-per-node 2 benchmarks/sequence_parallel.py [--tiles 250000 1000000] [--layers 12] [--profile FOLDER]

Random weights, bfloat16, forward and backward with the layers computed again (`checkpointing`); together with the mean of
the gradients over the ranks, in one all-reduce (DDP's buckets would be in memory all the time). `alone` is the first rank
with the whole slide, the others idle. Seconds are medians of the slowest rank, memory the peak of the fullest; `received` is
what a rank receives in the forward of one layer, the most of any. The errors are those of the embedding and of all gradients
against the run alone, relative to its norm; in bfloat16, whose rounding they show (alone it is as far from float32), and
once in float32 on `--exact` tiles.

2 x H100 (80 GB, NVLink), torch 2.11:
    tiles     dtype  alone s    GiB  together    GiB  speed-up  memory  received MB    error  of grads
  100,000  bfloat16    0.472   5.57     0.265   3.03      1.78    55%         66.6  3.0e-03   9.0e-02
  500,000  bfloat16    2.956  26.78     1.621  14.04      1.82    52%        206.9  3.2e-03   8.8e-02
   20,010   float32    0.757   2.54     0.429   1.58      1.76    62%         46.5  1.3e-07   3.6e-06
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from longslide import create_slide_encoder
from longslide.models.slide_encoder.dilated_attention.windows import make_windows
from longslide.models.slide_encoder.encoder import SlideEncoder
from longslide.models.slide_encoder.sequence_parallel import make_mesh, own_tiles
from torch import Tensor

CUDA = torch.cuda.is_available()


def slide(tiles: int, part: slice, like: Tensor) -> tuple[Tensor, Tensor]:
    """A part of the tile embeddings `(1, N, 1536)` of a slide, the same one on every rank, and of their cells."""
    generator = torch.Generator(like.device).manual_seed(tiles)
    features = torch.randn(1, tiles, 1536, generator=generator, dtype=like.dtype, device=like.device)
    index = torch.arange(tiles, device=like.device)
    return features[:, part].clone(), torch.stack([index % 4096, index // 4096], -1)[None, part].clone()


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def average_gradients(encoder: SlideEncoder) -> None:
    grads = [x.grad for x in encoder.parameters() if x.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads]) / dist.get_world_size()
    dist.all_reduce(flat)
    parts = torch.split(flat, [grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])


def steps(
    encoder: SlideEncoder, features: Tensor, cells: Tensor, repeats: int, together: bool
) -> tuple[list[float], Tensor]:
    """Seconds of each forward and backward after the first, and the embedding."""
    seconds = []
    for _ in range(repeats + 1):
        encoder.zero_grad(set_to_none=True)
        synchronize()
        if together:
            dist.barrier()
        start = time.perf_counter()
        embedding = encoder(features, cells)
        embedding.float().square().sum().backward()
        if together:
            average_gradients(encoder)
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:], embedding.detach()


def measure(
    encoder: SlideEncoder, tiles: int, repeats: int, group: dist.ProcessGroup | None, profile: Path | None = None
) -> tuple[float, float, list[Tensor]]:
    """Seconds, peak GiB, and embedding and gradients; by the ranks of a group, or by this one alone."""
    together = group is not None
    rank, ranks = dist.get_rank(), dist.get_world_size()
    features, cells = slide(
        tiles, own_tiles(tiles, rank, ranks, encoder.spec) if together else slice(None), encoder.cls_token
    )
    encoder.shard_sequence(group)
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds, embedding = steps(encoder, features, cells, repeats, together)
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else float("nan")
    results = [embedding.float().cpu(), *(x.grad.float().cpu() for x in encoder.parameters() if x.grad is not None)]
    if profile is not None:
        with torch.profiler.profile() as profiler:
            steps(encoder, features, cells, 0, together)
        profile.mkdir(parents=True, exist_ok=True)
        name = profile / f"{tiles}-{ranks if together else 1}-rank{rank}"
        name.with_suffix(".txt").write_text(
            profiler.key_averages().table(sort_by="self_device_time_total", row_limit=30, max_name_column_width=60)
        )
        profiler.export_chrome_trace(str(name.with_suffix(".json.gz")))
    encoder.zero_grad(set_to_none=True)
    slowest = torch.tensor([*seconds, peak], device=features.device)
    if together:
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return statistics.median(slowest[:-1].tolist()), slowest[-1].item(), results


def received_megabytes(encoder: SlideEncoder, tiles: int, group: dist.ProcessGroup) -> float:
    """What this rank receives in the forward of one layer."""
    ranks, spec = dist.get_world_size(), encoder.spec
    parts = [own_tiles(tiles, rank, ranks, spec) for rank in range(ranks)]
    lengths = tuple((part.stop - part.start + (rank == 0),) for rank, part in enumerate(parts))
    windows = make_windows(
        lengths, group, spec.heads, spec.segment_lengths, spec.dilated_ratios, encoder.cls_token.device
    )
    columns: int = 2 ** (spec.width // spec.heads - 1).bit_length()
    return 2 * sum(windows.receive_sizes) * columns * encoder.cls_token.element_size() / 1e6


def relative_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    squares = [((a - b).square().sum(), b.square().sum()) for a, b in zip(found, wanted, strict=True)]
    return (sum(a for a, _ in squares) / sum(b for _, b in squares)).sqrt().item()  # type: ignore[union-attr]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, nargs="+", default=[100_000, 500_000])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--exact", type=int, default=20_010, help="tiles of the comparison in float32; 0 for none")
    parser.add_argument("--profile", type=Path, help="folder for traces of torch.profiler")
    options = parser.parse_args()

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if CUDA else torch.device("cpu")
    if CUDA:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if CUDA else "gloo")
    group = make_mesh(device.type, 1, ranks)["sequence"].get_group()
    encoder = create_slide_encoder("gigapath", checkpoint="random", layers=options.layers, checkpointing=True).train()
    if rank == 0:
        name = torch.cuda.get_device_name() if CUDA else "CPU"
        print(f"gigapath, {options.layers} layers, {ranks} x {name}, torch {torch.__version__}")
        print(
            f"{'tiles':>9} {'dtype':>9} {'alone s':>8} {'GiB':>6} {'together':>9} {'GiB':>6} {'speed-up':>9} {'memory':>7} "
            f"{'received MB':>12} {'error':>8} {'of grads':>9}"
        )
    jobs = [(tiles, torch.bfloat16) for tiles in options.tiles]
    jobs += [(options.exact, torch.float32)] if options.exact else []
    for tiles, dtype in jobs:
        encoder = encoder.to(device, dtype)
        profile = options.profile if dtype == torch.bfloat16 else None
        seconds, memory, results = measure(encoder, tiles, options.repeats, group, profile)
        received = torch.tensor(received_megabytes(encoder, tiles, group), device=device)
        dist.all_reduce(received, dist.ReduceOp.MAX)
        if rank == 0:
            try:
                alone, alone_memory, wanted = measure(encoder, tiles, options.repeats, None, profile)
                errors = (relative_error(results[:1], wanted[:1]), relative_error(results[1:], wanted[1:]))
            except torch.OutOfMemoryError:
                alone, alone_memory, errors = float("nan"), float("nan"), (float("nan"), float("nan"))
            print(
                f"{tiles:9,} {str(dtype)[6:]:>9} {alone:8.3f} {alone_memory:6.2f} {seconds:9.3f} {memory:6.2f} "
                f"{alone / seconds:9.2f} {memory / alone_memory:6.0%} {received:12.1f} {errors[0]:8.1e} {errors[1]:9.1e}",
                flush=True,
            )
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

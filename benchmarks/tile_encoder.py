"""Tiles per second of tile encoders alone, on tiles that are on the GPU, and how far each precision is from float32.

    python benchmarks/tile_encoder.py [--tile-encoders gigapath uni kaiko-vits16] [--seconds 6]

In one process on one GPU: the usual way (float16 autocast, eager, batches of 64), then `TileEngine` in each precision,
once through with tiles that come from the CPU (`stream`), as `longslide embed` runs it. Weights are random, with
LayerScale at 0.1 to 1, since what timm starts with leaves a DINOv2 encoder next to linear. Tiles are smooth random
fields in the colours of H&E. Compile times are of an empty cache (`TORCHINDUCTOR_CACHE_DIR` set to a new folder), then
of that one, filled.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args

os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp())

import numpy as np
import torch
from longslide.models.tile_encoder.encoder import TileEncoder, build_network
from longslide.models.tile_encoder.engine import Precision, TileEngine
from longslide.models.tile_encoder.float8 import fidelity, has_float8
from longslide.models.tile_encoder.spec import load_tile_encoder_spec
from torch import Tensor
from torch.nn.functional import interpolate


def random_encoder(name: str, device: torch.device) -> TileEncoder:
    spec = load_tile_encoder_spec(name)
    torch.manual_seed(0)
    with device:
        network = build_network(spec)
        for key, parameter in network.named_parameters():
            if key.endswith("gamma"):
                torch.nn.init.uniform_(parameter, 0.1, 1)
    return TileEncoder(spec, network, "random").eval()


def random_tiles(count: int, px: int, device: torch.device) -> Tensor:
    """`(count, px, px, 3)` uint8: two stains of random density on white, and some noise."""
    generator = torch.Generator(device).manual_seed(0)
    fields = sum(
        interpolate(torch.randn(count, 2, n, n, device=device, generator=generator), (px, px), mode="bicubic") / n**0.5
        for n in (2, 8, 32, 128)
    )
    stains = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]], device=device)
    strength = torch.rand(count, 2, 1, 1, device=device, generator=generator) * 1.5
    density = torch.einsum("nshw,sc->nhwc", (fields + strength).clamp(min=0), stains)
    noise = torch.randn(density.shape, device=device, generator=generator) * 4
    return (255 * torch.exp(-density) + noise).clamp(0, 255).to(torch.uint8)


def rate(run: Callable[[], int], seconds: float) -> float:
    """Tiles per second of a function that says how many it has done, after two calls that do not count."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    started, tiles = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        tiles += run()
        torch.cuda.synchronize()
    return tiles / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tile-encoders", nargs="+", default=["kaiko-vits16", "uni", "gigapath"])
    parser.add_argument("--precisions", nargs="+", default=list(get_args(Precision))[1:])
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--batch-size", type=int, default=None)
    options = parser.parse_args()
    device = torch.device("cuda", 0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    for name in options.tile_encoders:
        began = time.perf_counter()
        encoder = random_encoder(name, device)
        tiles = random_tiles(512, encoder.spec.tile_px, device)
        exact = TileEngine(encoder, device, pads=False).exact(tiles)
        print(f"\n{name}: made in {time.perf_counter() - began:.0f} s", flush=True)
        print(
            f"{'':34} {'ready s':>8} {'again s':>8} {'tiles/s':>8} {'stream':>8} {'GiB':>5}  mean cosine   least  "
            "neighbours kept"
        )

        def report(
            what: str,
            ready: float,
            again: float,
            alone: float,
            streamed: float,
            embeddings: Tensor,
            exact: Tensor = exact,
        ) -> None:
            found = fidelity(embeddings, exact)
            print(
                f"{what:34} {ready:8.1f} {again:8.1f} {alone:8,.0f} {streamed:8,.0f} "
                f"{torch.cuda.max_memory_allocated() / 2**30:5.1f}   {found.mean_cosine:.7f} {found.least_cosine:.6f} "
                f"{found.neighbours_kept:16.1%}",
                flush=True,
            )

        @torch.inference_mode()
        def usual(part: Tensor, encoder: TileEncoder = encoder) -> Tensor:
            with torch.autocast("cuda", torch.float16):
                return encoder(part)  # type: ignore[no-any-return]

        few = tiles[:64].contiguous()

        def usual_batch(few: Tensor = few, usual: Any = usual) -> int:
            usual(few)
            return len(few)

        found = torch.cat([usual(part) for part in torch.split(tiles, 64)]).float()
        torch.cuda.reset_peak_memory_stats()
        report("float16 autocast, eager, batch 64", 0, 0, rate(usual_batch, options.seconds), float("nan"), found)
        for precision in options.precisions:
            if precision == "float8" and not has_float8(device):
                continue
            try:
                engine_row(encoder, device, precision, options, tiles, report)
            except Exception as error:
                print(f"{precision:34} {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
            torch.cuda.empty_cache()


def engine_row(
    encoder: TileEncoder,
    device: torch.device,
    precision: Precision,
    options: argparse.Namespace,
    tiles: Tensor,
    report: Callable[..., None],
) -> None:
    times = []
    for _ in range(2):
        torch._dynamo.reset()
        started = time.perf_counter()
        engine = TileEngine(encoder, device, precision, options.batch_size)
        engine(tiles[: engine.batch_size + 1])  # in both of its sizes
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    torch.cuda.reset_peak_memory_stats()
    batch = tiles[: engine.batch_size].contiguous()

    def alone() -> int:
        engine(batch)
        return len(batch)

    measured = rate(alone, options.seconds)
    read = tiles[:64].cpu().numpy()

    def batches(seconds: float) -> Iterator[np.ndarray]:
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            yield read

    done, started = 0, time.perf_counter()
    try:
        for part in engine.stream(batches(options.seconds)):
            done += len(part)
    except Exception as error:  # float8 too coarse for these weights: its rate is reported all the same
        print(f"  stream: {' '.join(str(error).split())[:200]}", flush=True)
    streamed = done / (time.perf_counter() - started) if done else float("nan")
    found = engine(tiles).float()
    remarks = f" ({'; '.join(engine.remarks)})" if engine.remarks else ""
    report(f"{precision}, batch {engine.batch_size}{remarks}", *times, measured, streamed, found)


if __name__ == "__main__":
    main()

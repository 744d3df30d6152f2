"""Tiles per second from a slide file to embeddings, and the share of time the device waits for tiles.

    python benchmarks/embed.py [slide] [--tile-encoder gigapath] [--threads 8]

Weights are random: they cost the same. Without a slide, a synthetic one (deflate-compressed) is written. Printed side by
side: the encoder alone on tiles that are already on the device, the reading alone, and both together as `longslide embed`
runs them; the device waits for the time in which no kernel of the encoder runs.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from longslide import create_tile_encoder, open_slide
from longslide.data.slides.slide import Slide
from longslide.data.synthetic import write_pyramid, write_synthetic_slide
from longslide.data.tiles.grid import make_grid
from longslide.data.tiles.stream import TileBatch, TileStream
from longslide.data.tissue.base import Tissue
from longslide.models.tile_encoder.engine import TileEngine
from longslide.pipeline.embed.tile_embedding import TileEmbedder, resolve_device, resolve_precision


def synthetic_slide(folder: Path) -> Path:
    small = write_synthetic_slide(folder / "piece.svs", size=(4096, 4096))
    with open_slide(small) as slide:
        piece = slide.read_region(0, 0, 0, 4096, 4096)
    path = folder / "slide.svs"
    write_pyramid(path, np.tile(piece, (4, 4, 1)), mpp=0.5)
    return path


def whole_slide(slide: Slide) -> Tissue:
    width, height = slide.dimensions
    return Tissue(np.ones((height // 64, width // 64), bool), (width / (width // 64), height / (height // 64)), "all")


class TimedEngine(TileEngine):
    """Time in which the encoder runs: by events on a GPU, by the clock on a CPU."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.marks: list[Any] = []

    def __call__(self, tiles: torch.Tensor) -> torch.Tensor:
        self.marks.append(self.now())
        embeddings = super().__call__(tiles)
        self.marks.append(self.now())
        return embeddings

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self) -> float:
        pairs = zip(self.marks[::2], self.marks[1::2], strict=True)
        if self.device.type != "cuda":
            return float(sum(end - start for start, end in pairs))
        torch.cuda.synchronize()
        return float(sum(start.elapsed_time(end) for start, end in pairs)) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", nargs="?", type=Path)
    parser.add_argument("--tile-encoder", default="gigapath")
    parser.add_argument("--batch-size", type=int, help="default: what is fastest on the device")
    parser.add_argument("--threads", type=int, nargs="+", default=[8])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--max-tiles", type=int, default=4096)
    options = parser.parse_args()

    device = resolve_device(options.device)
    encoder = create_tile_encoder(options.tile_encoder, checkpoint="random")
    precision = resolve_precision(options.precision, encoder.spec.precision, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    embedder = TileEmbedder(encoder, device, precision, options.batch_size)
    embedder.engine = engine = TimedEngine(encoder, device, precision, options.batch_size)
    print(f"{options.tile_encoder}, {name}, {precision}, batches of {engine.batch_size}")

    with tempfile.TemporaryDirectory() as folder, open_slide(options.slide or synthetic_slide(Path(folder))) as slide:
        grid = make_grid(slide, whole_slide(slide), tile_mpp=encoder.spec.tile_mpp or 0.5, tile_px=encoder.spec.tile_px)
        grid = type(grid)(**vars(grid) | {"coords": grid.coords[: options.max_tiles]})
        tiles = len(grid.coords)
        first = next(iter(TileStream(slide, grid, batch_size=embedder.reading_batch)))

        repeats = max(4, tiles // embedder.reading_batch)
        embedder([first] * (repeats + 1))  # compiled, in both sizes of batches
        started = time.perf_counter()
        embedder([TileBatch(first.tiles, first.index, first.coords)] * repeats)
        alone = repeats * len(first.index) / (time.perf_counter() - started)

        print(f"{'threads':>8} {'encoder':>9} {'reading':>9} {'job':>9}  tiles/s   job / slower part   device waits")
        for threads in options.threads:
            settings = {"batch_size": embedder.reading_batch, "threads": threads}
            started = time.perf_counter()
            for _ in TileStream(slide, grid, **settings):
                pass
            reading = tiles / (time.perf_counter() - started)

            engine.marks.clear()
            started = time.perf_counter()
            embedder(TileStream(slide, grid, **settings))
            wall = time.perf_counter() - started
            waits = 1 - engine.seconds() / wall
            job = tiles / wall
            ratio = job / min(alone, reading)
            print(f"{threads:>8} {alone:9,.0f} {reading:9,.0f} {job:9,.0f} {ratio:25.2f} {waits:14.1%}")


if __name__ == "__main__":
    main()

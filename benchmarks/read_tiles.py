"""Tiles per second: TileStream against OpenSlide's own `read_region` in a loop, in one run.

    python benchmarks/read_tiles.py [slide] [--tile-mpp 0.5 1.0 ...] [--threads 1 2 4]

Every tile of the slide is read, tissue or not, and each run opens the slide anew, so that no cache is warm. Both ways take
turns, and the best of three runs counts. Tiles per CPU second are the tiles per second of one core; other processes on the
machine disturb them least. Without a slide a synthetic one is made, as wide as a scanner's.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
from longslide.data.slides.slide import open_slide
from longslide.data.synthetic import write_pyramid, write_synthetic_slide
from longslide.data.tiles.grid import Grid, make_grid
from longslide.data.tiles.stream import TileStream
from longslide.data.tissue.base import Tissue
from PIL import Image


def read_with_the_stream(path: Path, grid: Grid, threads: int) -> None:
    with open_slide(path, slide_mpp=grid.slide_mpp) as slide:
        tiles = sum(len(batch.tiles) for batch in TileStream(slide, grid, threads=threads))
    assert tiles == len(grid.coords)


def read_with_a_loop(path: Path, grid: Grid, threads: int) -> None:
    with openslide.OpenSlide(path) as slide, ThreadPoolExecutor(threads) as pool:

        def read(corner: tuple[int, int]) -> np.ndarray:
            region = slide.read_region(corner, grid.level, (grid.read_px, grid.read_px)).convert("RGB")
            if grid.read_px != grid.tile_px:
                region = region.resize((grid.tile_px, grid.tile_px), Image.Resampling.BOX)
            return np.asarray(region)

        corners = [(x, y) for x, y in grid.coords.tolist()]
        for _ in map(read, corners) if threads == 1 else pool.map(read, corners):
            pass


def seconds(read: Callable[[Path, Grid, int], None], path: Path, grid: Grid, threads: int) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one run."""
    wall, cpu = time.perf_counter(), time.process_time()
    read(path, grid, threads)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(path: Path, mpps: list[float], threads: list[int], tile_px: int) -> None:
    with open_slide(path) as slide:
        everything = Tissue(
            np.ones((1, 1), bool), (float(slide.dimensions[0]), float(slide.dimensions[1])), "everything"
        )
        grids = [make_grid(slide, everything, tile_mpp=mpp, tile_px=tile_px, min_tissue=0.0) for mpp in mpps]
    print(f"{path.name}, tiles of {tile_px} px                 tiles per second        tiles per CPU second")
    columns = f"{'stream':>8} {'loop':>8} {'ratio':>6}"
    print(f"{'mpp':>6} {'tiles':>7} {'level':>6} {'read px':>8} {'threads':>8} {columns} {columns}")
    for mpp, grid in zip(mpps, grids, strict=True):
        for count in threads:
            both = [read_with_the_stream, read_with_a_loop]
            runs = np.array([[seconds(read, path, grid, count) for read in both] for _ in range(3)])
            print(f"{mpp:6g} {len(grid.coords):7d} {grid.level:6d} {grid.read_px:8d} {count:8d}", end="")
            for stream, loop in (len(grid.coords) / runs.min(axis=0)).T:
                print(f" {stream:8.0f} {loop:8.0f} {stream / loop:6.2f}", end="")
            print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path, nargs="?")
    parser.add_argument("--tile-mpp", type=float, nargs="+", default=[0.5, 0.7, 1.0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tile-px", type=int, default=256)
    arguments = parser.parse_args()
    if arguments.slide is not None:
        measure(arguments.slide, arguments.tile_mpp, arguments.threads, arguments.tile_px)
        return
    with tempfile.TemporaryDirectory() as folder:
        with open_slide(write_synthetic_slide(Path(folder) / "piece.svs", size=(4096, 1024))) as slide:
            piece = slide.read_region(0, 0, 0, *slide.dimensions)
        path = Path(folder) / "synthetic.svs"
        write_pyramid(path, np.tile(piece, (1, 12, 1)), mpp=0.5)
        measure(path, arguments.tile_mpp, arguments.threads, arguments.tile_px)


if __name__ == "__main__":
    main()

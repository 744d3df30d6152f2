"""Tiles per second: our reader by threads and by processes, OpenSlide, and other libraries, with their pixel differences.

    python benchmarks/read_tiles.py [SLIDE] [--native 240 256] [--slide-mpp 0.25 0.5] [--workers 1 4 16] [--ways ...]

Every tile of the slide is read at 0.5 um/px, tissue or not, or as many as `--tiles` says; each run opens the slide anew, so
that no decoded tile is kept, while the file's bytes are in memory. The ways take turns, and the best of `--repeats` runs
counts. Without a slide JPEG pyramids (4:2:0, shared tables, 8 KiB a tile of 256 px) are made of the one in
LONGSLIDE_TEST_SLIDES, or of synthetic tissue (4 KiB): native tiles of 256 px are aligned with the tiles that are read,
others not. Libraries that are not installed are left out. `ours` reads regions as they do; `ours-threads` and `ours-pool`
are what `embed` reads by, and score the blur of each tile besides.
"""

import argparse
import os
import resource
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
import simplejpeg
import tifffile
from longslide.data.slides.slide import open_slide
from longslide.data.synthetic import write_synthetic_slide
from longslide.data.tiles.grid import Grid, make_grid
from longslide.data.tiles.pool import TilePool
from longslide.data.tiles.stream import TileStream
from longslide.data.tissue.base import Tissue

Corner = tuple[int, int]
Take = Callable[[np.ndarray, int], None]


def by_stream(reader: str, path: Path, grid: Grid, workers: int, take: Take) -> None:
    with open_slide(path, reader=reader) as slide:
        for batch in TileStream(slide, grid, threads=workers):
            take(batch.tiles, int(batch.index[0]))


def by_pool(reader: str, path: Path, grid: Grid, workers: int, take: Take, pool: TilePool) -> None:
    with open_slide(path, reader=reader) as slide:
        for batch in TileStream(slide, grid, batch_size=256).read_by(pool):
            take(batch.tiles, int(batch.index[0]))
            batch.release()


def by_loop(
    open_file: Callable[[Path, Grid], Callable[[Corner], np.ndarray]], path: Path, grid: Grid, workers: int, take: Take
) -> None:
    read = open_file(path, grid)
    corners = [(x, y) for x, y in grid.coords.tolist()]
    with ThreadPoolExecutor(workers) as pool:
        regions: Iterator[np.ndarray] = map(read, corners) if workers == 1 else pool.map(read, corners)
        for number, region in enumerate(regions):
            take(resized(region, grid)[None], number)


def resized(region: np.ndarray, grid: Grid) -> np.ndarray:
    if grid.read_px == grid.tile_px:
        return np.asarray(region)
    return cv2.resize(region, (grid.tile_px, grid.tile_px), interpolation=cv2.INTER_AREA)


def open_openslide(path: Path, grid: Grid) -> Callable[[Corner], np.ndarray]:
    slide = openslide.OpenSlide(path)
    size = (grid.read_px, grid.read_px)
    return lambda corner: np.asarray(slide.read_region(corner, grid.level, size).convert("RGB"))


def open_ours(path: Path, grid: Grid) -> Callable[[Corner], np.ndarray]:
    slide = open_slide(path, reader="tiff")
    return lambda corner: slide.read_region(*corner, grid.level, grid.read_px, grid.read_px)


def open_cucim(path: Path, grid: Grid) -> Callable[[Corner], np.ndarray]:
    from cucim import CuImage

    CuImage.cache("per_process", memory_capacity=256)
    slide = CuImage(str(path))
    size = (grid.read_px, grid.read_px)
    return lambda corner: np.asarray(slide.read_region(corner, size, grid.level))


def open_pyvips(path: Path, grid: Grid) -> Callable[[Corner], np.ndarray]:
    import pyvips

    region = pyvips.Region.new(pyvips.Image.new_from_file(str(path), page=0, access="random"))

    def read(corner: Corner) -> np.ndarray:
        pixels = region.fetch(*corner, grid.read_px, grid.read_px)
        return np.frombuffer(pixels, np.uint8).reshape(grid.read_px, grid.read_px, 3)

    return read


def open_fastslide(path: Path, grid: Grid) -> Callable[[Corner], np.ndarray]:
    from fastslide import FastSlide

    slide = FastSlide.from_file_path(str(path))
    size = (grid.read_px, grid.read_px)
    return lambda corner: np.asarray(slide.read_region(corner, grid.level, size))[..., :3]


WAYS: dict[str, Callable[..., None]] = {
    "openslide": partial(by_loop, open_openslide),
    "ours": partial(by_loop, open_ours),
    "ours-threads": partial(by_stream, "tiff"),
    "ours-pool": partial(by_pool, "tiff"),
    "openslide-pool": partial(by_pool, "openslide"),
    "pyvips": partial(by_loop, open_pyvips),
    "cucim": partial(by_loop, open_cucim),
    "fastslide": partial(by_loop, open_fastslide),
}
MODULES = ("pyvips", "cucim", "fastslide")


def cpu_seconds(children: bool) -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, *[resource.RUSAGE_CHILDREN] * children)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def run(way: str, path: Path, grid: Grid, workers: int, keep: int = 0) -> tuple[float, float, np.ndarray]:
    """Wall-clock and CPU seconds, without those in which the pool starts, and the first tiles."""
    kept = np.zeros((keep, grid.tile_px, grid.tile_px, 3), np.uint8)

    def take(tiles: np.ndarray, first: int) -> None:
        if first < keep:
            kept[first : first + len(tiles)] = tiles[: keep - first]

    if not way.endswith("pool"):
        wall, cpu = time.perf_counter(), cpu_seconds(False)
        WAYS[way](path, grid, workers, take)
        return time.perf_counter() - wall, cpu_seconds(False) - cpu, kept
    # CPU seconds of processes are known when they have ended: those of an empty run are taken off.
    spent = []
    for rows in (0, len(grid.coords)):
        before = cpu_seconds(True)
        with TilePool(workers, batch_size=256, tile_px=grid.tile_px, batches=8) as pool:
            started(pool)
            part = Grid(**vars(grid) | {"coords": grid.coords[:rows]})
            wall = time.perf_counter()
            WAYS[way](path, part, workers, take, pool)
            wall = time.perf_counter() - wall
        spent.append(cpu_seconds(True) - before)
    return wall, max(spent[1] - spent[0], 1e-9), kept


def started(pool: TilePool) -> None:
    while not all(worker.ready for worker in pool._workers):
        time.sleep(0.01)


def grid_of(path: Path, slide_mpp: float, tile_px: int, tiles: int | None) -> Grid:
    with open_slide(path, slide_mpp=slide_mpp) as slide:
        size = (float(slide.dimensions[0]), float(slide.dimensions[1]))
        everything = Tissue(np.ones((1, 1), bool), size, "everything")
        grid = make_grid(slide, everything, tile_mpp=0.5, tile_px=tile_px, min_tissue=0.0)
        inside = (grid.coords + grid.tile_size_level0 <= slide.dimensions).all(axis=1)
    return Grid(**vars(grid) | {"coords": grid.coords[inside][:tiles]})


def measure(path: Path, slide_mpp: float, arguments: argparse.Namespace) -> None:
    grid = grid_of(path, slide_mpp, arguments.tile_px, arguments.tiles)
    print(f"\n{path.name}, {slide_mpp:g} -> 0.5 um/px, level {grid.level}, {len(grid.coords):,} tiles", flush=True)
    print(f"{'way':<15} {'workers':>8} {'tiles/s':>9} {'per CPU s':>10} {'x OpenSlide':>12} {'pixels':>22}")
    expected = run("openslide", path, Grid(**vars(grid) | {"coords": grid.coords[:300]}), 1, 300)[2]
    runs: dict[tuple[str, int], list[Any]] = {(way, n): [] for way in arguments.ways for n in arguments.workers}
    for _ in range(arguments.repeats):
        for (way, workers), done in runs.items():
            done.append(run(way, path, grid, workers, 300))
    reference = 0.0
    for (way, workers), done in runs.items():
        wall, cpu = min(one[0] for one in done), min(one[1] for one in done)
        reference = reference or len(grid.coords) / cpu
        apart = np.abs(done[0][2].astype(int) - expected[: len(done[0][2])])
        pixels = "equal" if not apart.any() else f"{(apart > 0).any(-1).mean():.1%} differ, by {apart.max()}"
        rates = len(grid.coords) / wall, len(grid.coords) / cpu
        print(f"{way:<15} {workers:8d} {rates[0]:9,.0f} {rates[1]:10,.0f} {rates[1] / reference:12.2f} {pixels:>22}")


def write_jpeg_slide(path: Path, native: int, mpp: float, columns: int, quality: int) -> None:
    """`columns` x `columns` native tiles, repeated from a piece of tissue, and the same at a quarter of the resolution."""
    source = Path(os.environ.get("LONGSLIDE_TEST_SLIDES", "")) / "CMU-1-Small-Region.svs"
    with tempfile.TemporaryDirectory() as folder:
        if not source.is_file():
            source = write_synthetic_slide(Path(folder) / "piece.svs", size=(4096, 3072), mpp=0.25)
        with open_slide(source) as slide:
            piece = slide.read_region(0, 0, 0, *(edge // native * native for edge in slide.dimensions))
    quarter = cv2.resize(piece, (piece.shape[1] // 4, piece.shape[0] // 4), interpolation=cv2.INTER_AREA)
    description = f"Aperio Image Library v12.0.0\r\n{columns * native}x{columns * native}|MPP = {mpp:g}"
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for image, edge in ((piece, columns * native), (quarter, columns * native // 4)):
            tables, streams = b"", {}
            corners = [(x, y) for y in range(0, edge, native) for x in range(0, edge, native)]
            places = [(x % image.shape[1], y % image.shape[0]) for x, y in corners]
            for x, y in set(places):
                down, across = (np.arange(native) + y) % image.shape[0], (np.arange(native) + x) % image.shape[1]
                tile = image[np.ix_(down, across)]
                tables, streams[x, y] = apart(simplejpeg.encode_jpeg(tile, quality=quality, colorsubsampling="420"))
            file.write(
                (streams[place] for place in places),
                shape=(edge, edge, 3),
                dtype="uint8",
                tile=(native, native),
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                jpegtables=tables,
                description=description,
                metadata=None,
                software=False,
            )


def apart(stream: bytes) -> tuple[bytes, bytes]:
    """A JPEG stream's tables, and the rest of it."""
    tables, rest, at = b"\xff\xd8", b"\xff\xd8", 2
    while stream[at + 1] != 0xDA:
        end = at + 2 + struct.unpack(">H", stream[at + 2 : at + 4])[0]
        if stream[at + 1] in (0xDB, 0xC4):
            tables += stream[at:end]
        elif stream[at + 1] < 0xE0:
            rest += stream[at:end]
        at = end
    return tables + b"\xff\xd9", rest + stream[at:]


def installed(way: str) -> bool:
    try:
        if way in MODULES:
            __import__(way)
    except (ImportError, OSError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path, nargs="?")
    parser.add_argument(
        "--native", type=int, nargs="+", default=[240, 256], help="edge of the native tiles that are made"
    )
    parser.add_argument("--slide-mpp", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--workers", type=int, nargs="+", default=[1])
    parser.add_argument("--ways", nargs="+", default=[way for way in WAYS if installed(way)], choices=list(WAYS))
    parser.add_argument("--tile-px", type=int, default=256)
    parser.add_argument("--tiles", type=int)
    parser.add_argument("--columns", type=int, default=32, help="native tiles side by side in the slides that are made")
    parser.add_argument("--quality", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        slides = (
            [arguments.slide] if arguments.slide else [Path(folder) / f"{native}.svs" for native in arguments.native]
        )
        for path, native in zip(slides, arguments.native, strict=False):
            if not arguments.slide:
                write_jpeg_slide(path, native, 0.5, arguments.columns, arguments.quality)
            size = path.stat().st_size
            print(f"\n{path.name}: {size / 1e6:,.0f} MB")
            for slide_mpp in arguments.slide_mpp:
                measure(path, slide_mpp, arguments)


if __name__ == "__main__":
    main()

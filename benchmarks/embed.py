"""Tiles per second from slide files to embeddings: the usual way and Longslide's, side by side in one run.

    python benchmarks/embed.py [--tile-encoders gigapath uni kaiko-vits16] [--precisions float16 float8] [--tiles 40000]

The usual way is a `DataLoader` of 12 worker processes that read tiles with OpenSlide and transform them with Pillow and
torchvision's arithmetic, batches of 64, float16 autocast. Ours is what `longslide embed` runs, without finding tissue: one
slide, then as many tiles in slides of 300, open already. The slides are SVS files of JPEG tiles of 256 px, about 15 KiB each
(quality 85). Weights are random, with LayerScale at 0.1 to 1. GPU idle is the share of the wall time in which no batch is in
work. Compiling is not counted.

H100 (80 GB), 16 cores, torch 2.11, float16, tiles/s (usual way, one slide, ratio, GPU idle; slides of 300):
    kaiko-vits16   2,421   12,944   5.35   50.3%    7,600
    uni            2,177    3,385   1.55    1.8%    3,395
    gigapath         737    1,098   1.49    3.3%    1,097
and reading alone 18,000 to 23,000.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import tifffile
import torch
from longslide import open_slide
from longslide.data.slides.slide import Slide
from longslide.data.synthetic import write_synthetic_slide
from longslide.data.tiles.grid import Grid, make_grid
from longslide.data.tiles.readers import TileReaders
from longslide.data.tiles.stream import TileStream
from longslide.data.tissue.base import Tissue
from longslide.models.tile_encoder.encoder import TileEncoder, build_network
from longslide.models.tile_encoder.engine import TileEngine
from longslide.models.tile_encoder.float8 import fidelity
from longslide.models.tile_encoder.spec import TileEncoderSpec, load_tile_encoder_spec
from longslide.pipeline.embed.tile_embedding import TileEmbedder, resolve_device
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

NATIVE = 256


def write_jpeg_slide(path: Path, tiles: int) -> float:
    """A slide of so many native tiles and more, in rows of 64, and the mean KiB of one."""
    encoded = []
    with tempfile.TemporaryDirectory() as folder:
        with open_slide(write_synthetic_slide(Path(folder) / "piece.svs", size=(4096, 4096))) as slide:
            piece = slide.read_region(0, 0, 0, 4096, 4096)
        piece = np.clip(piece + np.random.default_rng(0).normal(0, 9, piece.shape), 0, 255).astype(np.uint8)
        with tifffile.TiffWriter(Path(folder) / "piece.tif") as tif:
            tif.write(
                piece, tile=(NATIVE, NATIVE), photometric="rgb", compression="jpeg", compressionargs={"level": 85}
            )
        with tifffile.TiffFile(Path(folder) / "piece.tif") as written:
            page: Any = written.pages[0]
            for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True):
                written.filehandle.seek(offset)
                encoded.append(written.filehandle.read(size))
    across, rows = 64, -(-tiles // 64)

    def segments() -> Iterator[bytes]:
        for i in range(across * rows):
            yield encoded[i % len(encoded)]

    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        tif.write(
            segments(), shape=(rows * NATIVE, across * NATIVE, 3), dtype=np.uint8, tile=(NATIVE, NATIVE),
            photometric="rgb", compression="jpeg", description="Aperio Image Library v12\nbenchmark|AppMag = 20|MPP = 0.5",
            metadata=None,
        )  # fmt: skip
    return float(np.mean([len(one) for one in encoded])) / 1024


def whole_grid(slide: Slide, spec: TileEncoderSpec, tiles: int) -> Grid:
    width, height = slide.dimensions
    everywhere = Tissue(np.ones((height // 64, width // 64), bool), (64, 64), "all")
    grid = make_grid(slide, everywhere, tile_mpp=0.5, tile_px=spec.tile_px)
    return type(grid)(**vars(grid) | {"coords": grid.coords[:tiles]})


def random_encoder(name: str, device: torch.device) -> TileEncoder:
    spec = load_tile_encoder_spec(name)
    torch.manual_seed(0)
    with device:
        network = build_network(spec)
        for key, parameter in network.named_parameters():
            if key.endswith("gamma"):
                torch.nn.init.uniform_(parameter, 0.1, 1)
    return TileEncoder(spec, network, "random").eval()


class UsualTiles(Dataset[Tensor]):
    """Tiles as most scripts read them."""

    def __init__(self, path: Path, grid: Grid, spec: TileEncoderSpec) -> None:
        self.path, self.grid, self.spec = path, grid, spec

    @cached_property
    def slide(self) -> openslide.OpenSlide:
        return openslide.OpenSlide(self.path)

    def __len__(self) -> int:
        return len(self.grid.coords)

    def __getitem__(self, row: int) -> Tensor:
        spec, read_px = self.spec, self.grid.read_px
        corner = tuple(self.grid.coords[row].tolist())
        image = self.slide.read_region(corner, self.grid.level, (read_px, read_px)).convert("RGB")
        if image.size != (spec.resize, spec.resize):
            image = image.resize((spec.resize, spec.resize), Image.Resampling.BICUBIC)
        margin = (spec.resize - spec.crop) // 2
        image = image.crop((margin, margin, margin + spec.crop, margin + spec.crop))
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
        return tensor.sub_(torch.tensor(spec.mean)[:, None, None]).div_(torch.tensor(spec.std)[:, None, None])


@torch.inference_mode()
def usual_way(path: Path, grid: Grid, encoder: TileEncoder, device: torch.device, workers: int) -> float:
    loader = DataLoader(UsualTiles(path, grid, encoder.spec), batch_size=64, num_workers=workers, pin_memory=True)
    started, first, found = 0.0, 0, []
    for i, images in enumerate(loader):
        with torch.autocast(device.type, torch.float16):
            embeddings = encoder._pool(images.to(device, non_blocking=True))
        found.append(embeddings.float().cpu())
        if i == 7:  # the workers run
            started, first = time.perf_counter(), 8 * 64
    return (len(grid.coords) - first) / (time.perf_counter() - started)


class TimedEngine(TileEngine):
    """Remembers when batches were in work."""

    marks: list[Any]

    def __call__(self, tiles: Tensor) -> Tensor:
        self.marks.append(self.now())
        embeddings = super().__call__(tiles)
        self.marks.append(self.now())
        return embeddings

    def now(self) -> Any:
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def idle(self, wall: float) -> float:
        torch.cuda.synchronize()
        busy = sum(a.elapsed_time(b) for a, b in zip(self.marks[::2], self.marks[1::2], strict=True))
        return float(1 - busy / 1000 / wall)


def ours(
    embedder: TileEmbedder, engine: TimedEngine, streams: list[TileStream], threads: int
) -> tuple[float, float, np.ndarray]:
    """Tiles per second, idle share, and the first slide's embeddings."""
    engine.marks = []
    with TileReaders(threads) as readers:
        # A first slide starts the readers; the clock runs from the second on.
        found, started = [], 0.0
        for i, (_, embedded) in enumerate(embedder(enumerate(streams), readers)):
            assert isinstance(embedded, tuple), embedded
            found.append(embedded.embeddings)
            if i == 0:
                started, engine.marks = time.perf_counter(), engine.marks[len(engine.marks) :]
        wall = time.perf_counter() - started
    return sum(map(len, found[1:])) / wall, engine.idle(wall), found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tile-encoders", nargs="+", default=["kaiko-vits16", "uni", "gigapath"])
    parser.add_argument("--precisions", nargs="+", default=["float16", "float8"])
    parser.add_argument("--tiles", type=int, default=40_000)
    parser.add_argument("--seconds", type=float, default=12, help="about how long a run may take: fewer tiles are read")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=12)
    options = parser.parse_args()
    device = resolve_device("cuda")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.svs"
        size = write_jpeg_slide(path, options.tiles)
        print(
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {os.cpu_count()} cores; {size:.1f} KiB a tile"
        )
        for name in options.tile_encoders:
            run(name, path, device, options)


def run(name: str, path: Path, device: torch.device, options: argparse.Namespace) -> None:
    encoder = random_encoder(name, device)
    with open_slide(path) as slide:
        print(f"\n{name}, slide read by {slide.reader}", flush=True)
        piece = whole_grid(slide, encoder.spec, 2000)
        speed = usual_way(path, piece, encoder, device, options.workers)
        piece = whole_grid(slide, encoder.spec, min(options.tiles, int(speed * options.seconds)))
        usual = usual_way(path, piece, encoder, device, options.workers)
        grid = whole_grid(slide, encoder.spec, min(options.tiles, int(4 * usual * options.seconds)))
        print(f"{'the usual way':28} {usual:9,.0f} tiles/s", flush=True)

        def stream(coords: np.ndarray) -> TileStream:
            return TileStream(slide, type(grid)(**vars(grid) | {"coords": coords}))

        for precision in options.precisions:
            embedder = TileEmbedder(encoder, device, precision)
            embedder.engine = engine = TimedEngine(encoder, device, precision)
            engine.marks = []

            tiles = np.concatenate([b.tiles for b in stream(grid.coords[:512])])
            try:
                list(engine.stream([tiles]))  # compiled
                found = fidelity(
                    engine(torch.from_numpy(tiles)).float(), engine.exact(torch.from_numpy(tiles).to(device))
                )
                warm = stream(grid.coords[:1024])
                one, idle, _ = ours(embedder, engine, [warm, stream(grid.coords)], options.threads)
                with small_slides(path, grid) as few:
                    many, many_idle, _ = ours(embedder, engine, [warm, *few], options.threads)
            except Exception as error:
                print(f"{precision:28} {' '.join(str(error).split())[:220]}", flush=True)
                continue
            print(
                f"{precision:28} {one:9,.0f} tiles/s = {one / usual:.2f} x, GPU idle {idle:.1%}; slides of 300 tiles "
                f"{many:,.0f} = {many / one:.1%}, idle {many_idle:.1%}; {found}",
                flush=True,
            )
        with TileReaders(options.threads) as readers:
            for batch in stream(grid.coords[:2048]).read_by(readers):  # they start
                batch.release()
            start = time.perf_counter()
            for batch in stream(grid.coords).read_by(readers):
                batch.release()
        print(f"{'reading alone':28} {len(grid.coords) / (time.perf_counter() - start):9,.0f} tiles/s", flush=True)


@contextmanager
def small_slides(path: Path, grid: Grid) -> Iterator[list[TileStream]]:
    """The tiles in slides of 300, each a file of its own."""
    with ExitStack() as resources:
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory(dir=path.parent)))
        streams = []
        for i, coords in enumerate(np.split(grid.coords, range(300, len(grid.coords), 300))):
            os.link(path, folder / f"{i}.svs")
            slide = resources.enter_context(open_slide(folder / f"{i}.svs"))
            streams.append(TileStream(slide, type(grid)(**vars(grid) | {"coords": coords})))
        yield streams


if __name__ == "__main__":
    main()

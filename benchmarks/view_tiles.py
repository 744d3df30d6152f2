"""How long the viewer takes for a tile: random tiles of every level of a slide, asked for by two threads.

    python benchmarks/view_tiles.py slide.svs

Cold, a process of the viewer reads, cuts and compresses the tile; warm, the viewer has it already. The clock's time is that
of an idle machine only; the processor's time is that of drawing the tile in this process.
"""

import argparse
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from longslide import open_slide
from longslide.pipeline.view import pictures
from longslide.pipeline.view.open_slides import OpenSlides
from longslide.pipeline.view.pictures import TILE_PX, SlideFile, finest_level

Ask = Callable[[tuple[int, int]], object]


def milliseconds(ask: Ask, clock: Callable[[], float], places: list[tuple[int, int]], pool: ThreadPoolExecutor) -> str:
    """Median, 90th and 99th percentile."""

    def timed(place: tuple[int, int]) -> float:
        begun = clock()
        assert ask(place)
        return 1000 * (clock() - begun)

    return "".join(f"{one:7.1f}" for one in np.quantile(list(pool.map(timed, places)), [0.5, 0.9, 0.99]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--tiles", type=int, default=300, help="tiles of each level, at most")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    with open_slide(given.slide) as slide:
        size = slide.dimensions
        print(f"{slide!r}, downsamples {', '.join(f'{one:.4g}' for one in slide.level_downsamples)}")
    slides, file = OpenSlides(600), SlideFile(given.slide.absolute())
    started = time.perf_counter()
    slides.facts(file)
    print(f"starting a process and opening the slide: {time.perf_counter() - started:.2f} s", end="; ")
    started = time.perf_counter()
    slides.tile(file, 0, 0, 0)
    print(f"the first tile, with the overview: {time.perf_counter() - started:.2f} s; load {os.getloadavg()[0]:.1f}")
    chance = random.Random(0)
    finest = finest_level(size)
    print("level-0 pixels a pixel | tiles | median, 90th and 99th percentile of ms a tile: cold | warm | processor")
    pictures.tile(file, 0, 0, 0)
    with ThreadPoolExecutor(given.threads) as pool, ThreadPoolExecutor(1) as alone:
        for level in range(finest, 0, -1):
            columns, rows = (-(-edge // (2 ** (finest - level) * TILE_PX)) for edge in size)
            places = [(column, row) for column in range(columns) for row in range(rows)]
            places = chance.sample(places, min(given.tiles, len(places)))

            def kept(place: tuple[int, int], level: int = level) -> object:
                return slides.tile(file, level, *place)

            def drawn(place: tuple[int, int], level: int = level) -> object:
                return pictures.tile(file, level, *place)

            cold, warm = (milliseconds(kept, time.perf_counter, places, pool) for _ in range(2))
            processor = milliseconds(drawn, time.thread_time, places, alone)
            print(f"{2 ** (finest - level):6} | {len(places):5} | {cold} | {warm} | {processor}")
    print(f"load {os.getloadavg()[0]:.1f}")
    slides.close()


if __name__ == "__main__":
    main()

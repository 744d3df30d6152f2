"""How long the viewer takes for a tile: random tiles of every level of a slide, asked for by two threads.

    python benchmarks/view_tiles.py slide.svs

The clock's time is that of an idle machine only; the processor's time is that of the thread that makes the tile.
"""

import argparse
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from longslide import open_slide
from longslide.pipeline.view.open_slides import TILE_PX, OpenSlides, SlideFile, finest_level


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--tiles", type=int, default=300, help="tiles of each level, at most")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    with open_slide(given.slide) as slide:
        size = slide.dimensions
        print(f"{slide!r}, downsamples {', '.join(f'{one:.4g}' for one in slide.level_downsamples)}")
    slides, file = OpenSlides(), SlideFile(given.slide.absolute())
    started = time.perf_counter()
    slides.tile(file, 0, 0, 0)
    print(f"opening, and the overview: {time.perf_counter() - started:.2f} s, once a slide")
    chance = random.Random(0)
    finest = finest_level(size)
    print("level-0 pixels a pixel | tiles | median, 90th and 99th percentile of ms a tile: clock | processor")
    with ThreadPoolExecutor(given.threads) as pool:
        for level in range(finest, 0, -1):
            columns, rows = (-(-edge // (2 ** (finest - level) * TILE_PX)) for edge in size)
            places = [(column, row) for column in range(columns) for row in range(rows)]
            places = chance.sample(places, min(given.tiles, len(places)))

            def ask(place: tuple[int, int], level: int = level) -> tuple[float, float]:
                begun, worked = time.perf_counter(), time.thread_time()
                assert slides.tile(file, level, *place)
                return 1000 * (time.perf_counter() - begun), 1000 * (time.thread_time() - worked)

            taken = np.quantile(list(pool.map(ask, places)), [0.5, 0.9, 0.99], axis=0)
            clock, processor = ("".join(f"{one:7.1f}" for one in column) for column in taken.T)
            print(f"{2 ** (finest - level):6} | {len(places):5} | {clock} | {processor}")
    slides.close()


if __name__ == "__main__":
    main()

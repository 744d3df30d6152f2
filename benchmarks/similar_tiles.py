"""How long the tiles most like one take to find among a million, and whether they are the right ones.

    python benchmarks/similar_tiles.py [--tiles 1000000] [--dim 384] [--slides 100] [--folder /scratch]

Draws embeddings that lie as close together as those of real encoders (a common mean, kinds of tissue, noise), writes them as
feature files, makes the index, and searches it. Some of the results are held against the float64 cosines of all tiles.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from longslide import Features, TileIndex, write_features

CHECKED = 2


def draw(random: np.random.Generator, kinds: np.ndarray, tiles: int) -> np.ndarray:
    """`(tiles, D)` float16: a mean of all, one of 40 kinds of tissue, and noise; cosines of 0.5 to 0.95."""
    noise = random.standard_normal((tiles, kinds.shape[1]), np.float32)
    embeddings: np.ndarray = 1 + kinds[random.integers(len(kinds), size=tiles)] + 0.5 * noise
    return embeddings.astype(np.float16)


def write(folder: Path, tiles: int, dim: int, slides: int) -> None:
    random = np.random.default_rng(0)
    kinds = random.standard_normal((40, dim), np.float32)
    each = tiles // slides
    side = int(each**0.5) + 1
    coords = np.stack([np.arange(each) % side, np.arange(each) // side], 1) * 512
    for number in range(slides):
        name = f"slide-{number:05d}"
        write_features(folder / f"{name}.h5", Features(name, draw(random, kinds, each), coords, 512, 512, 256, 0, 0.5))


def check(index: TileIndex, row: int, found: list[float]) -> None:
    """Hold the cosines found against those of all tiles."""
    query = index.embeddings[row].double()
    query /= query.norm()
    parts = []
    for part in torch.split(index.embeddings, 20_000):
        vectors = part.double()
        parts.append((vectors @ query) / vectors.norm(dim=1))
    cosines = torch.cat(parts)
    cosines[row] = -torch.inf
    wanted = torch.topk(cosines, len(found)).values
    assert torch.allclose(wanted, torch.tensor(found, dtype=torch.float64), atol=1e-12, rtol=0), row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--slides", type=int, default=100)
    parser.add_argument("--queries", type=int, default=30)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write(folder, options.tiles, options.dim, options.slides)
        start = time.perf_counter()
        TileIndex.open(folder)
        print(f"index made in {time.perf_counter() - start:.1f} s")
        start = time.perf_counter()
        index = TileIndex.open(folder)
        print(f"{index!r}, {index.embeddings.dtype}; opened in {time.perf_counter() - start:.2f} s")
        random = np.random.default_rng(1)
        seconds, of_cores = [], []
        for number, row in enumerate(random.integers(len(index), size=options.queries).tolist()):
            slide = int(np.searchsorted(index.offsets, row, side="right")) - 1
            start, busy = time.perf_counter(), time.process_time()
            found = index.similar(index.slide_ids[slide], row - int(index.offsets[slide]))
            seconds.append(time.perf_counter() - start)
            of_cores.append(time.process_time() - busy)
            if number < CHECKED:
                check(index, row, [one.similarity for one in found])
        print(
            f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, {len(seconds)} searches: median "
            f"{np.median(seconds):.3f} s, slowest {max(seconds):.3f} s, {np.median(of_cores):.3f} s of a core; {CHECKED} of "
            "them equal to the float64 cosines of all tiles; last cosines "
            f"{found[0].similarity:.3f} to {found[-1].similarity:.3f}"
        )


if __name__ == "__main__":
    main()

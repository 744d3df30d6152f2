"""Embed slides that are damaged at random: each must end as done or failed, and none may take the batch with it.

    python benchmarks/damaged_slides.py [--count 1000] [--seed 0] [--keep FOLDER]

Damage by a seed: bytes of the header and of the tag directories, bytes anywhere, runs of zeros, cut ends; in JPEG (Aperio
and generic), deflate, LZW and JPEG 2000 TIFFs and, with LONGSLIDE_TEST_CASES, in a DICOM series. One command embeds them by
an untrained tiny network, and its table is compared with what the whole slides give: tiles lost without a word, and features
that are others. The largest memory of a process and the longest time of a slide that was done are shown.
"""

import argparse
import csv
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import tifffile
from longslide import read_features
from longslide.data.slides.slide import open_slide
from longslide.data.synthetic import write_synthetic_slide

SIZE = (896, 672)
APERIO = f"Aperio Image Library v12.0.0\r\n{SIZE[0]}x{SIZE[1]}|AppMag = 20|MPP = 0.5"


def write(path: Path, levels: list[np.ndarray], compression: str) -> None:
    """A pyramid of native tiles of 224 or 240 px; `.svs` is Aperio's."""
    aperio = path.suffix == ".svs"
    tile = 240 if aperio else 224
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(levels):
            how: dict[str, Any] = {
                "tile": (tile, tile),
                "resolution": (20_000, 20_000),
                "resolutionunit": "CENTIMETER",
                "subfiletype": int(number > 0 and not aperio),
                "description": APERIO if aperio else None,
                "metadata": None,
            }
            if compression != "jpeg":
                file.write(level, photometric="rgb", compression=compression, **how)
                continue
            padded = np.pad(level, ((0, -level.shape[0] % tile), (0, -level.shape[1] % tile), (0, 0)), mode="edge")
            tiles = (
                np.ascontiguousarray(padded[y : y + tile, x : x + tile])
                for y in range(0, padded.shape[0], tile)
                for x in range(0, padded.shape[1], tile)
            )
            streams = (simplejpeg.encode_jpeg(one, quality=80, colorsubsampling="420") for one in tiles)
            how |= {"shape": level.shape, "dtype": "uint8", "subsampling": (2, 2)}
            file.write(streams, photometric="ycbcr", compression="jpeg", **how)


def directories(content: bytes) -> list[tuple[int, int]]:
    """(first byte, bytes) of a TIFF's header and tag directories; of anything else the first 4 KB."""
    if content[:4] != b"II*\0":
        return [(0, min(4096, len(content)))]
    places, at = [(0, 8)], struct.unpack_from("<I", content, 4)[0]
    while at:
        count = struct.unpack_from("<H", content, at)[0]
        places.append((at, 2 + 12 * count + 4))
        at = struct.unpack_from("<I", content, at + 2 + 12 * count)[0]
    return places


def in_the_directory(content: bytearray, rng: np.random.Generator) -> None:
    places = directories(bytes(content))
    for _ in range(int(rng.integers(1, 6))):
        first, count = places[int(rng.integers(len(places)))]
        content[first + int(rng.integers(count))] = int(rng.integers(256))


def anywhere(content: bytearray, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(1, 40))):
        content[int(rng.integers(len(content)))] = int(rng.integers(256))


def zeros(content: bytearray, rng: np.random.Generator) -> None:
    first, count = int(rng.integers(len(content))), int(2 ** rng.uniform(4, 16))
    content[first : first + count] = bytes(len(content[first : first + count]))


def cut(content: bytearray, rng: np.random.Generator) -> None:
    del content[int(rng.integers(1, len(content))) :]


DAMAGE: tuple[Callable[[bytearray, np.random.Generator], None], ...] = (in_the_directory, anywhere, zeros, cut)


def make_whole(folder: Path) -> list[Path]:
    """The slides before they are damaged: files, and a folder for a series."""
    folder.mkdir()
    with open_slide(write_synthetic_slide(folder / "drawn.tif", size=SIZE, seed=1)) as slide:
        image = slide.read_region(0, 0, 0, *SIZE)
    (folder / "drawn.tif").unlink()
    levels = [image, np.ascontiguousarray(image[::2, ::2])]
    kinds = {"aperio.svs": "jpeg", "jpeg.tif": "jpeg", "deflate.tif": "zlib", "lzw.tif": "lzw", "j2k.tif": "jpeg2000"}
    for name, compression in kinds.items():
        write(folder / name, levels, compression)
    slides = [folder / name for name in kinds]
    cases = Path(os.environ.get("LONGSLIDE_TEST_CASES", "")) / "dicom_two_series"
    if os.environ.get("LONGSLIDE_TEST_CASES") and cases.is_dir():
        series = folder / "dicom"
        series.mkdir()
        for file in cases.glob("s1_*.dcm"):
            shutil.copyfile(file, series / file.name)
        slides.append(series)
    return slides


def make_damaged(slides: list[Path], folder: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(count):
        whole, damage = slides[number % len(slides)], DAMAGE[number // len(slides) % len(DAMAGE)]
        if whole.is_dir():
            path = folder / f"{number:04d}_{whole.name}_{damage.__name__}"
            path.mkdir()
            files = [shutil.copyfile(file, path / f"{path.name}_{file.name}") for file in sorted(whole.iterdir())]
            path = files[int(rng.integers(len(files)))]
        else:
            path = folder / f"{number:04d}_{whole.stem}_{damage.__name__}{whole.suffix}"
            shutil.copyfile(whole, path)
        content = bytearray(path.read_bytes())
        damage(content, rng)
        path.write_bytes(content)


def embed(slides: Path, output: Path) -> tuple[int, float]:
    """Exit status and seconds."""
    started = time.perf_counter()
    words = ["--tile-encoder", "vit_tiny_patch16_224", "--tile-checkpoint", "random", "--tile-px", "224"]
    command = [sys.executable, "-m", "longslide", "embed", str(slides), "--output", str(output), *words]
    with (output.parent / f"{output.name}.log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, check=False)
    return done.returncode, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder in which everything is kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        slides = make_whole(folder / "whole")
        make_damaged(slides, folder / "slides", arguments.count, arguments.seed)
        embed(folder / "whole", folder / "reference")
        status, seconds = embed(folder / "slides", folder / "features")
        report(folder, status, seconds, arguments.count)


def report(folder: Path, status: int, seconds: float, count: int) -> None:
    whole = {path.stem: read_features(path) for path in (folder / "reference").glob("*.h5")}
    with (folder / "features" / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    ends: Counter[str] = Counter()
    for row in rows:
        kind = row["slide_id"].split("_")[1]
        ends[f"{row['status']}"] += 1
        if "\n" in row["reason"] or (row["status"] == "failed" and not row["reason"]):
            ends["failed without a line of its own"] += 1
        if row["status"] == "skipped" or not row["features"]:
            continue
        features, reference = read_features(row["features"]), whole[kind]
        places = {place: number for number, place in enumerate(map(tuple, reference.coords.tolist()))}
        common = [(i, places[one]) for i, one in enumerate(map(tuple, features.coords.tolist())) if one in places]
        if len(features.coords) + int(row["bad_tiles"] or 0) < len(reference.coords):
            ends[f"done, tiles lost without a word ({kind})"] += 1
            print("lost", row["slide_id"], len(features.coords), "of", len(reference.coords), row["reason"])
        a, b = (np.array(numbers, int) for numbers in zip(*common, strict=True)) if common else (np.zeros(0, int),) * 2
        equal = np.allclose(features.features[a], reference.features[b], rtol=1e-3, atol=1e-3)
        ends["done, features equal" if equal and len(a) == len(features.coords) else f"done, others ({kind})"] += 1
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{count} slides in {seconds:,.0f} s, exit status {status}, {len(rows)} rows; largest process {peak:.2f} GB")
    slowest = max((float(row["seconds"]) for row in rows if row["seconds"]), default=0)
    print(f"slowest slide that was done: {slowest:.1f} s")
    for what, number in sorted(ends.items()):
        print(f"{number:6d} {what}")


if __name__ == "__main__":
    main()

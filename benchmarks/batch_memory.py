"""Peak memory of `longslide embed` over slides that take much: large plain images, masks, striped TIFFs, damaged slides.

    python benchmarks/batch_memory.py [--megapixels 240] [--keep FOLDER]

Pictures as large as they may be are made once in each format (with --keep they are found again), with a tissue mask of 900
million pixels, damaged and intact SVS files (of LONGSLIDE_TEST_SLIDES, else drawn) and a TIFF of one strip. They are
embedded on the CPU by a tiny encoder, as one folder. The memory of the command and of the processes below it is summed ten
times a second, pages that they share once (PSS), and so is what each process holds at most (VmHWM). The exit status is 1
where the sum is above 3 GB or an intact slide is not done.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from damaged_slides import ENCODER  # type: ignore[import-not-found]
from longslide import write_synthetic_slide
from PIL import Image

MOST = 3e9

# Name, share of the largest picture that it may have in this format, options of Pillow.
PICTURES: list[tuple[str, float, dict[str, Any]]] = [
    ("a.png", 1.0, {"compress_level": 1}),
    ("b.jpg", 1.0, {"quality": 80}),
    ("c_progressive.jpg", 0.6, {"quality": 80, "progressive": True, "subsampling": 0}),
    ("d.jp2", 0.3, {"quality_mode": "rates", "quality_layers": [20]}),
    ("e.webp", 0.375, {"quality": 50, "method": 0}),
    ("f.bmp", 1.0, {}),
    ("g_striped.tif", 1.0, {"compression": "tiff_lzw"}),
    ("i.png", 1.0, {"compress_level": 1}),
    ("j.jpg", 1.0, {"quality": 80}),
]


def picture(pixels: float) -> np.ndarray:
    """Glass with a little tissue, of so many pixels."""
    width = round((pixels * 1.25) ** 0.5)
    height = int(pixels / width)
    image = np.full((height, width, 3), 240, np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = write_synthetic_slide(Path(folder) / "a.tif", size=(2048, 2048), seed=1)
        tissue = tifffile.imread(path)
    for corner in ((height // 4, width // 4), (height // 2, width // 2)):
        y, x = corner
        image[y : y + 2048, x : x + 2048] = tissue[: height - y, : width - x]
    return image


def write_slides(folder: Path, pixels: float) -> None:
    """The slides, where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, share, options in PICTURES:
        if not (folder / name).exists():
            Image.fromarray(picture(pixels * share)).save(folder / name, **options)
    if not (folder / "h_one_strip.tif").exists():
        image = picture(pixels * 0.75)
        tifffile.imwrite(
            folder / "h_one_strip.tif", image, compression="zlib", photometric="rgb", rowsperstrip=len(image)
        )
    real = Path(os.environ.get("LONGSLIDE_TEST_SLIDES", "")) / "CMU-1-Small-Region.svs"
    whole = folder / "k_whole.svs"
    if not whole.exists():
        if real.is_file():
            shutil.copyfile(real, whole)
        else:
            write_synthetic_slide(whole, size=(8192, 8192), seed=2)
    content = whole.read_bytes()
    rng = np.random.default_rng(0)
    for number in range(20):
        damaged = bytearray(content)
        start = int(rng.integers(len(content) // 4, len(content)))
        damaged[start : start + 200_000] = bytes(len(damaged[start : start + 200_000]))
        (folder / f"l_damaged_{number:02d}.svs").write_bytes(damaged if number % 2 else damaged[: start + 1])
    if not (folder / "mask.png").exists():
        mask = np.zeros((30_000, 30_000), np.uint8)
        cv2.circle(mask, (12_000, 15_000), 6_000, 255, -1)
        cv2.imwrite(str(folder / "mask.png"), mask)
    write_synthetic_slide(folder / "m_masked.svs", size=(4096, 4096), seed=3)


def tree_of(process: int) -> list[int]:
    """A process and those below it."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def kilobytes(process: int, file: str, name: str) -> int:
    """A line of a file in /proc."""
    try:
        for line in Path(f"/proc/{process}/{file}").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def main() -> int:
    """Run the benchmark; 1 if something is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--megapixels", type=float, default=240.0, help="pixels of the largest plain images, in millions"
    )
    parser.add_argument("--keep", type=Path, help="folder for the slides")
    options = parser.parse_args()
    home = options.keep or Path(tempfile.mkdtemp(prefix="memory-"))
    try:
        return benchmark(home, options.megapixels * 1e6)
    finally:
        if options.keep is None:
            shutil.rmtree(home, ignore_errors=True)


def benchmark(home: Path, pixels: float) -> int:
    """Write, embed, print."""
    slides, output = home / "slides", home / "out"
    write_slides(slides, pixels)
    shutil.rmtree(output, ignore_errors=True)
    (home / "tiny.yaml").write_text(ENCODER)
    names = sorted(path.name for path in slides.iterdir() if path.name != "mask.png")
    with (home / "slides.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide", "slide_mpp", "tissue_mask"])
        for name in names:
            masked = name.startswith("m_")
            writer.writerow([f"slides/{name}", 0.5, "slides/mask.png" if masked else ""])
    words = [sys.executable, "-m", "longslide", "embed", str(home / "slides.csv"), "--output", str(output)]
    words += ["--tile-encoder", str(home / "tiny.yaml"), "--tile-checkpoint", "random", "--device", "cpu"]
    words += ["--slide-timeout", "3600"]
    peak, at = 0, 0.0
    most: dict[int, int] = {}
    began = time.monotonic()
    with subprocess.Popen(words) as process:
        ended = threading.Event()

        def watch() -> None:
            nonlocal peak, at
            while not ended.wait(0.1):
                tree = tree_of(process.pid)
                total = sum(kilobytes(one, "smaps_rollup", "Pss") for one in tree)
                if total > peak:
                    peak, at = total, time.monotonic() - began
                for one in tree:
                    most[one] = max(most.get(one, 0), kilobytes(one, "status", "VmHWM"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        process.wait()
        ended.set()
        watcher.join()
    with (output / "summary.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lost = [row["slide_id"] for row in rows if row["status"] != "done" and "damaged" not in row["slide_id"]]
    ends = [row["status"] for row in rows]
    counts = ", ".join(f"{ends.count(end)} {end}" for end in sorted(set(ends)))
    largest = ", ".join(f"{size / 1e6:.2f}" for size in sorted(most.values(), reverse=True)[:4])
    print(f"{len(rows)} slides in {time.monotonic() - began:.0f} s: {counts}")
    print(f"peak of the command and its processes {peak / 1e6:.2f} GB (PSS) at {at:.0f} s")
    print(f"largest processes (VmHWM) {largest} GB")
    for name in lost:
        print(f"not done: {name}: {next(row['reason'] for row in rows if row['slide_id'] == name)}")
    held = peak * 1024 <= MOST
    print(f"{'held  ' if held else 'BROKEN'}  at most {MOST / 1e9:g} GB")
    return 0 if held and not lost else 1


if __name__ == "__main__":
    sys.exit(main())

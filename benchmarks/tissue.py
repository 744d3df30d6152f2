"""Intersection over union of the tissue found with the tissue drawn, for the kinds of tests/data/tissue/drawn_slides.py.

    python benchmarks/tissue.py [--seeds 6] [--first-seed 12] [--slide CMU-1-Small-Region.svs] [--width 2048]
        [--against COMMIT] [kind ...]

With `--slide` every third seed has the texture of the tissue in the middle of that slide; with `--width` all are so many
pixels wide, at 10 um/px. With `--against` the finder of another commit has its turn on each picture too, in the same
process: its overlap, its time, and how many times as long it takes. Cores of the CPU do not count: OpenCV runs on one
thread, and milliseconds are of processor time, for one picture.
"""

import argparse
import importlib
import importlib.util
import io
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from longslide import open_slide
from longslide.data.tissue.optical_density import segment_tissue

DRAWN = Path(__file__).parents[1] / "tests" / "data" / "tissue" / "drawn_slides.py"


def load_generator() -> Any:
    spec = importlib.util.spec_from_file_location("drawn_slides", DRAWN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["drawn_slides"] = module
    spec.loader.exec_module(module)
    return module


def finder_of(commit: str, folder: Path) -> Callable[..., np.ndarray]:
    """The finder of another commit, under a name of its own; what it imports of the rest is of that commit too."""
    root = Path(__file__).parents[1]
    archive = subprocess.run(
        ["git", "-C", str(root), "archive", commit, "data", "errors.py", "registry.py"], capture_output=True, check=True
    )
    (folder / "other_longslide").mkdir()
    (folder / "other_longslide" / "__init__.py").touch()
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder / "other_longslide", filter="data")
    sys.path.insert(0, str(folder))
    finder: Callable[..., np.ndarray] = importlib.import_module(
        "other_longslide.data.tissue.optical_density"
    ).segment_tissue
    return finder


def overlap(found: np.ndarray, truth: np.ndarray) -> float:
    union = np.count_nonzero(found | truth)
    return np.count_nonzero(found & truth) / union if union else 1.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--seeds", type=int, default=6, help="how many")
    parser.add_argument("--first-seed", type=int, default=0, help="the finder was tuned while looking at 0 to 11")
    parser.add_argument("--slide", type=Path)
    parser.add_argument("--width", type=int)
    parser.add_argument("--against")
    given = parser.parse_args()
    cv2.setNumThreads(1)
    drawn = load_generator()
    texture = None
    if given.slide:
        with open_slide(given.slide) as slide:
            picture = slide.thumbnail(round(max(slide.dimensions) * slide.mpp.value / 10))
        height, width = picture.shape[:2]
        middle = picture[round(0.75 * height) : round(0.98 * height), round(0.36 * width) : round(0.74 * width)]
        texture = drawn.texture_of(middle)
    finders = {"": segment_tissue}
    folder = tempfile.TemporaryDirectory()
    if given.against:
        finders[given.against] = finder_of(given.against, Path(folder.name))
    for find in finders.values():
        find(np.full((64, 64, 3), 240, np.uint8), 10.0)  # what a first call takes is not counted
    for kind in given.kinds or drawn.KINDS:
        overlaps: dict[str, list[float]] = {name: [] for name in finders}
        seconds = dict.fromkeys(finders, 0.0)
        for seed in range(given.first_seed, given.first_seed + given.seeds):
            slide = drawn.draw_slide(kind, seed, texture if seed % 3 == 1 else None, given.width)
            for name, find in finders.items():
                started = time.process_time()
                found = find(slide.picture, slide.mpp)
                seconds[name] += time.process_time() - started
                overlaps[name].append(overlap(found, slide.truth))
        line = f"{kind:32s}"
        for name, of_one in overlaps.items():
            least = drawn.least_overlap(kind)
            below = sum(value < least for value in of_one)
            line += f"{name[:12]} least {min(of_one):.3f}  mean {np.mean(of_one):.3f}  "
            line += f"below {least}: {below} of {given.seeds}  {1000 * seconds[name] / given.seeds:.0f} ms  "
        if given.against:
            line += f"ratio {seconds[given.against] / seconds['']:.2f}"
        print(line.rstrip(), flush=True)
    folder.cleanup()


if __name__ == "__main__":
    main()

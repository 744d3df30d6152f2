"""Intersection over union of the tissue found with the tissue drawn, for the kinds of tests/data/tissue/drawn_slides.py.

    python benchmarks/tissue.py [--seeds 6] [--slide CMU-1-Small-Region.svs] [kind ...]

With `--slide` every third seed has the texture of the tissue in the middle of that slide. Run it in two checkouts to compare
them. Cores of the CPU do not count: OpenCV runs on one thread, and milliseconds are those of one picture.
"""

import argparse
import importlib.util
import sys
import time
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--slide", type=Path)
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
    for kind in given.kinds or drawn.KINDS:
        overlaps, seconds = [], 0.0
        for seed in range(given.seeds):
            slide = drawn.draw_slide(kind, seed, texture if seed % 3 == 1 else None)
            started = time.perf_counter()
            found = segment_tissue(slide.picture, slide.mpp)
            seconds += time.perf_counter() - started
            union = np.count_nonzero(found | slide.truth)
            overlaps.append(np.count_nonzero(found & slide.truth) / union if union else 1.0)
        below = sum(overlap < drawn.least_overlap(kind) for overlap in overlaps)
        print(
            f"{kind:32s} least {min(overlaps):.3f}  mean {np.mean(overlaps):.3f}  below {drawn.least_overlap(kind)}: "
            f"{below} of {given.seeds}  {1000 * seconds / given.seeds:.0f} ms",
            flush=True,
        )


if __name__ == "__main__":
    main()

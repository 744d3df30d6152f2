"""Masks larger than what is used of them: in little memory, in little time, and refused by name beyond that."""

import json
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from longslide.data.slides.slide import open_slide
from longslide.data.synthetic import write_synthetic_slide
from longslide.data.tissue.base import MAX_MASK_PX
from longslide.data.tissue.mask import read_tissue_mask
from longslide.errors import LongslideError
from PIL import Image

PEAK = r"""
import re, sys
from pathlib import Path
from longslide.data.slides.slide import open_slide
from longslide.data.tissue.mask import read_tissue_mask
with open_slide(sys.argv[1]) as slide:
    tissue = read_tissue_mask(sys.argv[2], slide)
    tissue.contours
    # ru_maxrss would do, but for what it takes over from the process that started this one
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    print(peak, *tissue.mask.shape, tissue.mask.mean())
"""


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "a.svs"
    write_synthetic_slide(path, size=(1024, 1024))
    return path


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_mask_of_30000_px_takes_little_memory(square: Path, tmp_path: Path) -> None:
    mask = Image.new("L", (30_000, 30_000))
    mask.paste(255, (0, 0, 15_000, 30_000))
    mask.save(tmp_path / "mask.png", compress_level=1)
    words = [sys.executable, "-c", PEAK, str(square), str(tmp_path / "mask.png")]
    peak, rows, columns, share = map(float, subprocess.check_output(words, text=True).split())
    assert peak < 1.6e9
    assert (rows, columns) == (MAX_MASK_PX, MAX_MASK_PX)
    assert share == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_a_larger_mask_is_reduced_by_the_share_that_is_tissue(mode: str, square: Path, tmp_path: Path) -> None:
    shape = np.zeros((5000, 5000), np.uint8)
    y, x = np.ogrid[:5000, :5000]
    shape[(y - 2500) ** 2 + (x - 2000) ** 2 < 1500**2] = 1
    if mode == "P":
        picture = Image.fromarray(1 - shape, "L").convert("P")
        picture.putpalette([255, 0, 0, 0, 0, 0] + [9] * 750)
    elif mode in ("RGBA", "LA"):
        picture = Image.new(mode, (5000, 5000), "white")
        picture.putalpha(Image.fromarray(shape * 255))
    elif mode == "I;16":
        picture = Image.fromarray(shape.astype(np.uint16) * 300)
    else:
        picture = Image.fromarray(shape * 255).convert(mode)
    picture.save(tmp_path / "mask.png", compress_level=1)
    with open_slide(square) as slide:
        tissue = read_tissue_mask(tmp_path / "mask.png", slide)
    assert tissue.mask.shape == (MAX_MASK_PX, MAX_MASK_PX)
    assert tissue.mask.mean() == pytest.approx(shape.mean(), rel=1e-3)
    assert tissue.downsample == (1024 / MAX_MASK_PX, 1024 / MAX_MASK_PX)


def test_a_mask_that_would_take_all_memory_is_refused_by_its_header(square: Path, tmp_path: Path) -> None:
    picture = Image.new("RGB", (10, 10))
    picture.save(tmp_path / "mask.png")
    content = bytearray((tmp_path / "mask.png").read_bytes())
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "mask.png").write_bytes(content)
    with (
        open_slide(square) as slide,
        pytest.raises(LongslideError, match=r"takes 40\.0 GB of memory; give a smaller one"),
    ):
        read_tissue_mask(tmp_path / "mask.png", slide)


def test_thousands_of_polygons_are_one_raster(tmp_path: Path) -> None:
    path = tmp_path / "wide.svs"
    write_synthetic_slide(path, size=(4096, 4096))
    features = []
    for number in range(3000):
        x, y = 70.0 * (number % 58), 70.0 * (number // 58)
        ring = [[x, y], [x + 60, y], [x + 60, y + 60], [x, y + 60], [x, y]]
        hole = [[x + 20, y + 20], [x + 40, y + 20], [x + 40, y + 40], [x + 20, y + 40], [x + 20, y + 20]]
        rings = [ring, hole] if number % 2 else [ring]
        features.append({"type": "Feature", "geometry": {"type": "Polygon", "coordinates": rings}})
    (tmp_path / "m.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    with open_slide(path) as slide:
        began = time.process_time()
        tissue = read_tissue_mask(tmp_path / "m.geojson", slide)
        assert time.process_time() - began < 3
    # Borders count as inside: 61 px squares, holes of 19.
    assert np.count_nonzero(tissue.mask) == 1500 * (61**2 + 61**2 - 19**2)


def test_a_hole_is_one_of_its_own_polygon_only(tmp_path: Path, square: Path) -> None:
    def ring(low: int, high: int) -> list[list[int]]:
        return [[low, low], [high, low], [high, high], [low, high], [low, low]]

    shapes = [[ring(100, 900), ring(300, 700)], [ring(400, 500)]]
    (tmp_path / "m.geojson").write_text(json.dumps({"type": "MultiPolygon", "coordinates": shapes}))
    with open_slide(square) as slide:
        mask = read_tissue_mask(tmp_path / "m.geojson", slide).mask
    assert [bool(mask[i, i]) for i in (50, 200, 350, 450, 600, 800, 950)] == [
        False,
        True,
        False,
        True,
        False,
        True,
        False,
    ]

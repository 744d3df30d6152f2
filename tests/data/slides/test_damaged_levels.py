"""A slide whose reduced levels are damaged loses no tissue while level 0 is whole."""

import gc
import os
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from longslide.data.slides.slide import open_slide
from longslide.data.synthetic import write_synthetic_slide
from longslide.errors import LongslideError


def damage(path: Path, level: int, every: int = 1) -> None:
    """Overwrite each `every`-th native tile of a level."""
    with tifffile.TiffFile(path) as file:
        page = [page for page in file.pages if page.is_tiled][level]
        places = list(zip(page.dataoffsets, page.databytecounts, strict=True))[::every]
    with path.open("r+b") as raw:
        for offset, count in places:
            raw.seek(offset)
            raw.write(b"\xff" * count)


def slide(path: Path) -> Path:
    return write_synthetic_slide(path, size=(4096, 3072), mpp=0.25)


def tiles_and_tissue(path: Path, mpp: float = 0.5) -> tuple[list[list[int]], float, str]:
    with open_slide(path) as opened:
        tissue = opened.tissue()
        grid = opened.tiles(mpp, 256, tissue=tissue).grid
        return grid.coords.tolist(), tissue.area_mm2(opened.mpp.value), opened.remark


@pytest.mark.parametrize("name", ["control_intact", "overview_unreadable"])
def test_the_real_slide_gives_its_tissue_with_and_without_its_overview(name: str) -> None:
    folder = os.environ.get("LONGSLIDE_TEST_CASES")
    if not folder:
        pytest.skip("LONGSLIDE_TEST_CASES, the folder with overview_unreadable.svs, is not set")
    coords, area, remark = tiles_and_tissue(Path(folder) / f"{name}.svs")
    assert len(coords) == 16
    assert area == pytest.approx(0.267, abs=0.001)
    assert remark.startswith("level 1 unreadable") == (name == "overview_unreadable")


@pytest.mark.parametrize("every", [1, 2, 5])
def test_tissue_under_a_damaged_level_comes_from_a_finer_one(tmp_path: Path, every: int) -> None:
    path = slide(tmp_path / "a.svs")
    whole = tiles_and_tissue(path)
    assert whole[2] == ""
    for level in (1, 2, 3):
        damage(path, level, every)
    damaged = tiles_and_tissue(path)
    assert damaged[0] == whole[0]
    assert damaged[1] == pytest.approx(whole[1], rel=0.02)
    assert "unreadable" in damaged[2]


def test_no_tile_is_read_from_a_damaged_level(tmp_path: Path) -> None:
    path = slide(tmp_path / "a.svs")
    with open_slide(path) as opened:
        whole = np.concatenate([batch.tiles for batch in opened.tiles(2.0, 128)])
    damage(path, 3)
    with open_slide(path) as opened:
        stream = opened.tiles(2.0, 128)
        assert stream.grid.level < 3
        damaged = np.concatenate([batch.tiles for batch in stream])
    assert damaged.shape == whole.shape
    assert np.abs(damaged.astype(int) - whole).mean() < 4


def test_a_slide_of_which_nothing_can_be_read_is_refused_by_its_levels(tmp_path: Path) -> None:
    path = write_synthetic_slide(tmp_path / "a.svs", size=(6144, 5120), mpp=0.25)
    for level in range(4):
        damage(path, level)
    with (
        open_slide(path) as opened,
        pytest.raises(LongslideError, match=r"a\.svs: almost none .* .levels 0, 1, 2, 3 damaged"),
    ):
        opened.thumbnail(512)


@pytest.mark.parametrize(("reader", "handles"), [("openslide", 1), ("tiff", 0)])
def test_a_damaged_slide_keeps_no_handles_open(tmp_path: Path, reader: str, handles: int) -> None:
    path = slide(tmp_path / "a.svs")
    damage(path, 1)
    damage(path, 2)
    with open_slide(path, reader=reader) as opened:
        opened.thumbnail(1500)
        gc.collect()
        kept = [item for item in gc.get_objects() if isinstance(item, openslide.OpenSlide) and str(path) in repr(item)]
        assert len(kept) == handles
        files = (
            [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")] if os.path.exists("/proc") else []
        )
        assert sum(os.path.exists(file) and file.resolve() == path.resolve() for file in files) < 12

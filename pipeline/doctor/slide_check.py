"""What `doctor` says of a slide: whether it opens, its tissue, how fast its tiles are read, and whether it is a copy."""

import time
from dataclasses import dataclass, replace

from ...data.slides.base import SlideReader
from ...data.slides.slide import Slide, open_slide
from ...data.slides.slide_table import SlideEntry
from ...data.tiles.grid import Grid
from ...data.tiles.stream import TileStream
from ..batch.result import SlideResult
from ..embed.layout import Tiling
from .machine_check import size

# Tiles read from each slide to time the reading: a contiguous run, as the job itself reads them.
SAMPLE_TILES = 64
# Memory of a slide without tiles that is worth a word: it is whole in memory, and so is the next one.
MUCH_MEMORY = 100e6


@dataclass(frozen=True)
class SlideCheck:
    """What `doctor` found about one slide.

    Attributes:
        slide_id: The slide's id.
        slide: Path of the slide file.
        problem: Why `embed` would fail on it or find nothing, and which other slide it is a copy of; empty when all is well.
        remark: What a person should look at: see `Slide.remark`; and much memory that it takes.
        width: Level-0 pixels.
        height: Level-0 pixels.
        levels: Pyramid levels.
        slide_mpp: Microns per pixel at level 0.
        mpp_source: Where that came from.
        tissue_mm2: Area of the tissue in square millimetres.
        tiles: Tiles that would be embedded.
        tiles_per_second: Tiles read per second.
        quickhash: Identity of the slide's image data.
        memory_bytes: Memory that the open slide takes for pixels: a plain image has no tiles, and is read whole.
    """

    slide_id: str
    slide: str
    problem: str = ""
    remark: str = ""
    width: int | None = None
    height: int | None = None
    levels: int | None = None
    slide_mpp: float | None = None
    mpp_source: str | None = None
    tissue_mm2: float | None = None
    tiles: int = 0
    tiles_per_second: float | None = None
    quickhash: str | None = None
    memory_bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether there is no problem with this slide."""
        return not self.problem


def check_slide(entry: SlideEntry, tiling: Tiling, reader: type[SlideReader] | None, threads: int | None) -> SlideCheck:
    """Open a slide, find its tissue and read some of its tiles."""
    check = SlideCheck(entry.slide_id, entry.shown)
    try:
        with open_slide(entry.path, slide_mpp=entry.slide_mpp, slide_id=entry.slide_id, reader=reader) as slide:
            width, height = slide.dimensions
            check = replace(
                check,
                width=width,
                height=height,
                levels=len(slide.level_dimensions),
                quickhash=slide.quickhash,
                memory_bytes=slide.memory_bytes,
            )
            check = replace(check, slide_mpp=slide.mpp.value, mpp_source=slide.mpp.source)
            tissue, grid = tiling.on(slide, entry)
            remark = slide.remark
            if slide.memory_bytes > MUCH_MEMORY:
                memory = f"takes {size(slide.memory_bytes)} of memory, as a plain image has no tiles"
                remark = "; ".join(filter(None, [remark, memory]))
            area = tissue.area_mm2(slide.mpp.value)
            check = replace(check, remark=remark, tissue_mm2=area, tiles=len(grid.coords))
            if not len(grid.coords):
                return replace(check, problem=f"{entry.path}: {tiling.why_none(tissue)}")
            return replace(check, tiles_per_second=_reading_speed(slide, grid, threads))
    except MemoryError:
        raise
    except Exception as error:
        return replace(check, problem=SlideResult.failed(entry, error).reason)


def _reading_speed(slide: Slide, grid: Grid, threads: int | None) -> float:
    first = max(0, (len(grid.coords) - SAMPLE_TILES) // 2)
    part = slice(first, first + SAMPLE_TILES)
    sample = replace(grid, coords=grid.coords[part], tissue_fraction=grid.tissue_fraction[part])
    started = time.perf_counter()
    tiles = sum(len(batch.index) for batch in TileStream(slide, sample, batch_size=16, threads=threads))
    return tiles / (time.perf_counter() - started)


def mark_duplicates(checks: list[SlideCheck]) -> list[SlideCheck]:
    """Report slides whose image data another one has too: they count twice, perhaps on both sides of a split."""
    first: dict[str, str] = {}
    marked = []
    for check in checks:
        twin = first.setdefault(check.quickhash, check.slide_id) if check.quickhash else check.slide_id
        if twin != check.slide_id:
            check = replace(check, problem="; ".join(filter(None, [f"same image as {twin}", check.problem])))
        marked.append(check)
    return marked

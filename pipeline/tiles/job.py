"""The work on one slide: the tiles on its tissue, or those of its feature file, as pictures."""

import json
import time
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...data.features.feature_file import read_features
from ...data.features.features import Features
from ...data.slides.base import reader_to_obey, recorded_reader
from ...data.slides.identity import SlideIdentity
from ...data.slides.slide import Slide, open_slide
from ...data.slides.slide_table import SlideEntry
from ...data.tiles.grid import Grid, grid_of_tiles
from ...data.tiles.stream import TileStream
from ...data.tissue.base import Tissue, settings_of
from ...data.whole_file import write_whole
from ...errors import LongslideError
from ...plurals import count
from ..batch.claims import claim
from ..batch.memory import Turn
from ..batch.progress import Progress
from ..batch.rerun import MadeOtherwiseError
from ..batch.result import SlideResult
from ..batch.watched import WatchedProcesses
from ..embed.layout import LOOKED_AT_PX, Tiling, look_at, take_memory
from .picture_files import Layout, PictureFiles, PngFolder, WebDatasetShards, png, remove_pictures


@dataclass
class PreparedTiles:
    """A slide that is claimed and open, and its grid; `resources` frees it."""

    entry: SlideEntry
    slide: Slide
    grid: Grid
    resources: ExitStack
    started: float


@dataclass
class TilesJob:
    """Writes the tiles of slides into one folder.

    Attributes:
        output: The folder.
        features: Folder of the feature files whose tiles are written; None for the tiles on tissue.
        layout: PNG folders or WebDataset shards.
        tiles_per_shard: Tiles of a shard.
        tiling: Which tiles on tissue are written; of feature files it says the reader alone.
        max_bad_tiles: Unreadable tiles that a slide may have.
        max_blur: Tiles more blurred than this are left out.
        watched: The processes in which slides are opened and tissue is found.
        threads: Threads that read and compress tiles.
        overwrite: Whether pictures that were made otherwise are replaced.
    """

    output: Path
    features: Path | None
    layout: Layout
    tiles_per_shard: int
    tiling: Tiling
    max_bad_tiles: int
    max_blur: float
    watched: WatchedProcesses
    threads: int | None
    overwrite: bool

    @property
    def description(self) -> str:
        """What the job does."""
        if self.features is not None:
            return f"the tiles of the feature files in {self.features}, as {self.layout}"
        return f"{self.tiling}, as {self.layout}"

    @property
    def made_with(self) -> dict[str, Any]:
        """What pictures depend on, but for masks of the user's and what a table says."""
        if self.features is not None:
            return {"layout": self.layout, "tiles_of": str(self.features.absolute())}
        return self.settings(SlideEntry(Path(), ""), None)

    def index(self, entry: SlideEntry) -> Path:
        """The file that says which tiles of a slide there are; it comes last."""
        return self.output / f"{entry.slide_id}.json"

    def settings(self, entry: SlideEntry, features: Features | None) -> dict[str, Any]:
        """What the tiles of a slide depend on, in plain types."""
        shared = {
            "layout": self.layout,
            "tiles_per_shard": self.tiles_per_shard if self.layout == "webdataset" else None,
        }
        if features is not None:
            return shared | {
                "tiles_of": features.encoder or features.layout,
                "tile_px": features.tile_px,
                "tile_size_level0": features.tile_size_level0,
                "tiles": len(features.coords),
            }
        segmenter = self.tiling.segmenter(entry)
        return shared | {
            "tile_mpp": self.tiling.tile_mpp,
            "tile_px": self.tiling.tile_px,
            "overlap": self.tiling.overlap,
            "min_tissue": self.tiling.min_tissue,
            "max_blur": self.max_blur,
            "slide_mpp_given": entry.slide_mpp,
            "reader_given": reader_to_obey(self.tiling.reader),
            "tissue_method": segmenter.method,
            **settings_of(segmenter),
        }

    def existing(self, entry: SlideEntry) -> dict[str, Any] | None:
        """The index of a slide whose pictures are complete and may stay.

        Raises:
            MadeOtherwiseError: They were made with other settings, or of another slide.
            LongslideError: It is broken.
        """
        path = self.index(entry)
        if not path.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            before, identity = found["settings"], SlideIdentity(**found["slide"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LongslideError(f"{path}: not readable as the index of a slide's tiles; delete it") from error
        wanted = self.settings(entry, self._features(entry))
        ways = [
            f"{name} {before.get(name)} instead of {value}"
            for name, value in wanted.items()
            if before.get(name) != value
        ]
        if mismatch := identity.mismatch(entry.path):
            ways.append(mismatch)
        if ways:
            raise MadeOtherwiseError(path, ways)
        return found

    def prepare(self, entry: SlideEntry, turn: Turn) -> PreparedTiles | SlideResult:
        """Claim the slide, see what exists, open it, lay the grid."""
        started = time.monotonic()
        with ExitStack() as resources:
            resources.callback(claim(self.output, entry.slide_id).release)
            if not self.overwrite and (found := self.existing(entry)) is not None:
                return self._done(entry, found, "already complete")
            features = self._features(entry)
            if features is None:
                slide, tissue, grid = self._tile(entry, turn, resources)
                if not len(grid.coords):
                    return self._no_tiles(entry, self.tiling.why_none(tissue))
            else:
                slide, grid = self._tiles_of(features, entry, turn, resources)
                if not len(grid.coords):
                    return self._no_tiles(entry, "no tiles in its feature file")
            return PreparedTiles(entry, slide, grid, resources.pop_all(), started)

    def encode(
        self, slides: Generator[PreparedTiles | SlideResult], progress: Progress
    ) -> Generator[PreparedTiles | SlideResult]:
        """Nothing: no encoder is needed."""
        return slides

    def finish(self, prepared: PreparedTiles, progress: Progress) -> SlideResult:
        """Read the tiles and write the pictures, and last the index."""
        entry, slide, grid = prepared.entry, prepared.slide, prepared.grid
        progress.slide_started(entry.slide_id, len(grid.coords))
        identity = SlideIdentity.of(slide)
        blur = self.max_blur if self.features is None else 1.0  # a feature file has no tile that was left out
        stream = TileStream(slide, grid, threads=self.threads, max_bad_tiles=self.max_bad_tiles, max_blur=blur)
        shared = {
            "slide_id": entry.slide_id,
            "tile_size_level0": grid.tile_size_level0,
            "tile_mpp": grid.tile_mpp,
            "slide_mpp": grid.slide_mpp,
        }
        written: list[list[int]] = []
        with self._files(entry) as files, ThreadPoolExecutor(self.threads, thread_name_prefix="png") as pool:
            for batch in stream:
                pictures = pool.map(png, batch.tiles)
                for (x, y), picture in zip(batch.coords.tolist(), pictures, strict=True):
                    files.add(x, y, picture, {**shared, "x": x, "y": y})
                    written.append([x, y])
                progress.tiles_done(len(batch.tiles))
            if not written:
                return self._no_tiles(
                    entry, f"none of its {count(len(grid.coords), 'tile')} is sharp enough (--max-blur)"
                )
            self.index(entry).unlink(missing_ok=True)  # it says that the files are complete
            names = files.finish()
        found = {
            **shared,
            "slide": asdict(identity),
            "mpp_source": slide.mpp.source,
            "reader": slide.reader,
            "level": grid.level,
            "remark": slide.remark,
            "bad_tiles": len(stream.bad_tiles),
            "settings": self.settings(entry, self._features(entry)),
            "files": names,
            "coords": written,
        }
        write_whole(self.index(entry), json.dumps(found).encode())
        return self._done(entry, found, seconds=time.monotonic() - prepared.started)

    def stop(self) -> None:
        """End what `prepare` is at work on."""
        self.watched.stop()

    def _done(
        self, entry: SlideEntry, found: Mapping[str, Any], reason: str = "", seconds: float | None = None
    ) -> SlideResult:
        return replace(
            SlideResult.skipped(entry, "; ".join(filter(None, [reason, found.get("remark", "")]))),
            status="done",
            tiles=len(found["coords"]),
            bad_tiles=found.get("bad_tiles"),
            slide_mpp=found.get("slide_mpp"),
            mpp_source=found.get("mpp_source"),
            tile_mpp=found.get("tile_mpp"),
            seconds=seconds,
        )

    def _no_tiles(self, entry: SlideEntry, why: str) -> SlideResult:
        self.index(entry).unlink(missing_ok=True)  # with --overwrite there may be some, of other settings
        remove_pictures(self.output, entry.slide_id)
        return replace(SlideResult.skipped(entry, why), tiles=0)

    def _files(self, entry: SlideEntry) -> PictureFiles:
        if self.layout == "png":
            return PngFolder(self.output, entry.slide_id)
        return WebDatasetShards(self.output, entry.slide_id, self.tiles_per_shard)

    def _features(self, entry: SlideEntry) -> Features | None:
        if self.features is None:
            return None
        return read_features(self.features / f"{entry.slide_id}.h5", embeddings=False)

    def _tile(self, entry: SlideEntry, turn: Turn, resources: ExitStack) -> tuple[Slide, Tissue, Grid]:
        picture = self.output / "qc" / f"{entry.slide_id}.jpg"
        layout = self.tiling.lay_out(self.watched, turn, entry.path, entry, picture)
        slide = resources.enter_context(layout.open(entry, self.tiling.reader_class))
        turn.take(slide.memory_bytes)
        return slide, layout.tissue, layout.grid

    def _tiles_of(self, features: Features, entry: SlideEntry, turn: Turn, resources: ExitStack) -> tuple[Slide, Grid]:
        path = self.features
        if features.tile_px is None or features.tile_size_level0 is None:
            raise LongslideError(
                f"{path}/{entry.slide_id}.h5: a file of {features.layout} that does not say the size of its tiles; give the "
                "slides alone, with --tile-px and --tile-mpp"
            )
        if mismatch := features.slide.mismatch(entry.path):
            raise LongslideError(
                f"{path}/{entry.slide_id}.h5: {mismatch}; embed this slide again, or give the other one"
            )
        reader = self.tiling.reader_class or recorded_reader(features.settings.get("reader"))
        take_memory(self.watched, turn, entry.path, replace(entry, tissue_mask=None), reader)
        self.watched.call(entry.path, look_at, entry.path, reader, LOOKED_AT_PX)
        slide = resources.enter_context(
            open_slide(
                entry.path, slide_mpp=entry.slide_mpp or features.slide_mpp, slide_id=entry.slide_id, reader=reader
            )
        )
        grid = grid_of_tiles(
            slide,
            features.coords,
            tile_px=features.tile_px,
            tile_size_level0=features.tile_size_level0,
            step_level0=features.step_level0,
            overlap=features.overlap or 0,
            level=features.settings.get("patch_level", features.settings.get("level")),
        )
        return slide, grid

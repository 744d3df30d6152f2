"""The work on slides: open each, find tissue, lay the grid; embed the tiles of all as one stream; write feature files."""

import json
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ...data.features.feature_file import read_features, write_features
from ...data.features.features import Features
from ...data.features.preprocessing import Preprocessing
from ...data.slides.base import reader_to_obey
from ...data.slides.identity import SlideIdentity
from ...data.slides.metadata import metadata_remark
from ...data.slides.slide import Slide, open_slide
from ...data.slides.slide_table import SlideEntry
from ...data.tiles.readers import TileReaders
from ...data.tiles.stream import TileStream
from ...data.tissue.base import Tissue, settings_of
from ...data.whole_file import remove_leftovers
from ...errors import LongslideError, printable
from ...plurals import count
from ..batch.claims import claim
from ..batch.memory import Turn
from ..batch.progress import Progress
from ..batch.rerun import MadeOtherwiseError
from ..batch.result import SlideResult
from ..batch.watched import WatchedProcesses
from .layout import Tiling
from .local_copies import LocalCopies
from .qc import draw_qc, qc_files

if TYPE_CHECKING:
    from ...models.slide_encoder.base import AnySlideEncoder
    from .tile_embedding import EmbeddedTiles, TileEmbedder

T = TypeVar("T")


@dataclass(frozen=True)
class TiledSlide:
    """An open slide with its tissue and the tiles that are to be embedded."""

    slide: Slide
    identity: SlideIdentity
    tissue: Tissue
    stream: TileStream


@dataclass
class PreparedSlide:
    """A slide that is claimed and waits for the encoders; `resources` frees it."""

    entry: SlideEntry
    tiled: TiledSlide | None  # None: the feature file lacks nothing but the slide embedding
    resources: ExitStack
    started: float
    embedded: "EmbeddedTiles | Exception | None" = None  # what became of the tiles


@dataclass
class EmbedJob:
    """Embeds slides into one folder, a feature file for each.

    Attributes:
        output: The folder.
        embedder: The tile encoder, where it runs.
        slide_encoder: The slide encoder, if there is to be a slide embedding.
        tiling: Which tiles are embedded.
        max_bad_tiles: Unreadable tiles that a slide may have.
        max_blur: Tiles more blurred than this are left out.
        threads: Threads or processes that read tiles; see `TileReaders`.
        overwrite: Whether files that were made otherwise are replaced.
        watched: The processes in which slides are opened and tissue is found.
        copies: Where slides are copied to before they are read, if they are.
    """

    output: Path
    embedder: "TileEmbedder"
    slide_encoder: "AnySlideEncoder | None"
    tiling: Tiling
    max_bad_tiles: int
    max_blur: float
    threads: int | None
    overwrite: bool
    watched: WatchedProcesses
    copies: LocalCopies | None = None

    @property
    def description(self) -> str:
        """What the job does, in a line or two, for the user to check."""
        encoder = self.embedder.encoder
        text = f"tile encoder {encoder.spec.name} ({encoder.weights})"
        if self.slide_encoder is not None:
            text += f", slide encoder {self.slide_encoder.name} ({self.slide_encoder.weights})"
        text += f"\n{self.tiling}"
        recommended = (encoder.spec.tile_px, encoder.spec.tile_mpp or self.tiling.tile_mpp)
        if (self.tiling.tile_px, self.tiling.tile_mpp) != recommended:
            text += f" (recommended for {encoder.spec.name}: {recommended[0]} px at {recommended[1]:g} um/px)"
        return f"{text}; {self.embedder.device}, {self.embedder.precision}"

    @property
    def made_with(self) -> dict[str, Any]:
        """What features depend on, but for masks of the user's."""
        return self.preprocessing(SlideEntry(Path(), "")).to_dict()

    def preprocessing(self, entry: SlideEntry) -> Preprocessing:
        """What the features of a slide are made with."""
        segmenter = self.tiling.segmenter(entry)
        tiles = Preprocessing(
            tile_encoder=self.embedder.encoder.spec.name,
            tile_weights=self.embedder.encoder.weights,
            tile_mpp=self.tiling.tile_mpp,
            tile_px=self.tiling.tile_px,
            overlap=self.tiling.overlap,
            precision=self.embedder.precision,
            min_tissue=self.tiling.min_tissue,
            max_blur=self.max_blur,
            tissue_method=segmenter.method,
            reader=reader_to_obey(self.tiling.reader),
            **settings_of(segmenter),
        )
        return tiles if self.slide_encoder is None else with_slide_encoder(tiles, self.slide_encoder)

    def path(self, entry: SlideEntry) -> Path:
        """The feature file of a slide."""
        return self.output / f"{entry.slide_id}.h5"

    def existing(self, entry: SlideEntry) -> Features | None:
        """The feature file of a slide that exists and may stay, without its embeddings.

        Raises:
            MadeOtherwiseError: It was made with other settings, or of another slide.
            LongslideError: It is broken.
        """
        path = self.path(entry)
        if not path.exists():
            return None
        features = read_features(path, embeddings=False)
        wanted = self.preprocessing(entry)
        if features.slide_embedding is None:
            wanted = wanted.of_tiles
        ways = [str(one) for one in Preprocessing.of(features).differences(wanted)]
        if features.layout != "longslide":
            ways.append(f"by another tool, {features.layout}")
        if entry.slide_mpp is not None and features.slide_mpp != entry.slide_mpp:
            ways.append(f"slide_mpp {features.slide_mpp} instead of {entry.slide_mpp}")
        if entry.slide_mpp is None and features.settings.get("mpp_source") == "option":
            ways.append(f"slide_mpp {features.slide_mpp} was given instead of the file's own")
        recorded = reader_to_obey(features.settings.get("reader"))
        if recorded is not None and reader_to_obey(self.tiling.reader) is None:
            now = self.tiling.reader or self._reader_of(entry)
            if recorded != now:
                ways.append(f"reader {recorded} instead of {now}")
        if self.max_blur < 1 and "max_blur" not in features.settings:
            ways.append(f"before blur was measured, which --max-blur {self.max_blur:g} needs")
        if features.settings.get("bad_tiles", 0) > self.max_bad_tiles:
            ways.append(f"more unreadable tiles than --max-bad-tiles {self.max_bad_tiles}")
        if (mismatch := features.slide.mismatch(entry.path)) is not None:
            ways.append(mismatch)
        if ways:
            raise MadeOtherwiseError(path, ways)
        return features

    def prepare(self, entry: SlideEntry, turn: Turn) -> PreparedSlide | SlideResult:
        """All that comes before the encoders: claim the slide, see what exists, open it, find tissue, lay the grid."""
        started = time.monotonic()
        with ExitStack() as resources:
            resources.callback(claim(self.output, entry.slide_id).release)
            existing = self._existing_or_none(entry) if self.overwrite else self.existing(entry)
            if existing is not None:
                if self.slide_encoder is None or existing.slide_embedding is not None:
                    return SlideResult.done(entry, existing, self.path(entry), "already complete")
                return PreparedSlide(entry, None, resources.pop_all(), started)
            for path in (self.path(entry), *qc_files(self._qc_path(entry))):
                remove_leftovers(path)
            tiled = self._tile(entry, turn, resources)
            if not len(tiled.stream):
                return self._nothing_to_embed(entry, tiled, self.tiling.why_none(tiled.tissue))
            return PreparedSlide(entry, tiled, resources.pop_all(), started)

    def encode(
        self, slides: Iterable[PreparedSlide | SlideResult], progress: Progress
    ) -> Generator[PreparedSlide | SlideResult]:
        """Embed the tiles of all slides as one stream."""
        return self.encode_within(slides, lambda one: one if isinstance(one, PreparedSlide) else None, progress)

    def encode_within(
        self, items: Iterable[T], slide_of: Callable[[T], PreparedSlide | None], progress: Progress
    ) -> Generator[T]:
        """Embed the tiles of the slides that are within some of the items, which are given on in order."""

        def streams() -> Iterator[tuple[T, TileStream | None]]:
            for item in items:
                slide = slide_of(item)
                yield item, None if slide is None or slide.tiled is None else slide.tiled.stream

        def on_slide(item: T, tiles: int) -> None:
            slide = slide_of(item)
            assert slide is not None
            progress.slide_started(slide.entry.slide_id, tiles)

        def on_tiles(tiles: int) -> None:
            progress.tiles_done(tiles, f"limited by {self.embedder.waits.limit}")

        with (
            TileReaders(self.threads) as readers,
            closing(self.embedder(streams(), readers, on_slide, on_tiles, self.stop)) as embedded_slides,
        ):
            ended = time.monotonic()
            for item, embedded in embedded_slides:
                slide = slide_of(item)
                if slide is not None:
                    slide.embedded = embedded
                if slide is not None and slide.tiled is not None:
                    slide.started = max(slide.started, ended)  # before that, earlier slides have kept it waiting
                    ended = time.monotonic()
                yield item

    def finish(self, prepared: PreparedSlide, progress: Progress) -> SlideResult:
        """The slide embedding, and the feature file."""
        entry = prepared.entry
        if prepared.tiled is None:
            features = read_features(self.path(entry))
        else:
            embedded = self._features(prepared, prepared.tiled)
            if isinstance(embedded, SlideResult):
                return embedded
            features = embedded
        if self.slide_encoder is not None:
            from .tile_embedding import embed_slide

            try:
                features = embed_slide(self.slide_encoder, features, self.embedder.device, self.embedder.precision)
            except Exception:
                write_features(self.path(entry), features)  # the tiles' embeddings took the time: keep them
                raise
        write_features(self.path(entry), features)
        return SlideResult.done(entry, features, self.path(entry), seconds=time.monotonic() - prepared.started)

    def stop(self) -> None:
        """End what `prepare` is at work on."""
        self.watched.stop()

    def _reader_of(self, entry: SlideEntry) -> str:
        """The reader that takes a slide where none is named."""
        with open_slide(entry.path) as slide:
            return slide.reader

    def _qc_path(self, entry: SlideEntry) -> Path:
        return self.output / "qc" / f"{entry.slide_id}.jpg"

    def _existing_or_none(self, entry: SlideEntry) -> Features | None:
        try:
            return self.existing(entry)
        except LongslideError:
            return None

    def _tile(self, entry: SlideEntry, turn: Turn, resources: ExitStack) -> TiledSlide:
        original = entry.path
        if self.copies is not None:
            entry = replace(entry, path=resources.enter_context(self.copies.copy_of(original)))
        layout = self.tiling.lay_out(self.watched, turn, original, entry, self._qc_path(entry))
        grid = layout.grid
        need = len(grid.coords) * (self.embedder.encoder.dim * 4 + 16) + 2**20
        free = shutil.disk_usage(self.output).free
        if need > free:
            raise LongslideError(
                f"{self.output}: the disk is full ({free / 1e6:,.0f} MB free, {need / 1e6:,.0f} MB needed); make room"
            )
        slide = resources.enter_context(layout.open(entry, self.tiling.reader_class))
        turn.take(slide.memory_bytes)
        # Before it is read: a change while it is read is one since then.
        identity = replace(SlideIdentity.of(slide), path=printable(str(original.absolute())))
        stream = TileStream(
            slide,
            grid,
            max_bad_tiles=self.max_bad_tiles,
            max_blur=self.max_blur,
            timeout=self.watched.timeout,
        )
        return TiledSlide(slide, identity, layout.tissue, stream)

    def _features(self, prepared: PreparedSlide, tiled: TiledSlide) -> Features | SlideResult:
        entry = prepared.entry
        slide, identity, tissue, stream, grid = (
            tiled.slide,
            tiled.identity,
            tiled.tissue,
            tiled.stream,
            tiled.stream.grid,
        )
        if isinstance(prepared.embedded, Exception):
            raise prepared.embedded
        assert prepared.embedded is not None
        embeddings, index = prepared.embedded
        blurred = int(np.count_nonzero(stream.blur > self.max_blur))
        if blurred or stream.bad_tiles:
            draw_qc(slide, tissue, grid, stream.blur, self.max_blur).save(self._qc_path(entry))
        if blurred and not len(index):
            why = f"all {blurred} readable tiles are more blurred than --max-blur {self.max_blur:g}"
            return replace(self._nothing_to_embed(entry, tiled, why), blurred_tiles=blurred)
        if not len(index):
            raise LongslideError(
                f"{entry.path}: none of its {count(len(grid.coords), 'tile')} can be read; copy the slide again"
            )
        made_with = self.preprocessing(entry)
        settings = {
            "min_tissue": made_with.min_tissue,
            "max_blur": made_with.max_blur,
            "reader": slide.reader,
            "reader_library": slide.library,
            "mpp_source": slide.mpp.source,
            "patch_level": grid.level,
            "custom_downsample": grid.custom_downsample(slide.level_downsamples),
            "tissue_mm2": tissue.area_mm2(slide.mpp.value),
            "left_out_mm2": json.dumps(tissue.left_out_mm2(slide.mpp.value)),
            "bad_tiles": len(stream.bad_tiles),
            "blurred_tiles": blurred,
            **self.embedder.fidelity,
            **settings_of(self.tiling.segmenter(entry)),
        }
        if slide.mpp.in_file is not None:
            settings["file_mpp"] = slide.mpp.in_file
        if remark := metadata_remark(slide.properties):
            settings["metadata_remark"] = remark
        if slide.reader_remark:
            settings["reader_remark"] = slide.reader_remark
        for name in ("unreadable_levels", "differing_levels"):
            if levels := getattr(slide, name):
                settings[name] = ", ".join(map(str, sorted(levels)))
        return Features(
            slide_id=entry.slide_id,
            features=embeddings,
            coords=grid.coords[index],
            step_level0=grid.step_level0,
            blur=stream.blur[index],
            tile_size_level0=grid.tile_size_level0,
            tile_px=made_with.tile_px,
            overlap=made_with.overlap,
            tile_mpp=made_with.tile_mpp,
            slide_mpp=slide.mpp.value,
            level0_size=slide.dimensions,
            encoder=made_with.tile_encoder,
            weights=made_with.tile_weights,
            precision=made_with.precision,
            tissue=tissue.to_geojson(),
            tissue_method=tissue.method,
            slide_path=identity.path,
            quickhash=identity.quickhash,
            slide_size=identity.size,
            slide_modified=identity.modified,
            settings=settings,
        )

    def _nothing_to_embed(self, entry: SlideEntry, tiled: TiledSlide, why: str) -> SlideResult:
        slide = tiled.slide
        self.path(entry).unlink(missing_ok=True)  # with --overwrite there may be one, of other settings
        why += f"; see qc/{entry.slide_id}.jpg"
        if slide.remark:
            why += f"; {slide.remark}"
        return replace(
            SlideResult.skipped(entry, why),
            tiles=0,
            slide_mpp=slide.mpp.value,
            mpp_source=slide.mpp.source,
            tile_mpp=self.tiling.tile_mpp,
            tissue_mm2=tiled.tissue.area_mm2(slide.mpp.value),
            left_out_mm2=sum(tiled.tissue.left_out_mm2(slide.mpp.value).values()),
        )


def with_slide_encoder(tiles: Preprocessing, slide_encoder: "AnySlideEncoder") -> Preprocessing:
    """What slide embeddings are made with, from tile embeddings and a slide encoder."""
    return replace(
        tiles,
        slide_encoder=slide_encoder.name,
        slide_weights=slide_encoder.weights,
        pool=getattr(slide_encoder, "pool", None),
    )

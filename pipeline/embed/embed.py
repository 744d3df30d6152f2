"""The batch job: slide files in, one feature file a slide out."""

import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ...data.features.feature_file import Features, read_features, write_features
from ...data.slides.base import READERS, reader_to_obey
from ...data.slides.slide import Slide, open_slide
from ...data.slides.slide_table import SlideEntry, find_slides
from ...data.tiles.grid import Grid, make_grid
from ...data.tiles.stream import TileStream
from ...data.tissue.base import Tissue, TissueSegmenter, settings_of
from ...data.tissue.mask import Mask
from ...data.tissue.optical_density import OpticalDensity
from ...data.whole_file import remove_leftovers
from ...errors import LongslideError
from ...registry import is_factory
from ..batch.ledger import BUSY, SUMMARY, SlideResult, claim, make_output_folder, record
from ..batch.progress import JobProgress
from .qc import draw_qc, save_qc

if TYPE_CHECKING:
    from typing import TypeAlias

    from torch import nn

    from ...models.slide_encoder.base import AnySlideEncoder
    from ...models.tile_encoder.spec import TileEncoderSpec
    from .tile_embedding import TileEmbedder

    TileEncoderChoice: TypeAlias = str | Path | nn.Module
    SlideEncoderChoice: TypeAlias = str | Path | AnySlideEncoder
else:  # what the command line takes, without torch
    TileEncoderChoice = SlideEncoderChoice = str | Path

T = TypeVar("T")

DEFAULT_TILE_MPP = 0.5
"""Microns per pixel of the tiles where the encoder recommends none: 20x."""

DEFAULT_TILE_PX = 256
"""Edge of the tiles where no encoder is named."""


def embed(
    slides: str | Path | Sequence[str | Path],
    output: str | Path,
    tile_encoder: TileEncoderChoice,
    tile_checkpoint: str | Path | None = None,
    slide_encoder: SlideEncoderChoice | None = None,
    slide_checkpoint: str | Path | None = None,
    pool: Literal["mean", "cls"] = "mean",
    slide_mpp: float | None = None,
    tile_mpp: float | None = None,
    tile_px: int | None = None,
    overlap: int = 0,
    min_tissue: float = 0.1,
    tissue: TissueSegmenter | None = None,
    reader: str | None = None,
    max_bad_tiles: int = 0,
    batch_size: int | None = None,
    threads: int = 4,
    device: str = "auto",
    precision: Literal["auto", "float32", "float16", "bfloat16", "float8"] = "auto",
    seed: int = 0,
    overwrite: bool = False,
) -> list[SlideResult]:
    """Embed slides: one feature file a slide, a picture of its tiles in `qc/`, and `summary.csv`.

    Running it again does only what is missing. Several processes may share one output folder. One bad slide never ends
    the job.

    Args:
        slides: Slide files, folders of slides, or tables (CSV, TSV, Parquet, Excel) with a column `slide`.
        output: Folder for `<slide_id>.h5`, `qc/<slide_id>.jpg` and `summary.csv`.
        tile_encoder: Name of a tile encoder or of a timm model, path of a YAML file that describes one, or
            `package.module:factory`; in Python also a `TileEncoder` or another torch module.
        tile_checkpoint: Weights of the tile encoder: a file, a folder, or `random`. Default: the published weights.
        slide_encoder: Name of a slide encoder, path of a YAML file that describes one, or `package.module:factory`; in
            Python also the encoder itself. Without one the feature files hold tile embeddings only.
        slide_checkpoint: Weights of the slide encoder: a file, or `random`. Default: the published weights.
        pool: What the slide embedding is: the mean over the tiles, or the cls token.
        slide_mpp: Microns per pixel at level 0, for all slides that have no `slide_mpp` in the table; overrides the file's.
        tile_mpp: Microns per pixel of the tiles. Default: what the tile encoder recommends.
        tile_px: Edge of a tile in pixels. Default: what the tile encoder recommends.
        overlap: Pixels that neighbouring tiles share.
        min_tissue: Smallest share of a tile that must be tissue, 0 to 1.
        tissue: Tissue segmenter, with its options: `optical-density` by default.
        reader: Slide reader, by name or dotted path. Default: the first one that takes the file.
        max_bad_tiles: Unreadable tiles that a slide may have; with more of them it fails.
        batch_size: Tiles a batch. Default: what is fastest on the device. Halved when the GPU runs out of memory.
        threads: Threads that read tiles.
        device: `auto`, or a torch device such as `cuda:1` or `cpu`.
        precision: Precision of the encoders. `auto`: the tile encoder's own on a GPU, float32 on a CPU.
        seed: Seed of `random` weights.
        overwrite: Replace feature files that were made with other settings.

    Returns:
        One result per slide, in the order of the input.

    Raises:
        LongslideError: Wrong usage, found before any slide is touched.
    """
    output = Path(output)
    entries = find_slides(slides, slide_mpp, ask=False)
    spec, tile_encoder, tile_checkpoint = look_at_tile_encoder(tile_encoder, tile_checkpoint, seed)
    tile_mpp, tile_px = resolve_tiles(spec, tile_mpp, tile_px, overlap, min_tissue)
    if (batch_size is not None and batch_size < 1) or threads < 1 or max_bad_tiles < 0:
        raise LongslideError("--batch-size and --threads must be at least 1, and --max-bad-tiles at least 0")
    if slide_encoder is not None:
        check_slide_encoder(slide_encoder, slide_checkpoint, spec.name)
    if reader is not None:
        reader = READERS.name_of(READERS.get(reader))
    make_output_folder(output)

    from ...models.slide_encoder.base import load_slide_encoder
    from ...models.tile_encoder.encoder import create_tile_encoder
    from .tile_embedding import TileEmbedder, resolve_device, resolve_precision, slide_encoder_on

    torch_device = resolve_device(device)
    slide_model = None
    if slide_encoder is not None:  # before the tile encoder, whose weights are far larger
        slide_model = load_slide_encoder(
            slide_encoder,
            checkpoint=slide_checkpoint,
            pool=pool,
            seed=seed,
            tile_encoder=spec.name,
            tile_dim=spec.dim,
        )
        slide_model = slide_encoder_on(torch_device, slide_model)
    encoder = create_tile_encoder(tile_encoder, checkpoint=tile_checkpoint, seed=seed)
    job = EmbedJob(
        output=output,
        embedder=TileEmbedder(
            encoder, torch_device, resolve_precision(precision, spec.precision, torch_device), batch_size
        ),
        slide_encoder=slide_model,
        tile_mpp=tile_mpp,
        tile_px=tile_px,
        overlap=overlap,
        min_tissue=min_tissue,
        tissue=tissue or OpticalDensity(),
        reader=reader,
        max_bad_tiles=max_bad_tiles,
        threads=threads,
        overwrite=overwrite,
    )
    results = []
    with JobProgress(len(entries)) as progress:
        progress.note(job.description)
        for prepared in one_ahead(job.prepare, entries):
            result = prepared if isinstance(prepared, SlideResult) else job.finish(prepared, progress)
            try:
                record(output, result)
            except LongslideError as error:
                progress.note(str(error))
            progress.slide_ended(result)
            results.append(result)
    counts = {status: sum(result.status == status for result in results) for status in ("done", "failed", "skipped")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()) + f"; see {output / SUMMARY}")
    return results


def resolve_tiles(
    spec: "TileEncoderSpec | None", tile_mpp: float | None, tile_px: int | None, overlap: int, min_tissue: float
) -> tuple[float, int]:
    """Microns per pixel and edge of the tiles: as asked for, else as the tile encoder recommends.

    Raises:
        LongslideError: These, or the overlap or the share of tissue, cannot be meant.
    """
    if tile_mpp is None:
        tile_mpp = (spec.tile_mpp if spec else None) or DEFAULT_TILE_MPP
    if tile_px is None:
        tile_px = spec.tile_px if spec else DEFAULT_TILE_PX
    wrong = None
    if not 0.05 <= tile_mpp <= 100:
        wrong = f"--tile-mpp {tile_mpp:g} is not a plausible number of microns per pixel (0.05 to 100)"
    elif tile_px < 16:
        wrong = f"--tile-px {tile_px} is too small (at least 16)"
    elif not 0 <= overlap < tile_px:
        wrong = f"--overlap {overlap} must be at least 0 and less than --tile-px {tile_px}"
    elif not 0 <= min_tissue <= 1:
        wrong = f"--min-tissue {min_tissue:g} must be between 0 and 1"
    if wrong:
        raise LongslideError(wrong)
    return tile_mpp, tile_px


def look_at_tile_encoder(
    choice: TileEncoderChoice, checkpoint: str | Path | None, seed: int
) -> "tuple[TileEncoderSpec, TileEncoderChoice, str | Path | None]":
    """The facts of a tile encoder, and what `create_tile_encoder` makes it of.

    Of a name or a file the facts are read without torch; a factory or a module must be made a tile encoder to know them.
    """
    if isinstance(choice, str | Path) and not is_factory(choice):
        from ...models.tile_encoder.spec import load_tile_encoder_spec

        return load_tile_encoder_spec(choice), choice, checkpoint
    from ...models.tile_encoder.encoder import create_tile_encoder

    encoder = create_tile_encoder(choice, checkpoint=checkpoint, seed=seed)
    return encoder.spec, encoder, None


def check_slide_encoder(name: SlideEncoderChoice, checkpoint: str | Path | None, tile_encoder: str) -> None:
    """Published slide encoders read the embeddings of one tile encoder; those of another may have the same length.

    A factory, an encoder and a checkpoint of masked autoencoding say only when they are loaded what they read.

    Raises:
        LongslideError: There is no such slide encoder, or its published weights read those of another tile encoder.
    """
    from ...models.slide_encoder.spec import load_slide_encoder_spec

    if not isinstance(name, str | Path) or is_factory(name) or Path(checkpoint or "").suffix == ".ckpt":
        return
    spec = load_slide_encoder_spec(name)
    if checkpoint is None and spec.tile_encoder != tile_encoder:
        raise LongslideError(
            f"the published weights of slide encoder {name!r} read tile embeddings of {spec.tile_encoder!r}, not "
            f"of {tile_encoder!r}; use that tile encoder, or weights of your own with --slide-checkpoint"
        )


def why_no_tiles(tissue: Tissue, min_tissue: float) -> str:
    """Why a slide has no tiles to embed."""
    return f"no tile has {min_tissue:.0%} tissue or more (--min-tissue)" if tissue.mask.any() else "no tissue found"


@dataclass
class PreparedSlide:
    """A slide that is claimed and waits for the encoders; `resources` frees it."""

    entry: SlideEntry
    tiled: tuple[Slide, Tissue, Grid] | None  # None: the feature file lacks nothing but the slide embedding
    resources: ExitStack
    started: float


def one_ahead(prepare: Callable[[SlideEntry], T], entries: Sequence[SlideEntry]) -> Iterator[T]:
    """Prepare the next slide (open it, find tissue) while the encoder works on the present one."""
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as executor:
        following = executor.submit(prepare, entries[0])
        for entry in [*entries[1:], None]:
            current = following.result()
            if entry is not None:
                following = executor.submit(prepare, entry)
            yield current


@dataclass
class EmbedJob:
    """Embeds slides one after the other into one folder: `prepare` in a thread ahead, `finish` where the encoders are."""

    output: Path
    embedder: "TileEmbedder"
    slide_encoder: "AnySlideEncoder | None"
    tile_mpp: float
    tile_px: int
    overlap: int
    min_tissue: float
    tissue: TissueSegmenter
    reader: str | None
    max_bad_tiles: int
    threads: int
    overwrite: bool

    @property
    def description(self) -> str:
        """What the job does, in a line or two, for the user to check."""
        encoder = self.embedder.encoder
        text = f"tile encoder {encoder.spec.name} ({encoder.weights})"
        if self.slide_encoder is not None:
            text += f", slide encoder {self.slide_encoder.name} ({self.slide_encoder.weights})"
        text += f"\ntiles of {self.tile_px} px at {self.tile_mpp:g} um/px, overlap {self.overlap} px"
        recommended = (encoder.spec.tile_px, encoder.spec.tile_mpp or self.tile_mpp)
        if (self.tile_px, self.tile_mpp) != recommended:
            text += f" (recommended for {encoder.spec.name}: {recommended[0]} px at {recommended[1]:g} um/px)"
        return f"{text}; {self.embedder.device}, {self.embedder.precision}"

    def prepare(self, entry: SlideEntry) -> PreparedSlide | SlideResult:
        """All that comes before the encoders: claim the slide, see what exists, open it, find tissue, lay the grid."""
        started = time.monotonic()
        with ExitStack() as resources:
            try:
                lock = claim(self.output, entry.slide_id)
                if lock is None:
                    return _result(entry, "skipped", BUSY)
                resources.callback(lock.release)
                existing = self._existing(entry)
                if existing is not None:
                    if self.slide_encoder is None or existing.slide_embedding is not None:
                        return self._done(entry, existing, "was there already")
                    return PreparedSlide(entry, None, resources.pop_all(), started)
                for path in (self._path(entry), self._qc_path(entry)):
                    remove_leftovers(path)
                tiled = self._tile(entry, resources)
                if not len(tiled[2].coords):
                    return self._nothing_to_embed(entry, *tiled)
                return PreparedSlide(entry, tiled, resources.pop_all(), started)
            except Exception as error:
                return failed_slide(entry, error)

    def finish(self, prepared: PreparedSlide, progress: JobProgress) -> SlideResult:
        """All that needs the encoders, and the feature file."""
        entry = prepared.entry
        with prepared.resources:
            try:
                if prepared.tiled is None:
                    features = read_features(self._path(entry))
                else:
                    features = self._embed_tiles(entry, *prepared.tiled, progress)
                if self.slide_encoder is not None:
                    try:
                        features = self._embed_slide(features)
                    except Exception:
                        write_features(self._path(entry), features)  # the tiles' embeddings took the time: keep them
                        raise
                write_features(self._path(entry), features)
                return self._done(entry, features, seconds=time.monotonic() - prepared.started)
            except Exception as error:
                return failed_slide(entry, error)

    def _path(self, entry: SlideEntry) -> Path:
        return self.output / f"{entry.slide_id}.h5"

    def _qc_path(self, entry: SlideEntry) -> Path:
        return self.output / "qc" / f"{entry.slide_id}.jpg"

    def _existing(self, entry: SlideEntry) -> Features | None:
        """What is there already and may stay.

        Raises:
            LongslideError: The file there is broken or was made with other settings, and may not be overwritten.
        """
        path = self._path(entry)
        if not path.exists():
            return None
        try:
            existing = read_features(path, embeddings=False)
            wanted = self._settings(entry)
            if entry.slide_mpp is None and existing.settings.get("mpp_source") == "option":
                wanted["mpp_source"] = "the file's own"
            if self.reader is None and reader_to_obey(existing.settings.get("reader")):
                wanted["reader"] = "none named"
            if existing.settings.get("bad_tiles", 0) > self.max_bad_tiles:
                wanted["bad_tiles"] = f"at most {self.max_bad_tiles}"
            if existing.slide_embedding is not None and self.slide_encoder is not None:
                wanted |= self._slide_settings()
            check_same(path, existing, wanted)
        except LongslideError:
            if self.overwrite:
                return None
            raise
        return existing

    def _settings(self, entry: SlideEntry) -> dict[str, Any]:
        """What a feature file must have been made with to be taken for done, under its names in `Features`."""
        settings = {
            "slide": entry.path.name,
            "encoder": self.embedder.encoder.spec.name,
            "weights": self.embedder.encoder.weights,
            "precision": self.embedder.precision,
            "tile_mpp": self.tile_mpp,
            "tile_px": self.tile_px,
            "overlap": self.overlap,
            "min_tissue": self.min_tissue,
        }
        if entry.slide_mpp is not None:
            settings["slide_mpp"] = entry.slide_mpp
        if self.reader is not None:
            settings["reader"] = self.reader
        segmenter = self._segmenter(entry)
        return settings | {"tissue_method": segmenter.method} | settings_of(segmenter)

    def _segmenter(self, entry: SlideEntry) -> TissueSegmenter:
        return self.tissue if entry.tissue_mask is None else Mask(entry.tissue_mask)

    def _slide_settings(self) -> dict[str, Any]:
        assert self.slide_encoder is not None
        return {
            "slide_encoder": self.slide_encoder.name,
            "slide_weights": self.slide_encoder.weights,
            "pool": getattr(self.slide_encoder, "pool", None),
        }

    def _tile(self, entry: SlideEntry, resources: ExitStack) -> tuple[Slide, Tissue, Grid]:
        slide = resources.enter_context(
            open_slide(entry.path, slide_mpp=entry.slide_mpp, slide_id=entry.slide_id, reader=self.reader)
        )
        tissue = self._segmenter(entry)(slide)
        grid = make_grid(
            slide,
            tissue,
            tile_mpp=self.tile_mpp,
            tile_px=self.tile_px,
            overlap=self.overlap,
            min_tissue=self.min_tissue,
        )
        save_qc(self._qc_path(entry), draw_qc(slide, tissue, grid))
        need = len(grid.coords) * (self.embedder.encoder.dim * 4 + 16) + 2**20
        free = shutil.disk_usage(self.output).free
        if need > free:
            raise LongslideError(
                f"{self.output}: the disk is full ({free / 1e6:,.0f} MB free, {need / 1e6:,.0f} MB needed); make room"
            )
        return slide, tissue, grid

    def _embed_tiles(
        self, entry: SlideEntry, slide: Slide, tissue: Tissue, grid: Grid, progress: JobProgress
    ) -> Features:
        progress.slide_started(entry.slide_id, len(grid.coords))
        stream = TileStream(
            slide, grid, batch_size=self.embedder.reading_batch, threads=self.threads, max_bad_tiles=self.max_bad_tiles
        )
        embeddings, index = self.embedder(stream, progress.tiles_done)
        if not len(index):
            raise LongslideError(
                f"{entry.path}: none of the {len(grid.coords)} tiles can be read; copy the slide again"
            )
        features = Features(
            slide_id=entry.slide_id,
            features=embeddings,
            coords=grid.coords[index],
            step_level0=grid.step_level0,
            tile_size_level0=grid.tile_size_level0,
            level0_size=slide.dimensions,
            tissue=tissue.to_geojson(),
            quickhash=slide.quickhash,
            slide_path=str(entry.path),
            settings={
                "min_tissue": self.min_tissue,
                "reader": slide.reader,
                "mpp_source": slide.mpp.source,
                "level": grid.level,
                "tissue_mm2": tissue.area_mm2(slide.mpp.value),
                "bad_tiles": len(stream.bad_tiles),
                **self.embedder.fidelity,
            }
            | settings_of(self._segmenter(entry)),
        )
        made_with = self._settings(entry) | {"slide_mpp": slide.mpp.value, "tissue_method": tissue.method}
        made_with = {name: value for name, value in made_with.items() if name in vars(features)}
        return replace(features, **made_with)

    def _embed_slide(self, features: Features) -> Features:
        assert self.slide_encoder is not None
        from .tile_embedding import embed_slide

        embedding = embed_slide(
            self.slide_encoder, features.features, features.cells, self.embedder.device, self.embedder.precision
        )
        return replace(features, slide_embedding=embedding, **self._slide_settings())

    def _nothing_to_embed(self, entry: SlideEntry, slide: Slide, tissue: Tissue, grid: Grid) -> SlideResult:
        self._path(entry).unlink(missing_ok=True)  # with --overwrite there may be one, of other settings
        result = _result(entry, "skipped", f"{why_no_tiles(tissue, self.min_tissue)}; see qc/{entry.slide_id}.jpg")
        area = tissue.area_mm2(slide.mpp.value)
        return replace(result, tiles=0, slide_mpp=slide.mpp.value, mpp_source=slide.mpp.source, tissue_mm2=area)

    def _done(
        self, entry: SlideEntry, features: Features, reason: str = "", seconds: float | None = None
    ) -> SlideResult:
        return replace(
            _result(entry, "done", reason),
            tiles=len(features.coords),
            bad_tiles=features.settings.get("bad_tiles"),
            slide_mpp=features.slide_mpp,
            mpp_source=features.settings.get("mpp_source"),
            tissue_mm2=features.settings.get("tissue_mm2"),
            seconds=seconds,
            features=str(self._path(entry)),
        )


def _result(entry: SlideEntry, status: Literal["done", "failed", "skipped"], reason: str) -> SlideResult:
    return SlideResult(entry.slide_id, str(entry.path), status, reason)


def failed_slide(entry: SlideEntry, error: Exception) -> SlideResult:
    """The result of a slide that an exception ended; one that is no user's mistake is printed with its traceback."""
    if isinstance(error, LongslideError):
        return _result(entry, "failed", str(error))
    if isinstance(error, OSError):  # the disk, not the program
        return _result(entry, "failed", f"{error.filename or entry.path}: {error.strerror or error}")
    traceback.print_exception(error)  # not the user's mistake: whoever reports it needs to know where
    return _result(
        entry, "failed", f"unexpected {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    )


def identity(value: object) -> object:
    """What must be equal: of weights the digest, wherever they lie."""
    return value.partition(" sha256:")[2] or value if isinstance(value, str) else value


def check_same(path: Path, existing: Features, wanted: dict[str, Any]) -> None:
    """Refuse a file made with other settings: mixed in one folder, they would be compared as if they were alike.

    Args:
        path: The feature file.
        existing: Its content.
        wanted: What it must have been made with, under the names in `Features` and its `settings`.

    Raises:
        LongslideError: Something differs; all of it is named.
    """
    made_with = vars(existing) | existing.settings | {"slide": Path(existing.slide_path or "").name}
    different = [
        f"{name} {made_with.get(name)} there, {value} now"
        for name, value in wanted.items()
        if identity(made_with.get(name)) != identity(value)
    ]
    if different:
        raise LongslideError(
            f"{path}: made with other settings ({'; '.join(different)}); choose another --output, or --overwrite"
        )

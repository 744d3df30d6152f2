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

from ..data.features import Features, read_features, write_features
from ..data.grid import Grid, make_grid
from ..data.slide import Slide, open_slide
from ..data.slide_table import SlideEntry, find_slides
from ..data.stream import TileStream
from ..data.tissue import METHOD as TISSUE_METHOD
from ..data.tissue import Tissue, find_tissue, read_tissue_mask
from ..errors import LongslideError
from .job import SUMMARY, SlideResult, claim, make_output_folder, record
from .progress import JobProgress
from .qc import draw_qc, save_qc

if TYPE_CHECKING:
    from ..models.slide_encoder import SlideEncoder
    from .tile_embedding import TileEmbedder

T = TypeVar("T")

DEFAULT_MPP = 0.5
"""Microns per pixel of the tiles where the encoder recommends none: 20x."""


def embed(
    slides: Sequence[str | Path],
    output: Path,
    tile_encoder: str,
    tile_checkpoint: str | None = None,
    slide_encoder: str | None = None,
    slide_checkpoint: str | None = None,
    pool: Literal["mean", "cls"] = "mean",
    slide_mpp: float | None = None,
    mpp: float | None = None,
    tile_px: int | None = None,
    overlap: int = 0,
    min_tissue: float = 0.1,
    max_bad_tiles: int = 0,
    batch_size: int = 64,
    threads: int = 4,
    device: str = "auto",
    precision: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
    seed: int = 0,
    overwrite: bool = False,
) -> list[SlideResult]:
    """Embed slides: one feature file a slide, a picture of its tiles in `qc/`, and `summary.csv`.

    Running it again does only what is missing. Several processes may share one output folder. One bad slide never ends
    the job.

    Args:
        slides: Slide files, folders of slides, or tables (CSV, Parquet) with a column `slide`.
        output: Folder for `<slide_id>.h5`, `qc/<slide_id>.jpg` and `summary.csv`.
        tile_encoder: Name of a tile encoder, path of a YAML file that describes one, or the name of a timm model.
        tile_checkpoint: Weights of the tile encoder: a file, a folder, or `random`. Default: the published weights.
        slide_encoder: Name of a slide encoder; without one the feature files hold tile embeddings only.
        slide_checkpoint: Weights of the slide encoder: a file, or `random`. Default: the published weights.
        pool: What the slide embedding is: the mean over the tiles, or the cls token.
        slide_mpp: Microns per pixel at level 0, for all slides that have no `mpp` in the table; overrides the file's.
        mpp: Microns per pixel of the tiles. Default: what the tile encoder recommends.
        tile_px: Edge of a tile in pixels. Default: what the tile encoder recommends.
        overlap: Pixels that neighbouring tiles share.
        min_tissue: Smallest share of a tile that must be tissue, 0 to 1.
        max_bad_tiles: Unreadable tiles that a slide may have; with more of them it fails.
        batch_size: Tiles a batch; halved when the GPU runs out of memory.
        threads: Threads that read tiles.
        device: `auto`, or a torch device such as `cuda:1` or `cpu`.
        precision: Precision of the encoders. `auto`: the tile encoder's own on a GPU, float32 on a CPU.
        seed: Seed of `random` weights.
        overwrite: Replace feature files that were made with other settings.

    Returns:
        One result a slide, in the order of the input.

    Raises:
        LongslideError: Wrong usage, found before any slide is touched.
    """
    entries = find_slides(slides, slide_mpp)
    _check_numbers(mpp, tile_px, overlap, min_tissue, max_bad_tiles, batch_size, threads)
    make_output_folder(output)

    from ..models.slide_encoder import create_slide_encoder
    from ..models.tile_encoder import create_tile_encoder
    from .tile_embedding import TileEmbedder, resolve_device, resolve_precision

    torch_device = resolve_device(device)
    encoder = create_tile_encoder(tile_encoder, checkpoint=tile_checkpoint, seed=seed).to(torch_device)
    if slide_encoder is not None and slide_checkpoint is None:
        _check_pair(slide_encoder, encoder.spec.name)
    resolved = resolve_precision(precision, encoder.spec.precision, torch_device)
    job = EmbedJob(
        output=output,
        embedder=TileEmbedder(encoder, torch_device, resolved),
        slide_encoder=None
        if slide_encoder is None
        else create_slide_encoder(
            slide_encoder, checkpoint=slide_checkpoint, pool=pool, seed=seed, tile_dim=encoder.dim
        ).to(torch_device),
        mpp=mpp or encoder.spec.mpp or DEFAULT_MPP,
        tile_px=tile_px or encoder.spec.tile_px,
        overlap=overlap,
        min_tissue=min_tissue,
        max_bad_tiles=max_bad_tiles,
        batch_size=batch_size,
        threads=threads,
        overwrite=overwrite,
    )
    results = []
    with JobProgress(len(entries)) as progress:
        progress.note(job.description)
        for prepared in one_ahead(job.prepare, entries):
            result = prepared if isinstance(prepared, SlideResult) else job.finish(prepared, progress)
            record(output, result)
            progress.slide_ended(result)
            results.append(result)
    counts = {status: sum(result.status == status for result in results) for status in ("done", "failed", "skipped")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()) + f"; see {output / SUMMARY}")
    return results


def _check_numbers(
    mpp: float | None,
    tile_px: int | None,
    overlap: int,
    min_tissue: float,
    max_bad_tiles: int,
    batch: int,
    threads: int,
) -> None:
    wrong = None
    if mpp is not None and not 0.05 <= mpp <= 100:
        wrong = f"--mpp {mpp:g} is not a plausible number of microns per pixel (0.05 to 100)"
    elif tile_px is not None and tile_px < 16:
        wrong = f"--tile-px {tile_px} is too small (at least 16)"
    elif overlap < 0 or (tile_px is not None and overlap >= tile_px):
        wrong = f"--overlap {overlap} must be at least 0 and less than --tile-px"
    elif not 0 <= min_tissue <= 1:
        wrong = f"--min-tissue {min_tissue:g} must be between 0 and 1"
    elif max_bad_tiles < 0:
        wrong = f"--max-bad-tiles {max_bad_tiles} must not be negative"
    elif batch < 1 or threads < 1:
        wrong = "--batch-size and --threads must be at least 1"
    if wrong:
        raise LongslideError(wrong)


def _check_pair(slide_encoder: str, tile_encoder: str) -> None:
    """Published slide encoders read the embeddings of one tile encoder; those of another may have the same length."""
    from ..models.slide_encoder import load_slide_encoder_spec

    spec = load_slide_encoder_spec(slide_encoder)
    if spec.tile_encoder != tile_encoder:
        raise LongslideError(
            f"the published weights of slide encoder {slide_encoder!r} read tile embeddings of {spec.tile_encoder!r}, not "
            f"of {tile_encoder!r}; use that tile encoder, or weights of your own with --slide-checkpoint"
        )


@dataclass
class PreparedSlide:
    """A slide that is claimed and waits for the encoders; `resources` frees it."""

    entry: SlideEntry
    existing: Features | None  # a file that lacks nothing but the slide embedding
    tiled: tuple[Slide, Tissue, Grid] | None  # what there is to embed otherwise
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
    slide_encoder: "SlideEncoder | None"
    mpp: float
    tile_px: int
    overlap: int
    min_tissue: float
    max_bad_tiles: int
    batch_size: int
    threads: int
    overwrite: bool

    @property
    def description(self) -> str:
        """What the job does, in a line or two, for the user to check."""
        encoder = self.embedder.encoder
        text = f"tile encoder {encoder.spec.name} ({encoder.weights})"
        if self.slide_encoder is not None:
            text += f", slide encoder {self.slide_encoder.name} ({self.slide_encoder.weights})"
        text += f"\ntiles of {self.tile_px} px at {self.mpp:g} um/px, overlap {self.overlap} px"
        recommended = (encoder.spec.tile_px, encoder.spec.mpp or self.mpp)
        if (self.tile_px, self.mpp) != recommended:
            text += f" (recommended for {encoder.spec.name}: {recommended[0]} px at {recommended[1]:g} um/px)"
        return f"{text}; {self.embedder.device}, {self.embedder.precision}"

    def prepare(self, entry: SlideEntry) -> PreparedSlide | SlideResult:
        """All that comes before the encoders: claim the slide, see what exists, open it, find tissue, lay the grid."""
        started = time.monotonic()
        with ExitStack() as resources:
            try:
                lock = claim(self.output, entry.slide_id)
                if lock is None:
                    return _result(entry, "skipped", "another process is working on it")
                resources.callback(lock.release)
                existing = self._existing(entry)
                if existing is not None and (self.slide_encoder is None or existing.slide_embedding is not None):
                    return self._done(entry, existing, "was there already")
                tiled = None
                if existing is None:
                    tiled = self._tile(entry, resources)
                    if not len(tiled[2].coords):
                        return self._nothing_to_embed(entry, *tiled)
                return PreparedSlide(entry, existing, tiled, resources.pop_all(), started)
            except Exception as error:
                return failed_slide(entry, error)

    def finish(self, prepared: PreparedSlide, progress: JobProgress) -> SlideResult:
        """All that needs the encoders, and the feature file."""
        entry = prepared.entry
        with prepared.resources:
            try:
                bad_tiles = 0
                features = prepared.existing
                if prepared.tiled is not None:
                    features, bad_tiles = self._embed_tiles(entry, *prepared.tiled, progress)
                assert features is not None
                if self.slide_encoder is not None:
                    features = self._embed_slide(features)
                write_features(self._path(entry), features)
                return self._done(entry, features, bad_tiles=bad_tiles, seconds=time.monotonic() - prepared.started)
            except Exception as error:
                return failed_slide(entry, error)

    def _path(self, entry: SlideEntry) -> Path:
        return self.output / f"{entry.slide_id}.h5"

    def _existing(self, entry: SlideEntry) -> Features | None:
        """What is there already and may stay.

        Raises:
            LongslideError: The file there is broken or was made with other settings, and may not be overwritten.
        """
        path = self._path(entry)
        if not path.exists():
            return None
        try:
            existing = read_features(path)
            wanted = self._settings(entry)
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
            "target_mpp": self.mpp,
            "tile_px": self.tile_px,
            "overlap": self.overlap,
            "min_tissue": self.min_tissue,
        }
        if entry.mpp is not None:
            settings["level0_mpp"] = entry.mpp
        if entry.tissue_mask is None:
            settings["tissue_method"] = TISSUE_METHOD
        return settings

    def _slide_settings(self) -> dict[str, Any]:
        assert self.slide_encoder is not None
        return {
            "slide_encoder": self.slide_encoder.name,
            "slide_weights": self.slide_encoder.weights,
            "pool": self.slide_encoder.pool,
        }

    def _tile(self, entry: SlideEntry, resources: ExitStack) -> tuple[Slide, Tissue, Grid]:
        slide = resources.enter_context(open_slide(entry.path, mpp=entry.mpp, slide_id=entry.slide_id))
        tissue = read_tissue_mask(entry.tissue_mask, slide) if entry.tissue_mask else find_tissue(slide)
        grid = make_grid(
            slide, tissue, mpp=self.mpp, tile_px=self.tile_px, overlap=self.overlap, min_tissue=self.min_tissue
        )
        save_qc(self.output / "qc" / f"{entry.slide_id}.jpg", draw_qc(slide, tissue, grid))
        need = len(grid.coords) * (self.embedder.encoder.dim * 4 + 16) + 2**20
        free = shutil.disk_usage(self.output).free
        if need > free:
            raise LongslideError(
                f"{self.output}: the disk is full ({free / 1e6:,.0f} MB free, {need / 1e6:,.0f} MB needed); make room"
            )
        return slide, tissue, grid

    def _embed_tiles(
        self, entry: SlideEntry, slide: Slide, tissue: Tissue, grid: Grid, progress: JobProgress
    ) -> tuple[Features, int]:
        progress.slide_started(entry.slide_id, len(grid.coords))
        stream = TileStream(
            slide, grid, batch_size=self.batch_size, threads=self.threads, max_bad_tiles=self.max_bad_tiles
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
                "mpp_source": slide.mpp.source,
                "level": grid.level,
                "tissue_mm2": tissue.area_mm2(slide.mpp.value),
            },
        )
        made_with = self._settings(entry) | {"level0_mpp": slide.mpp.value, "tissue_method": tissue.method}
        del made_with["slide"], made_with["min_tissue"]
        return replace(features, **made_with), len(stream.bad_tiles)

    def _embed_slide(self, features: Features) -> Features:
        assert self.slide_encoder is not None
        from .tile_embedding import embed_slide

        embedding = embed_slide(
            self.slide_encoder, features.features, features.cells, self.embedder.device, self.embedder.precision
        )
        return replace(features, slide_embedding=embedding, **self._slide_settings())

    def _nothing_to_embed(self, entry: SlideEntry, slide: Slide, tissue: Tissue, grid: Grid) -> SlideResult:
        reason = "no tissue found"
        if tissue.mask.any():
            reason = f"no tile has {self.min_tissue:.0%} tissue or more (--min-tissue)"
        result = _result(entry, "skipped", f"{reason}; see qc/{entry.slide_id}.jpg")
        area = tissue.area_mm2(slide.mpp.value)
        return replace(result, tiles=0, mpp=slide.mpp.value, mpp_source=slide.mpp.source, tissue_mm2=area)

    def _done(
        self,
        entry: SlideEntry,
        features: Features,
        reason: str = "",
        bad_tiles: int | None = None,
        seconds: float | None = None,
    ) -> SlideResult:
        return replace(
            _result(entry, "done", reason),
            tiles=len(features.coords),
            bad_tiles=bad_tiles,
            mpp=features.level0_mpp,
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
    traceback.print_exception(error)  # not the user's mistake: whoever reports it needs to know where
    return _result(
        entry, "failed", f"unexpected {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    )


def check_same(path: Path, existing: Features, wanted: dict[str, Any]) -> None:
    """Refuse a file made with other settings: mixed in one folder, they would be compared as if they were alike."""
    made_with = vars(existing) | existing.settings | {"slide": Path(existing.slide_path or "").name}
    different = [
        f"{name} {made_with.get(name)} there, {value} now"
        for name, value in wanted.items()
        if made_with.get(name) != value
    ]
    if different:
        raise LongslideError(
            f"{path}: made with other settings ({'; '.join(different)}); choose another --output, or --overwrite"
        )

"""The batch job: slide files in, one feature file a slide out."""

import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..data.features import Features, read_features, write_features
from ..data.grid import Grid, make_grid
from ..data.slide import Slide, open_slide
from ..data.slide_table import SlideEntry, find_slides
from ..data.stream import TileStream
from ..data.tissue import Tissue, find_tissue, read_tissue_mask
from ..errors import LongslideError
from .job import SUMMARY, SlideResult, claim, make_output_folder, record
from .progress import JobProgress

if TYPE_CHECKING:
    import torch

    from ..models.slide_encoder import SlideEncoder
    from ..models.tile_encoder import TileEncoder
    from .tile_embedding import Precision, TileEmbedder


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
    resolved = resolve_precision(precision, encoder.spec.precision, torch_device)
    job = _Job(
        output=output,
        embedder=TileEmbedder(encoder, torch_device, resolved),
        slide_encoder=None
        if slide_encoder is None
        else create_slide_encoder(
            slide_encoder, checkpoint=slide_checkpoint, pool=pool, seed=seed, tile_dim=encoder.dim
        ).to(torch_device),
        mpp=encoder.spec.mpp if mpp is None else mpp,
        tile_px=encoder.spec.tile_px if tile_px is None else tile_px,
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
        for prepared in _one_ahead(job, entries):
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


@dataclass
class _Prepared:
    """A slide that is claimed, opened and tiled, and waits for the encoder; `resources` frees it."""

    entry: SlideEntry
    slide: Slide
    tissue: Tissue
    grid: Grid
    existing: Features | None  # a file that lacks nothing but the slide embedding
    resources: ExitStack
    started: float


def _one_ahead(job: "_Job", entries: Sequence[SlideEntry]) -> Iterator[_Prepared | SlideResult]:
    """Prepare the next slide (open it, find tissue) while the encoder works on the present one."""
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as executor:
        following = executor.submit(job.prepare, entries[0])
        for entry in [*entries[1:], None]:
            current = following.result()
            if entry is not None:
                following = executor.submit(job.prepare, entry)
            yield current


@dataclass
class _Job:
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
        return f"{text}; {self.embedder.device}, {self.embedder.precision}"

    def prepare(self, entry: SlideEntry) -> _Prepared | SlideResult:
        """All that comes before the encoder: claim the slide, see what exists, open it, find tissue, lay the grid."""
        started = time.monotonic()
        with ExitStack() as resources:
            try:
                lock = claim(self.output, entry.slide_id)
                if lock is None:
                    return self._result(entry, "skipped", "another process is working on it")
                resources.callback(lock.release)
                existing = self._existing(entry)
                if existing is not None and (self.slide_encoder is None or existing.slide_embedding is not None):
                    return self._done(entry, existing, reason="was there already")
                tiled = None if existing is not None else self._tile(entry, resources)
                if isinstance(tiled, SlideResult):
                    return tiled
                return _Prepared(entry, existing, tiled, resources.pop_all(), started)
            except Exception as error:
                return self._failed(entry, error, started)

    def finish(self, prepared: _Prepared, progress: JobProgress) -> SlideResult:
        """All that needs the encoders, and the feature file."""
        entry = prepared.entry
        with prepared.resources:
            try:
                features = prepared.existing
                if features is None:
                    assert prepared.tiled is not None
                    features = self._embed_tiles(entry, prepared.tiled, progress)
                if self.slide_encoder is not None:
                    features = self._embed_slide(features)
                write_features(self._path(entry), features)
                return self._done(entry, features, seconds=time.monotonic() - prepared.started)
            except Exception as error:
                return self._failed(entry, error, prepared.started)

    def _path(self, entry: SlideEntry) -> Path:
        return self.output / f"{entry.slide_id}.h5"

    def _existing(self, entry: SlideEntry) -> Features | None:
        """The tile embeddings that are there already; without the slide embedding if that is not the one asked for.

        Raises:
            LongslideError: The file there is broken or was made with other settings, and may not be overwritten.
        """
        path = self._path(entry)
        if not path.exists():
            return None
        try:
            existing = read_features(path)
            _check_same(path, existing, self._settings(entry))
            if existing.slide_embedding is not None and self.slide_encoder is not None:
                _check_same(path, existing, self._slide_settings())
        except LongslideError:
            if self.overwrite:
                return None
            raise
        return existing

    def _settings(self, entry: SlideEntry) -> dict[str, object]:
        """What makes two feature files comparable, under its name in `Features`."""
        encoder = self.embedder.encoder
        settings: dict[str, object] = {
            "encoder": encoder.spec.name,
            "weights": encoder.weights,
            "precision": self.embedder.precision,
            "target_mpp": self.mpp,
            "tile_px": self.tile_px,
            "overlap": self.overlap,
            "min_tissue": self.min_tissue,
            "slide_name": entry.path.name,
        }
        if entry.mpp is not None:
            settings["level0_mpp"] = entry.mpp
        return settings

"""The batch job: slide files in, one feature file per slide out; or slide embeddings from feature files that exist."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...data.slides.slide_table import IdFrom, SlideEntry, find_slides
from ...data.tiles.grid import MIN_TISSUE
from ...data.tissue.base import TissueSegmenter
from ...errors import LongslideError
from ...ranges import checked
from ..batch.batch import PREPARED_AHEAD, run_batch
from ..batch.devices import DeviceRun, Feed
from ..batch.ledger import SUMMARY, make_output_folder
from ..batch.places import check_places, workers_on
from ..batch.rerun import refuse_mistaken_rerun, with_results
from ..batch.result import SlideResult, counted
from ..batch.shards import SHARDS, Shard
from ..batch.watched import WatchedProcesses
from ..log_file import logged
from .choices import (
    SlideEncoderChoice,
    TileEncoderChoice,
    check_slide_encoder,
    look_at_tile_encoder,
    resolve_tiling,
)
from .contact_sheet import write_contact_sheet
from .job import EmbedJob
from .layout import Tiling
from .local_copies import LocalCopies
from .slide_embedding import embed_features

if TYPE_CHECKING:
    from ...models.tile_encoder.spec import TileEncoderSpec


@checked
@logged
def embed(
    slides: str | Path | Sequence[str | Path],
    output: str | Path,
    tile_encoder: TileEncoderChoice | None = None,
    tile_checkpoint: str | Path | None = None,
    slide_encoder: SlideEncoderChoice | None = None,
    slide_checkpoint: str | Path | None = None,
    pool: Literal["mean", "cls"] = "mean",
    slide_mpp: float | None = None,
    tile_mpp: float | None = None,
    tile_px: int | None = None,
    overlap: int = 0,
    min_tissue: float = MIN_TISSUE,
    tissue: TissueSegmenter | None = None,
    reader: str | None = None,
    id_from: IdFrom = "name",
    max_bad_tiles: int = 0,
    max_blur: float = 1.0,
    slide_timeout: float = 600.0,
    batch_size: int | None = None,
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    cache_dir_gb: float | None = None,
    device: str = "auto",
    devices: str | None = None,
    ray: str | None = None,
    shard: str | None = None,
    precision: Literal["auto", "float32", "float16", "bfloat16", "float8"] = "auto",
    seed: int = 0,
    overwrite: bool = False,
    log_file: str | Path | None = None,
    trust_remote_code: bool = False,
) -> list[SlideResult]:
    """Embed slides: one feature file per slide, a picture of its tiles in `qc/`, `qc/index.html`, and `summary.csv`.

    Without a tile encoder the input is feature files, of Longslide, TRIDENT, AtlasPatch, CLAM, prov-gigapath or STAMP, and
    the slide encoder makes slide embeddings from them: into the files themselves where they are in the output folder.

    Running it again does only what is missing. Several processes may share one output folder. One bad slide never ends
    the job.

    Args:
        slides: Slide files, folders of slides, or tables (CSV, TSV, Parquet, Excel) with a column `slide`. Without a
            tile encoder: feature files, or folders of them.
        output: Folder for `<slide_id>.h5`, `qc/<slide_id>.jpg` and `summary.csv`.
        tile_encoder: Name of a tile encoder or of a timm model, path of a YAML file that describes one, or
            `package.module:factory`; in Python also a `TileEncoder` or another torch module. None takes the tile
            embeddings of feature files.
        tile_checkpoint: Weights of the tile encoder: a file, a folder, or `random`. Default: the published weights.
        slide_encoder: Name of a slide encoder, path of a YAML file that describes one, `package.module:factory`, or a
            repository on the hub or a folder with code of their own (see `trust_remote_code`); in Python also the encoder
            itself. Without one the feature files hold tile embeddings only.
        slide_checkpoint: Weights of the slide encoder: a file, or `random`. Default: the published weights.
        pool: What the slide embedding is: the mean over the tiles, or the cls token.
        slide_mpp: Microns per pixel at level 0, for all slides that have no `slide_mpp` in the table; overrides the file's.
        tile_mpp: Microns per pixel of the tiles. Default: what the tile encoder recommends.
        tile_px: Edge of a tile in pixels. Default: what the tile encoder recommends.
        overlap: Pixels that neighbouring tiles share.
        min_tissue: Smallest share of a tile that must be tissue, 0 to 1.
        tissue: Tissue segmenter: `optical-density` (the default), `hest`, `grandqc`, or one of your own by its dotted path.
        reader: Slide reader, by name or dotted path. Default: the first one that takes the file.
        id_from: Makes ids from the names of slide files, or from their paths, so that folders may hold files of equal
            names: `site_a/1.svs` is `site_a__1`. A column `slide_id` comes first.
        max_bad_tiles: Unreadable tiles that a slide may have; with more of them it fails.
        max_blur: Tiles more blurred than this are left out: 0 is sharp, out of focus more than 0.45. Default: none.
        slide_timeout: Seconds that opening a slide and finding its tissue may take, and each batch of its tiles; then it
            fails, and the next one begins.
        batch_size: Tiles per batch. Default: what is fastest on the device. Halved when the GPU runs out of memory.
        threads: Threads or processes that read tiles. Default: one on each core, at most 16.
        cache_dir: Folder on a local disk to which slides are copied before they are read, and where they are deleted
            afterwards: for slides on slow storage.
        cache_dir_gb: Gigabytes that the copies may take up there. Default: half of what is free.
        device: `auto`, or a torch device such as `cuda:1` or `cpu`.
        devices: Several devices, with a process on each: `all` GPUs, or some as `0,1,5`. One that dies gives its slides to
            the others.
        ray: Work on the GPUs of a Ray cluster: `auto` where this machine is one of its nodes, or the address of its head.
        shard: Embed only this shard of the slides, such as `3/16`, for job arrays. `longslide merge` joins the summaries.
        precision: Precision of the encoders. `auto`: the tile encoder's own on a GPU, float32 on a CPU.
        seed: Seed of `random` weights.
        overwrite: Replace feature files that were made with other settings.
        log_file: Append JSON lines to this file: one for each slide, minute and note.
        trust_remote_code: Let a slide encoder that brings code of its own run it, with all your rights; the feature files
            say which code.

    Returns:
        One result per slide, in the order of the input.

    Raises:
        LongslideError: Wrong usage, found before any slide is touched.
    """
    output = Path(output)
    check_places(device, devices, ray)
    if tile_encoder is None and (devices, ray) != (None, None):
        raise LongslideError("--devices and --ray are for embedding slides (--tile-encoder)")
    if tile_encoder is None:
        results = embed_features(
            slides,
            output,
            slide_encoder,
            slide_checkpoint,
            pool,
            device,
            precision,
            shard=shard,
            seed=seed,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
    else:
        entries = find_slides(slides, slide_mpp, ask=False, reader=reader, id_from=id_from)
        spec, tile_encoder, tile_checkpoint = look_at_tile_encoder(tile_encoder, tile_checkpoint, seed)
        tiling = resolve_tiling(spec, tile_mpp, tile_px, overlap, min_tissue, tissue, reader)
        if slide_encoder is not None:
            check_slide_encoder(slide_encoder, slide_checkpoint, spec.name, trust_remote_code)
        make_output_folder(output)
        part = None if shard is None else Shard.of_slides(shard, entries)
        entries = entries if part is None else list(part.entries)

        embedding = _Embedding(
            entries=entries,
            shard=part,
            output=output,
            tile_encoder=tile_encoder,
            tile_checkpoint=tile_checkpoint,
            slide_encoder=slide_encoder,
            slide_checkpoint=slide_checkpoint,
            pool=pool,
            spec=spec,
            tiling=tiling,
            max_bad_tiles=max_bad_tiles,
            max_blur=max_blur,
            slide_timeout=slide_timeout,
            batch_size=batch_size,
            threads=threads,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            cache_dir_gb=cache_dir_gb,
            precision=precision,
            seed=seed,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
        with workers_on(devices, ray, output) as workers:
            if workers:
                work = replace(embedding, entries=with_results(entries, output))  # the others come one by one
                results = DeviceRun(workers, work, entries, output, part).run()
            else:
                results = embedding(device)
        if shard is None:
            try:
                write_contact_sheet(output)
            except LongslideError as error:  # the feature files are there
                print(error)
    print(f"{counted(results)}; see {output / (SUMMARY if shard is None else SHARDS)}")
    return results


@dataclass(frozen=True)
class _Embedding:
    """What `embed` does once its options are understood, on one device; the fields are its arguments."""

    entries: list[SlideEntry]
    shard: Shard | None
    output: Path
    tile_encoder: TileEncoderChoice
    tile_checkpoint: str | Path | None
    slide_encoder: SlideEncoderChoice | None
    slide_checkpoint: str | Path | None
    pool: Literal["mean", "cls"]
    spec: "TileEncoderSpec"
    tiling: Tiling
    max_bad_tiles: int
    max_blur: float
    slide_timeout: float
    batch_size: int | None
    threads: int | None
    cache_dir: Path | None
    cache_dir_gb: float | None
    precision: str
    seed: int
    overwrite: bool
    trust_remote_code: bool

    def __call__(self, device: str, feed: Feed | None = None) -> list[SlideResult]:
        """Embed all slides, or those that a feed gives.

        Raises:
            LongslideError: Wrong usage, found before any slide is touched.
        """
        from ...models.slide_encoder.base import load_slide_encoder
        from ...models.tile_encoder.encoder import create_tile_encoder
        from .tile_embedding import TileEmbedder, resolve_device, resolve_precision, slide_encoder_on

        with ExitStack() as resources:
            watched = resources.enter_context(WatchedProcesses(self.slide_timeout, PREPARED_AHEAD))
            copies = None
            if self.cache_dir is not None:
                paths = [entry.path for entry in self.entries] if feed is None else []
                copies = resources.enter_context(LocalCopies(self.cache_dir, self.cache_dir_gb, paths))
                if feed is not None:
                    feed.on_slide = lambda entry: copies.expect(entry.path)
            torch_device = resolve_device(device)
            slide_model = None
            if self.slide_encoder is not None:  # before the tile encoder, whose weights are far larger
                slide_model = load_slide_encoder(
                    self.slide_encoder,
                    checkpoint=self.slide_checkpoint,
                    pool=self.pool,
                    seed=self.seed,
                    tile_encoder=self.spec.name,
                    tile_dim=self.spec.dim,
                    trust_remote_code=self.trust_remote_code,
                )
                slide_model = slide_encoder_on(torch_device, slide_model)
            encoder = create_tile_encoder(self.tile_encoder, checkpoint=self.tile_checkpoint, seed=self.seed)
            precision = resolve_precision(self.precision, self.spec.precision, torch_device)
            job = EmbedJob(
                output=self.output,
                embedder=TileEmbedder(encoder, torch_device, precision, self.batch_size),
                slide_encoder=slide_model,
                tiling=self.tiling,
                max_bad_tiles=self.max_bad_tiles,
                max_blur=self.max_blur,
                threads=self.threads,
                overwrite=self.overwrite,
                watched=watched,
                copies=copies,
            )
            if not self.overwrite:
                refuse_mistaken_rerun(self.entries, job.existing, self.output)
            results = run_batch(job, self.entries if feed is None else feed, self.output, shard=self.shard)
        job.embedder.waits.say(device, feed)
        return results

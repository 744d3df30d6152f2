"""The batch job: slide files in, one feature file per slide out; or slide embeddings from feature files that exist."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from ...data.slides.base import READERS
from ...data.slides.slide_table import IdFrom, find_slides
from ...data.tissue.base import TissueSegmenter
from ...data.tissue.optical_density import OpticalDensity
from ...errors import LongslideError
from ...ranges import checked
from ..batch.batch import PREPARED_AHEAD, run_batch
from ..batch.ledger import SUMMARY, make_output_folder
from ..batch.rerun import refuse_mistaken_rerun
from ..batch.result import SlideResult
from ..batch.watched import WatchedProcesses
from .choices import SlideEncoderChoice, TileEncoderChoice, check_slide_encoder, look_at_tile_encoder, resolve_tiles
from .contact_sheet import write_contact_sheet
from .job import EmbedJob
from .local_copies import LocalCopies
from .slide_embedding import embed_features


@checked
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
    min_tissue: float = 0.1,
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
    precision: Literal["auto", "float32", "float16", "bfloat16", "float8"] = "auto",
    seed: int = 0,
    overwrite: bool = False,
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
        id_from: Makes ids of the names of slide files, or of their paths, so that equal names in different folders go
            together: `site_a/1.svs` is `site_a__1`. A column `slide_id` comes first.
        max_bad_tiles: Unreadable tiles that a slide may have; with more of them it fails.
        max_blur: Tiles more blurred than this are left out: 0 is sharp, out of focus more than 0.45. Default: none is.
        slide_timeout: Seconds that opening a slide and finding its tissue may take, and each batch of its tiles; then it
            fails, and the next one begins.
        batch_size: Tiles a batch. Default: what is fastest on the device. Halved when the GPU runs out of memory.
        threads: Threads or processes that read tiles. Default: one on each core, at most 16.
        cache_dir: Folder on a local disk to which slides are copied before they are read, and where they are deleted
            afterwards: for slides on slow storage.
        cache_dir_gb: What the copies may take there, in gigabytes. Default: half of what is free.
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
    if tile_encoder is None:
        results = embed_features(
            slides, output, slide_encoder, slide_checkpoint, pool, device, precision, seed=seed, overwrite=overwrite
        )
    else:
        entries = find_slides(slides, slide_mpp, ask=False, reader=reader, id_from=id_from)
        spec, tile_encoder, tile_checkpoint = look_at_tile_encoder(tile_encoder, tile_checkpoint, seed)
        tile_mpp, tile_px = resolve_tiles(spec, tile_mpp, tile_px, overlap, min_tissue)
        if slide_encoder is not None:
            check_slide_encoder(slide_encoder, slide_checkpoint, spec.name)
        if reader is not None:
            reader = READERS.name_of(READERS.get(reader))
        make_output_folder(output)

        from ...models.slide_encoder.base import load_slide_encoder
        from ...models.tile_encoder.encoder import create_tile_encoder
        from .tile_embedding import TileEmbedder, resolve_device, resolve_precision, slide_encoder_on

        with ExitStack() as resources:
            watched = resources.enter_context(WatchedProcesses(slide_timeout, PREPARED_AHEAD))
            copies = None
            if cache_dir is not None:
                paths = [entry.path for entry in entries]
                copies = resources.enter_context(LocalCopies(Path(cache_dir), cache_dir_gb, paths))
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
                max_blur=max_blur,
                threads=threads,
                overwrite=overwrite,
                watched=watched,
                copies=copies,
            )
            if not overwrite:
                refuse_mistaken_rerun(entries, job.existing, output)
            results = run_batch(job, entries, output)
        if job.embedder.waits.tiles:
            print(job.embedder.waits)
        try:
            write_contact_sheet(output)
        except LongslideError as error:  # the feature files are there
            print(error)
    counts = {status: sum(result.status == status for result in results) for status in ("done", "failed", "skipped")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()) + f"; see {output / SUMMARY}")
    return results

"""`longslide tiles`: the tiles of slides as pictures, the very pixels that a tile encoder gets."""

from collections.abc import Sequence
from pathlib import Path

from ...data.slides.slide_table import IdFrom, find_slides
from ...data.tiles.grid import MIN_TISSUE
from ...data.tissue.base import TissueSegmenter
from ...data.tissue.optical_density import OpticalDensity
from ...errors import LongslideError
from ...ranges import checked
from ..batch.batch import PREPARED_AHEAD, run_batch
from ..batch.ledger import SUMMARY, make_output_folder
from ..batch.rerun import refuse_mistaken_rerun
from ..batch.result import SlideResult, counted
from ..batch.watched import WatchedProcesses
from ..embed.choices import resolve_tiling
from ..log_file import logged
from .job import TilesJob
from .picture_files import Layout


@checked
@logged
def tiles(
    slides: str | Path | Sequence[str | Path],
    output: str | Path,
    features: str | Path | None = None,
    layout: Layout = "webdataset",
    tiles_per_shard: int = 10_000,
    tile_encoder: str | None = None,
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
    threads: int | None = None,
    overwrite: bool = False,
    log_file: str | Path | None = None,
) -> list[SlideResult]:
    """Write tiles as PNG: the tiles on tissue, as `embed` chooses them, or those of feature files that exist.

    Running it again does only what is missing. Several processes may share one output folder. One bad slide never ends
    the job.

    Args:
        slides: Slide files, folders of slides, or tables (CSV, TSV, Parquet, Excel) with a column `slide`.
        output: Folder for the pictures, a `<slide_id>.json` for each slide that is complete, and `summary.csv`.
        features: Folder of feature files `<slide_id>.h5` whose tiles are written, instead of those that the options below
            choose.
        layout: `webdataset`: tar files `<slide_id>-000000.tar` with `<slide_id>/<x>_<y>.png` and `.json`; `png`: folders
            `<slide_id>/<x>_<y>.png`. x and y are level-0 pixels.
        tiles_per_shard: Most tiles in one tar file.
        tile_encoder: Take the tiles that this tile encoder recommends.
        slide_mpp: Microns per pixel at level 0, for all slides that have no `slide_mpp` in the table; overrides the file's.
        tile_mpp: Microns per pixel of the tiles. Default: what the tile encoder recommends, or 0.5.
        tile_px: Edge of a tile in pixels. Default: what the tile encoder recommends, or 256.
        overlap: Pixels that neighbouring tiles share.
        min_tissue: Smallest share of a tile that must be tissue, 0 to 1.
        tissue: Tissue segmenter, as `embed` takes it.
        reader: Slide reader, as `embed` takes it.
        id_from: What ids are made from, as `embed` takes it.
        max_bad_tiles: Unreadable tiles that a slide may have; with more of them it fails.
        max_blur: Leave out tiles more blurred than this, 0 to 1, as `embed` does.
        slide_timeout: Seconds that opening a slide and finding its tissue may take, as `embed` takes it.
        threads: Threads that read and compress tiles. Default: one on each core.
        overwrite: Replace pictures that were made with other settings.
        log_file: Append JSON lines to this file: one for each slide, minute and note.

    Returns:
        One result per slide, in the order of the input.

    Raises:
        LongslideError: Wrong usage, found before any slide is touched.
    """
    output = Path(output)
    tissue = tissue or OpticalDensity()  # which the command line gives by default
    chosen = (tile_encoder, tile_mpp, tile_px)
    if features is not None and (
        any(one is not None for one in chosen)
        or overlap
        or tissue != OpticalDensity()
        or max_blur < 1
        or min_tissue != MIN_TISSUE
    ):
        raise LongslideError(
            "--features says which tiles: --tile-encoder, --tile-mpp, --tile-px, --overlap, --tissue,"
            " --min-tissue and --max-blur do not"
        )
    if features is not None and not Path(features).is_dir():
        raise LongslideError(
            f"{features}: no such folder of feature files; give the output folder of `longslide embed`"
        )
    if features is not None and Path(features).resolve() == output.resolve():
        raise LongslideError(
            f"{output}: the folder of the features, which has its own {SUMMARY}; choose another --output"
        )
    entries = find_slides(slides, slide_mpp, ask=False, reader=reader, id_from=id_from)
    spec = None
    if tile_encoder is not None:
        from ...models.tile_encoder.spec import load_tile_encoder_spec

        spec = load_tile_encoder_spec(tile_encoder)
    tiling = resolve_tiling(spec, tile_mpp, tile_px, overlap, min_tissue, tissue, reader)
    make_output_folder(output)
    with WatchedProcesses(slide_timeout, PREPARED_AHEAD) as watched:
        job = TilesJob(
            output=output,
            features=None if features is None else Path(features),
            layout=layout,
            tiles_per_shard=tiles_per_shard,
            tiling=tiling,
            max_bad_tiles=max_bad_tiles,
            max_blur=max_blur,
            watched=watched,
            threads=threads,
            overwrite=overwrite,
        )
        if not overwrite:
            refuse_mistaken_rerun(entries, job.existing, output)
        results = run_batch(job, entries, output)
    print(f"{counted(results)}; see {output / SUMMARY}")
    return results

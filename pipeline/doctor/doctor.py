"""The check before a long run: what will go wrong with these slides, these weights, this machine."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import rich.box
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from ...data.slides.slide_table import IdFrom, find_slides
from ...data.tiles.grid import MIN_TISSUE
from ...data.tissue.base import TissueSegmenter
from ...errors import LongslideError
from ...ranges import checked
from ...task import TaskKind
from ..batch.progress import duration
from ..batch.watched import WatchedProcess, can_be_sent
from ..embed.choices import SlideEncoderChoice, TileEncoderChoice, look_at_tile_encoder, resolve_tiling
from ..embed.layout import LOOKED_AT_PX, look_at
from .label_check import LabelCheck, check_labels, with_twins
from .machine_check import (
    DiskCheck,
    EncoderCheck,
    check_disk,
    check_slide_encoder_weights,
    check_tile_encoder,
    print_machine,
    size,
)
from .slide_check import SlideCheck, check_slide, mark_duplicates
from .starter_table import check_starter_table, write_starter_table

# The width of GigaPath's and UNI2's embeddings; only for the disk estimate when no encoder is named.
DIM_WITHOUT_ENCODER = 1536


@checked
def doctor(
    slides: str | Path | Sequence[str | Path] = (),
    tile_encoder: TileEncoderChoice | None = None,
    tile_checkpoint: str | Path | None = None,
    slide_encoder: SlideEncoderChoice | None = None,
    slide_checkpoint: str | Path | None = None,
    slide_mpp: float | None = None,
    tile_mpp: float | None = None,
    tile_px: int | None = None,
    overlap: int = 0,
    min_tissue: float = MIN_TISSUE,
    tissue: TissueSegmenter | None = None,
    reader: str | None = None,
    id_from: IdFrom = "name",
    slide_timeout: float = 600.0,
    threads: int | None = None,
    device: str = "auto",
    precision: Literal["auto", "float32", "float16", "bfloat16", "float8"] = "auto",
    output: str | Path = ".",
    label: str | Path | None = None,
    label_column: list[str] | str | None = None,
    task: TaskKind | None = None,
    patient_column: str | None = None,
    write_table: str | Path | None = None,
    trust_remote_code: bool = False,
) -> "list[SlideCheck | LabelCheck | EncoderCheck | DiskCheck]":
    """Open every slide, find its tissue, read some tiles, and look at the labels, the weights, the GPU and the disk.

    Args:
        slides: Slide files, folders of slides, or tables (CSV, TSV, Parquet, Excel) with a column `slide`. May be left out
            where a table of labels is given: then that alone is looked at, and all its slides count.
        tile_encoder: Also check this tile encoder: its weights, and how many tiles a second it embeds here.
        tile_checkpoint: Weights of the tile encoder, as `embed` takes them.
        slide_encoder: Also check this slide encoder's weights.
        slide_checkpoint: Weights of the slide encoder, as `embed` takes them.
        slide_mpp: Microns per pixel at level 0, for all slides that have no `slide_mpp` in the table; overrides the file's.
        tile_mpp: Microns per pixel of the tiles. Default: what the tile encoder recommends, or 0.5.
        tile_px: Edge of a tile in pixels. Default: what the tile encoder recommends, or 256.
        overlap: Pixels that neighbouring tiles share.
        min_tissue: Smallest share of a tile that must be tissue, 0 to 1.
        tissue: Tissue segmenter, as `embed` takes it.
        reader: Slide reader, as `embed` takes it.
        id_from: What ids are made from, as `embed` takes it.
        slide_timeout: Seconds that the check of a slide may take.
        threads: Threads or processes that read tiles. Default: one on each core, at most 16.
        device: `auto`, or a torch device such as `cuda:1` or `cpu`.
        precision: Precision of the encoder, as `embed` takes it.
        output: Folder whose disk must hold the feature files.
        label: Table of labels, as `fit` takes it: its classes, sites and patients, slides without label, labels without
            slide, and which splits it allows.
        label_column: Its label column; several for a multilabel task, time and event for survival. Default: `label`.
        task: What is to be predicted. Default: as the labels look (binary, multiclass, regression or multilabel).
        patient_column: Column of that table that names the patient, if it has another name; `none` for no patients.
        write_table: Write a CSV to start from: one row per slide, with the columns that `embed` and `fit` take.
        trust_remote_code: Let a slide encoder that brings code of its own run it, as `embed` does.

    Returns:
        What was found about each slide, then about the labels and the encoders that were named, and last about the disk.

    Raises:
        LongslideError: Wrong usage, found before any slide is touched.
    """
    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:
        console = Console(width=160, soft_wrap=True, highlight=False)  # a log is not 80 characters wide
    given = slides if isinstance(slides, str | Path) else list(slides)
    if not given and (label is None or write_table is not None):
        raise LongslideError("name slides, folders of slides or a table of them; only --label TABLE does without")
    entries = find_slides(given, slide_mpp, ask=False, reader=reader, id_from=id_from) if given else []
    spec = None
    if tile_encoder is not None:
        spec, tile_encoder, tile_checkpoint = look_at_tile_encoder(tile_encoder, tile_checkpoint, 0)
    tiling = resolve_tiling(spec, tile_mpp, tile_px, overlap, min_tissue, tissue, reader)
    if slide_encoder is not None and spec is None:
        raise LongslideError("--slide-encoder needs --tile-encoder: it reads the embeddings of that one")
    if write_table is not None:
        check_starter_table(Path(write_table))
    labels: list[LabelCheck] = []
    if label is not None:
        files = {entry.slide_id: entry.path for entry in entries}
        labels.append(check_labels(Path(label), files if given else None, label_column, task, patient_column))
    elif label_column or task or patient_column:
        raise LongslideError("--label-column, --task and --patient-column are about a table: give --label")

    chosen = tiling.reader_class
    look = partial(check_slide, tiling=tiling, reader=chosen, threads=threads)
    checks = []
    stays = not can_be_sent(tiling)
    with WatchedProcess(slide_timeout) as watched:
        for entry in track(entries, "checking slides", console=Console(stderr=True), transient=True):
            try:
                if stays:  # here, and so first where the library that reads the slide may crash
                    watched.call(entry.path, look_at, entry.path, chosen, LOOKED_AT_PX)
                checks.append(watched.call(entry.path, look, entry))
            except LongslideError as error:
                checks.append(SlideCheck(entry.slide_id, entry.shown, problem=str(error)))
    checks = mark_duplicates(checks)
    encoders = []
    if tile_encoder is not None and spec is not None:
        encoders.append(check_tile_encoder(spec.name, tile_encoder, tile_checkpoint, tiling.tile_px, device, precision))
        if slide_encoder is not None:
            encoders.append(check_slide_encoder_weights(slide_encoder, slide_checkpoint, spec, trust_remote_code))

    tiles = sum(check.tiles for check in _readable(checks))
    disk = check_disk(tiles, encoders, spec.dim if spec else DIM_WITHOUT_ENCODER, Path(output))
    labels = [with_twins(found, checks) for found in labels]
    if write_table is not None:
        write_starter_table(Path(write_table), entries, checks, labels[0].cells if labels else {})

    if checks:
        console.print(_table(checks))
    _print_problems(console, [*checks, *labels, *encoders, disk])
    for heading, text in (line for found in labels for line in found.lines):
        console.print(escape(f"{heading:13} {text}"))
    if checks or encoders:
        print_machine(console, encoders)
    if checks:
        _print_totals(console, checks, encoders)
        note = "" if spec else f" at {DIM_WITHOUT_ENCODER:,} numbers per tile"
        console.print(f"disk          {size(disk.need)}{note}, {size(disk.free)} free in {escape(str(disk.folder))}")
    if write_table is not None:
        console.print(f"table         {escape(str(write_table))}: one row per slide, to fill in")
    return [*checks, *labels, *encoders, disk]


def _table(checks: list[SlideCheck]) -> Table:
    table = Table(box=rich.box.SIMPLE_HEAD)
    for column in ("slide", "size", "levels", "mpp (from)", "tissue mm2", "tiles", ""):
        table.add_column(column, justify="left" if column in ("slide", "") else "right", no_wrap=True)
    for check in checks:
        table.add_row(
            escape(check.slide_id),
            f"{check.width} x {check.height}" if check.width else "",
            str(check.levels or ""),
            f"{check.slide_mpp:.4g} ({check.mpp_source})" if check.slide_mpp else "",
            "" if check.tissue_mm2 is None else f"{check.tissue_mm2:.4g}",
            f"{check.tiles:,}",
            "[bold red]problem[/]" if check.problem else f"[yellow]{escape(check.remark)}[/]",
        )
    return table


def _print_problems(console: Console, checks: Sequence[SlideCheck | LabelCheck | EncoderCheck | DiskCheck]) -> None:
    for check in checks:
        if check.problem:
            name = f"{check.slide_id}: " if isinstance(check, SlideCheck) else ""
            console.print(f"[bold red]problem[/] {escape(name + check.problem)}")


def _readable(checks: list[SlideCheck]) -> list[SlideCheck]:
    """What `embed` gets through: also slides that are copies of others."""
    return [check for check in checks if check.tiles_per_second]


def _print_totals(console: Console, checks: list[SlideCheck], encoders: list[EncoderCheck]) -> None:
    readable = _readable(checks)
    tiles = sum(check.tiles for check in readable)
    reading = sum(check.tiles / check.tiles_per_second for check in readable if check.tiles_per_second)
    hours = f"{duration(reading)} to read them"
    if encoders and encoders[0].tiles_per_second:
        embedding = tiles / encoders[0].tiles_per_second
        hours += f", {duration(embedding)} to embed them; both at once {duration(max(reading, embedding))}"
    elif not encoders:
        hours += "; name a --tile-encoder to learn how long embedding takes"
    console.print(f"slides        {sum(check.ok for check in checks)} of {len(checks)} without problem")
    console.print(f"tiles         {tiles:,}: {hours}")

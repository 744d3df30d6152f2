"""A look at all feature files before training: do they belong together, are they sound, what are their moments."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import Progress

from ...errors import LongslideError
from ...plurals import count
from ..table import listed
from .cache import FeatureCache
from .feature_file import read_features
from .features import Features
from .preprocessing import Preprocessing, agreed
from .statistics import SlideMoments, feature_digest

T = TypeVar("T")


@dataclass(frozen=True)
class FeatureSurvey:
    """What the feature files of a cohort are.

    Attributes:
        tiles: `(N,)` int64 tiles of each slide.
        dim: Length of a tile embedding (of a slide embedding, if those are used).
        moments: Of each slide.
        preprocessing: What made them, the slide encoder only if slide embeddings are used.
        notes: What the user should know.
    """

    tiles: np.ndarray
    dim: int
    moments: tuple[SlideMoments, ...]
    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()


def survey_features(
    files: Sequence[Path],
    cache: FeatureCache,
    *,
    order: Sequence[int] | None = None,
    threads: int = 4,
    quiet: bool = False,
) -> FeatureSurvey:
    """Look at all files: first at what they say of themselves, which is quick; then at the embeddings, to fill the cache.

    Args:
        files: Feature files.
        cache: Reads them.
        order: All numbers of `files`, those first that should stay in memory if not all can.
        threads: Threads that read.
        quiet: Show no progress.

    Returns:
        What was found.

    Raises:
        LongslideError: A file that cannot be read, has no tiles, or has NaN or infinite embeddings; files of several
            widths, encoders or tile sizes.
    """
    headers: list[Features] = []
    crowded: list[str] = []
    for path, (header, twice) in _each(files, _read_header, "feature files", threads, quiet):
        headers.append(header)
        if not len(header.features):
            raise LongslideError(f"{path}: no tiles, an empty bag; leave the slide out of the table, or embed it again")
        if cache.slide_embeddings and header.slide_embedding is None:
            raise LongslideError(
                f"{path}: no slide embedding; run `longslide embed` with --slide-encoder, or choose an aggregator "
                "that reads tiles (--model.aggregator)"
            )
        _check_width(files[0], headers[0], path, header)
        if twice:
            crowded.append(path.name)
    settings = [Preprocessing.of(header) for header in headers]
    preprocessing, notes = agreed(files, settings if cache.slide_embeddings else [each.of_tiles for each in settings])
    if crowded and not cache.slide_embeddings:
        notes.append(
            f"{count(len(crowded), 'feature file has', 'feature files have')} two tiles in one grid cell, "
            f"which slide encoders refuse: {listed(crowded)}"
        )

    def read(path: Path) -> SlideMoments:
        features = cache.read(path).features
        with np.errstate(invalid="ignore", over="ignore"):
            mean = features.mean(0, dtype=np.float32)
        if not np.isfinite(mean).all():
            if np.isfinite(features).all():  # sums of large float16 numbers
                raise LongslideError(f"{path}: embeddings too large to average; embed the slide again in float32")
            bad = int((~np.isfinite(features)).any(1).sum())
            raise LongslideError(
                f"{path}: {count(bad, 'tile has', 'tiles have')} NaN or infinite features; embed the slide again"
            )
        return SlideMoments(len(features), mean, features.var(0, dtype=np.float32), digest=feature_digest(features))

    order = range(len(files)) if order is None else order
    embeddings = _each([files[number] for number in order], read, "features", threads, quiet)
    found_of = {number: found for number, (_, found) in zip(order, embeddings, strict=True)}
    moments = [
        replace(found_of[number], slide_mpp=header.slide_mpp, quickhash=header.quickhash)
        for number, header in enumerate(headers)
    ]
    return FeatureSurvey(
        tiles=np.array([found.tiles for found in moments], np.int64),
        dim=len(moments[0].mean),
        moments=tuple(moments),
        preprocessing=preprocessing,
        notes=tuple(notes),
    )


def _each(
    files: Sequence[Path], work: Callable[[Path], T], what: str, threads: int, quiet: bool
) -> Iterator[tuple[Path, T]]:
    """The results in the order of the files; the first error ends it."""
    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=quiet or not console.is_terminal)
    with bar, ThreadPoolExecutor(threads, thread_name_prefix="survey") as pool:
        pending = [pool.submit(work, path) for path in files]
        try:
            for path, future in zip(bar.track(files, description=f"reading {what}"), pending, strict=True):
                yield path, future.result()
        finally:
            for future in pending:
                future.cancel()


def _read_header(path: Path) -> tuple[Features, bool]:
    """What the file says of itself, without what takes memory; and whether two tiles share a cell."""
    header = read_features(path, embeddings=False)
    cells = header.cells
    twice = len(np.unique(cells, axis=0)) < len(cells)
    return replace(header, coords=header.coords[:0], tissue=None), twice


def _check_width(first_path: Path, first: Features, path: Path, header: Features) -> None:
    pairs = [(first.features.shape[1], header.features.shape[1], "features")]
    if first.slide_embedding is not None and header.slide_embedding is not None:
        pairs.append((len(first.slide_embedding), len(header.slide_embedding), "slide embeddings"))
    for one, other, what in pairs:
        if one != other:
            raise LongslideError(
                f"{what} of mixed width: {first_path} has {one}, {path} has {other}; embed all slides with one encoder"
            )

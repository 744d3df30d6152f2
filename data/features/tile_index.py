"""Tiles like a given one, over a cohort: the exact nearest neighbours of its embedding by cosine."""

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch

from ...errors import LongslideError
from ...plurals import count
from ..whole_file import remove_leftovers, whole_file, write_whole
from .feature_file import read_features
from .features import Features
from .preprocessing import Preprocessing, agreed

logger = logging.getLogger(__name__)

FOLDER = "tile-index"
"""Where an index lies, beside the feature files."""

SCHEMA = 1
"""Version of the index's files."""

ROWS = 8192
"""Rows that are turned into float32 or float64 at a time."""


@dataclass(frozen=True)
class SimilarTile:
    """A tile that is like the one asked for.

    Attributes:
        slide_id: Its slide.
        features: The slide's feature file.
        tile: Its number in the feature file, as `read_features` orders them.
        x: Left edge in level-0 pixels.
        y: Top edge in level-0 pixels.
        size: Edge in level-0 pixels.
        similarity: Cosine of the two embeddings, -1 to 1.
    """

    slide_id: str
    features: Path
    tile: int
    x: int
    y: int
    size: int
    similarity: float


class TileIndex:
    """The tile embeddings of many slides as one matrix, to be searched without approximation.

    The matrix is written once, into `tile-index/` beside the feature files, and mapped into memory: of float16 embeddings
    it takes 2 bytes a number, 3 GB for 1,000,000 tiles of 1,536. It is made again when a feature file was added, removed
    or written since.

    A search multiplies the matrix with the query in the matrix's own precision (`torch.mv`, sums in float32), which gives
    each cosine with a known largest error; all tiles that might belong to the nearest are then compared in float64. So the
    result is that of comparing all of them in float64, in the time that it takes to read the matrix once.

    Attributes:
        files: The feature files.
        slide_ids: Their slides.
        offsets: `(S + 1,)` int64, where each slide's tiles begin in the matrix.
        tile_sizes: `(S,)` int64 edge of each slide's tiles in level-0 pixels.
        coords: `(N, 2)` int64 top-left corner (x, y) of each tile in level-0 pixels.
        norms: `(N,)` float32 length of each embedding.
        embeddings: `(N, D)` float16, or float32 where a file holds that: as they are in the files.
        left_out: Feature files that could not be read, and why.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        slide_ids: Sequence[str],
        offsets: np.ndarray,
        tile_sizes: np.ndarray,
        coords: np.ndarray,
        norms: np.ndarray,
        embeddings: torch.Tensor,
        left_out: Sequence[tuple[str | Path, str]] = (),
    ) -> None:
        self.files, self.slide_ids, self.tile_sizes = tuple(map(Path, files)), tuple(slide_ids), tile_sizes
        self.offsets, self.coords, self.norms, self.embeddings = offsets, coords, norms, embeddings
        self.left_out = tuple((Path(path), why) for path, why in left_out)
        self._made_of: tuple[Sequence[Path], str] = self.files, ""
        self._number_of = {slide_id: number for number, slide_id in enumerate(slide_ids)}
        largest = float(norms.max(initial=0)) or 1.0
        self._scale = 1024 / largest  # of a query of length 1: no product leaves the range of float16
        self._to_cosine = torch.from_numpy(np.divide(1, self._scale * norms, out=np.zeros_like(norms), where=norms > 0))

    @classmethod
    def open(
        cls,
        features: str | Path | Sequence[str | Path],
        *,
        cache: str | Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Self:
        """The index of feature files; it is made if there is none, or if the files are no longer the same.

        Args:
            features: The files, or a folder of them. Those of one tile encoder alone can be compared.
            cache: Where the index lies. Default: `tile-index` beside the first of them.
            progress: Is told, while the index is made, how many of how many files have been read.

        Returns:
            The index.

        Raises:
            LongslideError: No feature files, two of one slide, files of several tile encoders, or the index cannot be
                written.
        """
        if isinstance(features, str | Path):
            files = sorted(path for path in Path(features).glob("*.h5") if not path.name.startswith("."))
            if not files:
                raise LongslideError(
                    f"{features}: no feature files (.h5) in this folder; give the --output of longslide embed"
                )
        else:
            files = [Path(path) for path in features]
            if not files:
                raise LongslideError("no feature files to compare")
        of_slide: dict[str, Path] = {}
        for path in files:
            other = of_slide.setdefault(path.stem, path)
            if other != path:
                raise LongslideError(f"{other} and {path}: two feature files of one slide; leave one of them out")
        cache = files[0].parent / FOLDER if cache is None else Path(cache)
        digest = _digest(files)
        table, matrix = cache / f"tiles-{digest}.npz", cache / f"embeddings-{digest}.npy"
        if not (table.is_file() and matrix.is_file()):
            for path in (matrix, table):
                remove_leftovers(path)
            _make(files, matrix, table, progress)
            _remove_others(table, digest)
        with np.load(table, allow_pickle=False) as content:
            left_out = {int(number): why for number, why in json.loads(str(content["left_out"]))}
            kept = [path for number, path in enumerate(files) if number not in left_out]
            index = cls(
                kept,
                [path.stem for path in kept],
                content["offsets"],
                content["tile_sizes"],
                content["coords"],
                content["norms"],
                torch.from_numpy(np.load(matrix, mmap_mode="c", allow_pickle=False)),
                [(files[number], why) for number, why in left_out.items()],
            )
        index._made_of = files, digest
        return index

    def is_current(self) -> bool:
        """Whether the feature files are what they were when the index was opened."""
        files, digest = self._made_of
        return _digest(files) == digest

    def __len__(self) -> int:
        """Tiles."""
        return len(self.coords)

    def __repr__(self) -> str:
        return f"TileIndex({count(len(self.files), 'slide')}, {count(len(self), 'tile')} x {self.embeddings.shape[1]})"

    def rows(self, slide_id: str) -> slice:
        """Which rows of the matrix a slide's tiles are.

        Raises:
            LongslideError: No such slide.
        """
        number = self._number_of.get(slide_id)
        if number is None:
            why = next((f": {reason}" for path, reason in self.left_out if path.stem == slide_id), "")
            raise LongslideError(f"{slide_id}: no tiles of this slide in the index{why}")
        return slice(int(self.offsets[number]), int(self.offsets[number + 1]))

    def similar(self, slide_id: str, tile: int, n: int = 24, *, other_slides: bool = False) -> list[SimilarTile]:
        """The tiles most like one, which itself is not among them.

        Args:
            slide_id: Its slide.
            tile: Its number in the feature file.
            n: How many.
            other_slides: Leave out those of the same slide.

        Returns:
            At most `n` tiles, the most similar first; equally similar ones in the order of the matrix.

        Raises:
            LongslideError: No such tile.
        """
        own = self.rows(slide_id)
        if not 0 <= tile < own.stop - own.start:
            raise LongslideError(f"{slide_id}: has no tile {tile}, but {count(own.stop - own.start, 'tile')}")
        row = own.start + tile
        without = own if other_slides else slice(row, row + 1)
        found = self.nearest(self.embeddings[row].double().numpy(), n, without=without)
        return [self._tile(row, cosine) for row, cosine in found]

    def nearest(self, embedding: np.ndarray, n: int, *, without: slice | None = None) -> list[tuple[int, float]]:
        """The rows of the matrix that are nearest to an embedding by cosine.

        Args:
            embedding: `(D,)`.
            n: How many.
            without: Rows to leave out.

        Returns:
            Row and cosine, the nearest first; equal ones in the order of the rows. An embedding of zeros has the cosine 0.
        """
        query = torch.as_tensor(np.asarray(embedding, np.float64))
        length = float(query.norm())
        query = query / length if length else query
        approximate = (
            torch.mv(self.embeddings, (query * self._scale).to(self.embeddings.dtype)).float() * self._to_cosine
        )
        if without is not None:
            approximate[without] = -torch.inf
        n = min(n, len(self) - (0 if without is None else len(range(*without.indices(len(self))))))
        if n <= 0:
            return []
        least = torch.topk(approximate, n).values[-1] - 2 * self._error
        candidates = torch.nonzero(approximate >= least)[:, 0]
        cosines = torch.cat([self._cosines(chosen, query) for chosen in torch.split(candidates, ROWS)])
        order = torch.sort(cosines, descending=True, stable=True).indices[:n]
        return list(zip(candidates[order].tolist(), cosines[order].tolist(), strict=True))

    @property
    def _error(self) -> float:
        """The largest error of a cosine that `torch.mv` gives: of rounding the query and the result, and of the sum."""
        rounding = torch.finfo(self.embeddings.dtype).eps / 2
        summing = self.embeddings.shape[1] * torch.finfo(torch.float32).eps
        return 2 * rounding + summing

    def _cosines(self, rows: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        vectors = self.embeddings[rows].double()
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        cosines: torch.Tensor = torch.mv(vectors, query) / lengths.clamp_min(torch.finfo(torch.float64).tiny)
        return cosines

    def _tile(self, row: int, cosine: float) -> SimilarTile:
        slide = int(np.searchsorted(self.offsets, row, side="right")) - 1
        x, y = self.coords[row].tolist()
        size = int(self.tile_sizes[slide])
        return SimilarTile(self.slide_ids[slide], self.files[slide], row - int(self.offsets[slide]), x, y, size, cosine)


def _digest(files: Sequence[Path]) -> str:
    """Tells these files, as they are now, from any others."""
    facts: list[tuple[str, int, int]] = []
    for path in files:
        place = os.path.relpath(path, files[0].parent)  # the folder may be moved with its index
        try:
            status = path.stat()
            facts.append((place, status.st_size, status.st_mtime_ns))
        except OSError:
            facts.append((place, -1, 0))
    return hashlib.sha256(json.dumps([SCHEMA, facts]).encode()).hexdigest()[:16]


def _make(files: Sequence[Path], matrix: Path, table: Path, progress: Callable[[int, int], None] | None) -> None:
    """Write an index: first the matrix, then what says that it is complete."""
    headers, left_out = _look_at(files)
    if not headers:
        raise LongslideError(f"{files[0].parent}: no feature file there can be read: {next(iter(left_out.values()))}")
    kept = list(headers)
    agreed(kept, [Preprocessing.of(header).of_tiles for header in headers.values()])
    width = headers[kept[0]].features.shape[1]
    for path, header in headers.items():
        if header.features.shape[1] != width:
            raise LongslideError(
                f"embeddings of mixed width: {kept[0]} has {width}, {path} has {header.features.shape[1]}; embed all slides "
                "with one encoder"
            )
    half = all(header.features.dtype == np.float16 for header in headers.values())
    dtype = np.dtype(np.float16 if half else np.float32)
    shape = (sum(len(header.features) for header in headers.values()), width)
    coords, norms = [], []
    with whole_file(matrix, "cache") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})
        for number, (path, header) in enumerate(headers.items()):
            features = read_features(path)
            if features.features.shape != header.features.shape:
                raise LongslideError(f"{path}: was written while the index was made; try again")
            for part in _parts(features.features):
                sound = np.isfinite(part).all(1)
                if not sound.all():
                    logger.warning(
                        f"{path}: {count(int((~sound).sum()), 'tile has', 'tiles have')} NaN or infinite "
                        "features: like no other tile"
                    )
                    part = np.where(sound[:, None], part, 0)
                norms.append(np.linalg.norm(part.astype(np.float32), axis=1))
                file.write(np.ascontiguousarray(part, dtype).data)
            coords.append(features.coords)
            if progress is not None:
                progress(number + 1, len(headers))
    sizes = [header.tile_size_level0 or header.step_level0 for header in headers.values()]
    content = io.BytesIO()
    np.savez(
        content,
        left_out=np.array(json.dumps([*left_out.items()])),
        tile_sizes=np.array(sizes, np.int64),
        offsets=np.cumsum([0, *(len(one) for one in coords)], dtype=np.int64),
        coords=np.concatenate(coords),
        norms=np.concatenate(norms) if norms else np.zeros(0, np.float32),
    )
    write_whole(table, content.getbuffer(), "cache")


def _look_at(files: Sequence[Path]) -> tuple[dict[Path, Features], dict[int, str]]:
    """What the files say of themselves; and the numbers of those that cannot be read, with the reason."""
    headers: dict[Path, Features] = {}
    left_out: dict[int, str] = {}
    for number, path in enumerate(files):
        try:
            headers[path] = read_features(path, embeddings=False)
        except LongslideError as error:
            logger.warning(f"{error}; it is left out of the index")
            left_out[number] = str(error)
    return headers, left_out


def _parts(features: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(features), ROWS):
        yield features[start : start + ROWS]


def _remove_others(table: Path, digest: str) -> None:
    """Remove the indexes of earlier states of the folder; who has one open keeps it."""
    made = table.stat().st_mtime_ns
    for pattern in ("tiles-*.npz", "embeddings-*.npy"):
        for path in table.parent.glob(pattern):
            with suppress(FileNotFoundError):
                if digest not in path.name and path.stat().st_mtime_ns <= made:
                    path.unlink()

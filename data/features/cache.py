"""Features of slides, read once and kept in memory up to a size."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ...errors import LongslideError
from .feature_file import read_features


@dataclass(frozen=True)
class SlideTiles:
    """What of a slide goes into a bag.

    Attributes:
        features: `(N, D)` float16 or float32, in the dtype of the file.
        cells: `(N, 2)` int64 grid cell (column, row), row by row.
        slide_embedding: `(D_slide,)` float32, if the file has one.
    """

    features: np.ndarray
    cells: np.ndarray
    slide_embedding: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        embedding = 0 if self.slide_embedding is None else self.slide_embedding.nbytes
        return self.features.nbytes + self.cells.nbytes + embedding


class FeatureCache:
    """Reads feature files and keeps what it read until the memory it may take is full; then it reads from the disk.

    Nothing is thrown out: every epoch reads each file once, in a new order, so the files that stay are as often of use as
    any, whereas "least recently used" would throw out each file just before its turn. Worker processes that are forked
    from a process with a full cache share its memory.

    Args:
        limit_gb: Gigabytes (1e9 bytes) to keep at most; 0 keeps nothing.
        slide_embeddings: Take the slide embedding for the only tile of a slide, in cell (0, 0).
    """

    def __init__(self, limit_gb: float = 0.0, *, slide_embeddings: bool = False) -> None:
        self.limit = int(limit_gb * 1e9)
        self.slide_embeddings = slide_embeddings
        self.nbytes = 0
        self._kept: dict[Path, SlideTiles] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Callable[[], "FeatureCache"], tuple[()]]:
        """A process that is not forked gets a cache that keeps nothing: its memory would come on top."""
        return partial(FeatureCache, slide_embeddings=self.slide_embeddings), ()

    def __len__(self) -> int:
        """Slides kept."""
        return len(self._kept)

    def read(self, path: Path) -> SlideTiles:
        """The tiles of a slide, from memory or from the disk; not to be written to.

        Raises:
            LongslideError: The file cannot be read, or has no slide embedding where that is wanted.
        """
        kept = self._kept.get(path)
        if kept is not None:
            return kept
        file = read_features(path)
        if self.slide_embeddings:
            if file.slide_embedding is None:
                raise LongslideError(
                    f"{path}: no slide embedding; run `longslide embed` with --slide-encoder, or drop "
                    "--data.slide_embeddings"
                )
            features, cells = file.slide_embedding[None], np.zeros((1, 2), np.int64)
        else:
            features, cells = file.features, file.cells
        if features.dtype not in (np.float16, np.float32):
            features = features.astype(np.float32)
        tiles = SlideTiles(features, cells, file.slide_embedding)
        with self._lock:
            if path not in self._kept and self.nbytes + tiles.nbytes <= self.limit:
                self._kept[path] = tiles
                self.nbytes += tiles.nbytes
        return tiles

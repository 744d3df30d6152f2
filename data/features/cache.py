"""Features of slides, read once and kept in memory as far as there is memory."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ...errors import LongslideError
from ..free_memory import free_memory
from .feature_file import read_features

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlideTiles:
    """What of a slide goes into a bag.

    Attributes:
        features: `(N, D)` float16 or float32, in the dtype of the file.
        cells: `(N, 2)` int64 grid cell (column, row), row by row.
        slide_embedding: `(D_slide,)` float32, if the file has one.
        pinned: Whether the features lie in page-locked memory, from which a GPU copies while the host does something else.
    """

    features: np.ndarray
    cells: np.ndarray
    slide_embedding: np.ndarray | None = None
    pinned: bool = False

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        embedding = 0 if self.slide_embedding is None else self.slide_embedding.nbytes
        return self.features.nbytes + self.cells.nbytes + embedding


class FeatureCache:
    """Reads feature files and keeps what it read until the memory it may take is full; then it reads from the disk.

    Nothing is thrown out: every epoch reads each file once, in a new order, so the files that stay are as often of use as
    any, whereas "least recently used" would throw out each file just before its turn. May be used from several threads.

    Args:
        limit_gb: Gigabytes (1e9 bytes) to keep at most; 0 keeps nothing. None keeps as much as it leaves free: half of what
            is free for one process, and all processes of a machine together never take all.
        slide_embeddings: Take the slide embedding for the only tile of a slide, in cell (0, 0).
    """

    def __init__(self, limit_gb: float | None = 0.0, *, slide_embeddings: bool = False) -> None:
        self.limit = None if limit_gb is None else int(limit_gb * 1e9)
        self.slide_embeddings = slide_embeddings
        self.nbytes = 0
        self._kept: dict[Path, SlideTiles] = {}
        self._lock = threading.Lock()
        self._pinned: PinnedMemory | None = PinnedMemory()

    def __reduce__(self) -> tuple[Callable[[], "FeatureCache"], tuple[()]]:
        """A process that is not forked gets a cache that keeps nothing: its memory would come on top."""
        return partial(FeatureCache, slide_embeddings=self.slide_embeddings), ()

    def __len__(self) -> int:
        """Slides kept."""
        return len(self._kept)

    def read(self, path: Path, *, pinned: bool = False) -> SlideTiles:
        """The tiles of a slide, from memory or from the disk; not to be written to.

        Args:
            path: Its feature file.
            pinned: Whether the features of a slide that is kept are moved to page-locked memory, once, for copies to a GPU.

        Raises:
            LongslideError: The file cannot be read, or has no slide embedding where that is wanted.
        """
        kept = self._kept.get(path)
        if kept is not None:
            return self._pin(path) if pinned and not kept.pinned else kept
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
            if path not in self._kept and self._has_room(tiles.nbytes):
                self._kept[path] = tiles
                self.nbytes += tiles.nbytes
        return tiles

    def _has_room(self, nbytes: int) -> bool:
        limit = free_memory() if self.limit is None else self.limit
        return limit is not None and self.nbytes + nbytes <= limit

    def _pin(self, path: Path) -> SlideTiles:
        with self._lock:
            tiles = self._kept[path]
            if not tiles.pinned and self._pinned is not None:
                try:
                    tiles = replace(tiles, features=self._pinned.copy_of(tiles.features), pinned=True)
                except RuntimeError as error:  # of CUDA: the system allows no more of it
                    logger.info(f"no more page-locked memory for features: copies to the GPU are slower ({error})")
                    self._pinned = None
                self._kept[path] = tiles
            return tiles


class PinnedMemory:
    """Page-locked memory, in blocks: torch rounds each piece up to a power of two, and takes a while for it."""

    LARGEST_BLOCK = 2**28
    ALIGNMENT = 64

    def __init__(self) -> None:
        self.nbytes = 0
        self._block = np.empty(0, np.uint8)

    def copy_of(self, array: np.ndarray) -> np.ndarray:
        """The array in this memory, which is held as long as there are such arrays.

        Raises:
            RuntimeError: There is no more of it.
        """
        wanted = -(-array.nbytes // self.ALIGNMENT) * self.ALIGNMENT
        if wanted > len(self._block):
            size = max(wanted, min(self.LARGEST_BLOCK, self.nbytes))  # as much again: little for a small cohort
            size = 1 << (size - 1).bit_length()
            self._block = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
            self.nbytes += size
        piece, self._block = self._block[: array.nbytes], self._block[wanted:]
        copy: np.ndarray = piece.view(array.dtype).reshape(array.shape)
        copy[:] = array
        return copy

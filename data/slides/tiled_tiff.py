"""Tiled TIFF files (SVS, generic, OME, Philips, QPTIFF): their native tiles read by offset, decoded and put together."""

import logging
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from ...errors import LongslideError
from .base import DeclinedError, SlideReader
from .native_tiles import DamagedTileError, NativeTiles
from .openslide import OpenSlideReader
from .tiff import TiffFacts, is_tiff, tiff_facts, white_of

CACHE_BYTES = 256 * 2**20
"""Decoded native tiles kept per slide: several rows of a 100,000 px wide level, so neighbours are not decoded twice."""

CHECKED_VENDORS = ("aperio", "generic-tiff", "philips")
"""Kinds, by OpenSlide's names, of which this reader knows how native tiles make up a level."""

_PIECE = 4096  # OpenSlide reads larger regions in pieces, and rounds the corner of each
_CHECKED_PX = 200  # edge of the regions compared with OpenSlide's at opening

_log = logging.getLogger(__name__)


class TiledTiffReader(SlideReader):
    """A tiled RGB TIFF file, by its own native tiles: several times as fast as OpenSlide, and codecs that it lacks.

    What OpenSlide reads too has OpenSlide's levels, properties and pixels: at opening regions of each level are compared, and
    a file with another pixel is declined with a remark. Damage is an error here, as it is for OpenSlide.
    """

    reopens = True

    def __init__(self, path: Path) -> None:
        self.path = path
        if not is_tiff(path):
            raise DeclinedError
        self._openslide: OpenSlideReader | None = None
        try:
            self._read_directory()
        except BaseException:
            self._close_openslide()
            raise
        self._start()

    def _start(self) -> None:
        self._file = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._cached_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process: another one opens the file again, as it was found here."""
        own = ("_file", "_lock", "_cache", "_cached_bytes", "_openslide")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._openslide = None
        self._start()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
            self._file = -1
            self._cache.clear()
            self._cached_bytes = 0
            self._close_openslide()

    def _close_openslide(self) -> None:
        if self._openslide is not None:
            self._openslide.close()
            self._openslide = None

    # Opening

    def _read_directory(self) -> None:
        facts = tiff_facts(self.path) or TiffFacts()
        try:
            with tifffile.TiffFile(self.path) as tiff:
                if not tiff.pages.first.is_tiled:
                    raise DeclinedError
                self._find_levels(tiff, facts)
        except (DeclinedError, LongslideError):
            raise
        except Exception as error:  # whatever a broken directory makes of the parser
            raise DeclinedError(facts.refusal) from error
        end, size = self._levels[0].end, self.path.stat().st_size
        if end > size:
            raise LongslideError(
                f"{self.path}: truncated: its pixels end at byte {end:,}, the file at {size:,}; copy it again"
            )

    def _find_levels(self, tiff: tifffile.TiffFile, facts: TiffFacts) -> None:
        white = white_of(tiff)
        try:
            self._openslide = OpenSlideReader(self.path)
        except (DeclinedError, LongslideError):
            self._openslide = None
        pages = [level.keyframe for level in tiff.series[0].levels] if self._openslide is None else None
        if self._openslide is not None:
            if self._openslide.vendor not in CHECKED_VENDORS:
                raise DeclinedError
            pages = _pages_of_openslide(tiff, self._openslide)

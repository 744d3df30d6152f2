"""Whole-slide images: opening, reading regions as RGB, microns per pixel."""

import base64
import hashlib
import html
import io
from collections import Counter
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import cv2
import numpy as np
from PIL import Image

from ...errors import LongslideError
from ..regular_file import check_regular
from .base import READERS, SlideReader, open_reader, without_suffix
from .folder import folders_looked_at
from .level_check import differing_levels
from .metadata import metadata_remark
from .mpp import Mpp, resolve_mpp

if TYPE_CHECKING:
    from ..tiles.stream import TileStream
    from ..tissue.base import Tissue, TissueSegmenter

_BLOCK = 2048  # pixels of a level read at once for a thumbnail
_NATIVE_TILE = 256  # an unreadable region is not divided further
_MAX_UNREADABLE = 256  # failed reads of level 0 after which a slide has no thumbnail: each one reopens the file
_MAX_UNREADABLE_REDUCED = 32  # failed reads of a reduced level after which it is not read again


class Slide:
    """An open slide. A context manager; reads may come from several threads at once.

    Attributes:
        path: The file.
        slide_id: Its id: the file's name without suffix unless given.
        dimensions: (width, height) of level 0 in pixels.
        level_dimensions: (width, height) of each level, finest first.
        level_downsamples: Level-0 pixels per pixel of each level.
        properties: What the file says of itself, under OpenSlide's names.
        vendor: Name of the format: OpenSlide's for what OpenSlide knows, else the reader's, such as `image`.
        background: RGB shown where the slide has no pixels.
        memory_bytes: Memory that it takes for pixels while it is open; 0 where they are read as they are needed.
        unreadable_levels: Reduced levels of which a thumbnail could not read some region; no tile is read from them.
        unreadable_areas: (x, y, width, height) in level-0 pixels of what a thumbnail could not read of level 0, where it
            shows background. Whether there is tissue is unknown: a grid has tiles there, which are counted as unreadable.
        reader: Name of the slide reader that reads the pixels, or its dotted path.
        library: Name and version of the library that decodes them; empty for none.
    """

    def __init__(self, path: str | Path, reader: SlideReader, slide_mpp: float | None, slide_id: str | None) -> None:
        self.path = Path(path)
        self.slide_id = slide_id or without_suffix(self.path).name
        self._given_mpp = slide_mpp
        self._reader = reader
        self.reader = READERS.name_of(reader)
        self.dimensions = reader.dimensions
        self.level_dimensions = reader.level_dimensions
        self.level_downsamples = reader.level_downsamples
        self.properties = reader.properties
        self.vendor = reader.vendor
        self.background = reader.background
        self.memory_bytes = reader.memory_bytes
        self.library = reader.library
        self.unreadable_levels: set[int] = set()
        self.unreadable_areas: set[tuple[int, int, int, int]] = set()

    def __repr__(self) -> str:
        width, height = self.dimensions
        try:
            mpp = f"{self.mpp.value:g} um/px"
        except LongslideError:
            mpp = "no microns per pixel"
        return f"Slide({self.slide_id!r}, {width:,} x {height:,} px, {mpp}, {self.vendor})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the thumbnail, and the line of `repr`."""
        picture = io.BytesIO()
        Image.fromarray(self.thumbnail(256)).save(picture, format="JPEG")
        encoded = base64.b64encode(picture.getvalue()).decode()
        return f'<img src="data:image/jpeg;base64,{encoded}" alt=""><br>{html.escape(repr(self))}'

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    @cached_property
    def mpp(self) -> Mpp:
        """Microns per pixel at level 0 and where it comes from.

        Raises:
            LongslideError: There is none, or it is implausible.
        """
        return resolve_mpp(self.properties, self.path, self._given_mpp)

    @property
    def remark(self) -> str:
        """What a person should look at: a given `slide_mpp` far off the file's own, metadata that contradict one another,
        how the file is read, damaged levels; empty if nothing."""
        levels = (", ".join(map(str, sorted(one))) for one in (self.unreadable_levels, self.differing_levels))
        return "; ".join(
            filter(
                None, [self.mpp.remark, metadata_remark(self.properties), self.reader_remark, levels_remark(*levels)]
            )
        )

    @property
    def reader_remark(self) -> str:
        """What a person should know of how the file is read; empty if nothing."""
        return self._reader.remark

    @property
    def trusted_levels(self) -> list[int]:
        """Levels that tiles may be read from, finest first."""
        return [
            level
            for level in range(len(self.level_dimensions))
            if level not in self.unreadable_levels and level not in self.differing_levels
        ]

    @cached_property
    def quickhash(self) -> str:
        """Identity of the image data: OpenSlide's quickhash, or the SHA-256 of the file."""
        quick = self.properties.get("openslide.quickhash-1")
        if quick:
            return quick
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def reopens(self) -> bool:
        """Whether other processes may open it for themselves; a pickled slide is opened again where it is unpickled."""
        return self._reader.reopens

    def read_region(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        """Read a rectangle of a level.

        Args:
            x: Left edge in level-0 pixels; may lie outside the slide.
            y: Top edge in level-0 pixels; may lie outside the slide.
            level: Level to read from.
            width: Pixels of that level.
            height: Pixels of that level.

        Returns:
            `(height, width, 3)` uint8 RGB; where the slide has no pixels, `background`.

        Raises:
            LongslideError: The region cannot be read. Other regions still can.
        """
        return self._reader.read_region(x, y, level, width, height)

    def read_into(self, x: int, y: int, level: int, out: np.ndarray) -> None:
        """Read a rectangle of a level, as `read_region`, to where its pixels go.

        Args:
            x: Left edge in level-0 pixels; may lie outside the slide.
            y: Top edge in level-0 pixels; may lie outside the slide.
            level: Level to read from.
            out: `(height, width, 3)` uint8, where the pixels go; undefined after an error.

        Raises:
            LongslideError: The region cannot be read. Other regions still can.
        """
        self._reader.read_into(x, y, level, out)

    @cached_property
    def bounds(self) -> tuple[int, int, int, int]:
        """x, y, width and height, in level-0 pixels, of the part of the slide that was scanned.

        The whole slide, unless the file says otherwise: the canvas of a glass slide may hold a small scanned area (`.scn`,
        `.mrxs`).
        """
        width, height = self.dimensions
        try:
            x, y, w, h = (int(self.properties[f"openslide.bounds-{name}"]) for name in ("x", "y", "width", "height"))
        except (KeyError, ValueError):
            return 0, 0, width, height
        left, top = max(0, x), max(0, y)
        w, h = min(x + w, width) - left, min(y + h, height) - top
        return (left, top, w, h) if w > 0 and h > 0 else (0, 0, width, height)

    def thumbnail(self, max_px: int = 2048) -> np.ndarray:
        """What was scanned of the slide, its `bounds`, antialiased, with no edge longer than `max_px`.

        A region of a reduced level that cannot be read is taken from the next finer level, and the level listed in
        `unreadable_levels`. One of level 0 shows as background, and is listed in `unreadable_areas`.

        Returns:
            `(h, w, 3)` uint8 RGB.

        Raises:
            LongslideError: Level 0 is almost entirely unreadable, where it is needed.
        """
        scale = min(1.0, max_px / max(self.bounds[2:]))
        width, height = (max(1, round(edge * scale)) for edge in self.bounds[2:])
        parts = [self._bounds_at(level) for level in range(len(self.level_dimensions))]
        like_level_0 = self._levels_like_level_0
        level = max((i for i in like_level_0 if parts[i][2] >= width and parts[i][3] >= height), default=0)
        x0, y0, level_width, level_height = parts[level]
        # First by a whole factor, block by block, so that no more than a block of the level is in memory.
        factor = max(1, min(level_width // width, level_height // height))
        block = wide = max(1, _BLOCK // factor) * factor
        if self._reader.whole_rows:
            wide, block = level_width, max(1, _BLOCK**2 // level_width // factor) * factor
        small = np.empty((-(-level_height // factor), -(-level_width // factor), 3), np.uint8)
        unreadable: Counter[int] = Counter()
        for top in range(0, level_height, block):
            for left in range(0, level_width, wide):
                w, h = min(wide, level_width - left), min(block, level_height - top)
                region = self._read_what_can_be_read(x0 + left, y0 + top, level, w, h, unreadable)
                out = small[top // factor : -(-(top + h) // factor), left // factor : -(-(left + w) // factor)]
                out[...] = cv2.resize(region, out.shape[1::-1], interpolation=cv2.INTER_AREA)
        if small.shape[:2] == (height, width):
            return small
        return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_AREA))

    def _bounds_at(self, level: int) -> tuple[int, int, int, int]:
        """`bounds` in pixels of a level."""
        x, y, w, h = self.bounds
        scale_x, scale_y = (a / b for a, b in zip(self.level_dimensions[level], self.dimensions, strict=True))
        left, top = round(x * scale_x), round(y * scale_y)
        return left, top, max(1, round((x + w) * scale_x) - left), max(1, round((y + h) * scale_y) - top)

    @cached_property
    def differing_levels(self) -> set[int]:
        """Reduced levels that show other colours than level 0, or the same ones elsewhere: they are not read."""
        return differing_levels(self)

    @property
    def _levels_like_level_0(self) -> list[int]:
        return [level for level in range(len(self.level_dimensions)) if level not in self.differing_levels]

    def tissue(self, segmenter: "TissueSegmenter | None" = None) -> "Tissue":
        """Find the tissue.

        Args:
            segmenter: The tissue segmenter: `optical-density` by default.

        Returns:
            Its mask, and its contours in level-0 pixels.

        Raises:
            LongslideError: The slide is almost entirely unreadable, or it has no microns per pixel.
        """
        from ..tissue.optical_density import OpticalDensity

        return (segmenter or OpticalDensity())(self)

    def tiles(
        self,
        mpp: float = 0.5,
        px: int = 256,
        *,
        overlap: int = 0,
        min_tissue: float = 0.1,
        tissue: "Tissue | None" = None,
        batch_size: int = 64,
        threads: int | None = None,
        max_bad_tiles: int = 0,
        max_blur: float = 1.0,
    ) -> "TileStream":
        """The tiles on tissue, row by row, as batches that threads read ahead.

        Args:
            mpp: Microns per pixel of the tiles.
            px: Edge of a tile in pixels.
            overlap: Pixels that neighbouring tiles share.
            min_tissue: Smallest share of a tile that must be tissue, 0 to 1.
            tissue: The tissue, if it is known already.
            batch_size: Tiles of a batch.
            threads: Threads that read; None for one on each core, at most 16.
            max_bad_tiles: Unreadable tiles that are left out; with more of them reading ends in an error.
            max_blur: Tiles more blurred than this, 0 (sharp) to 1, are left out.

        Returns:
            Batches with `.tiles` `(B, px, px, 3)` uint8 RGB and `.coords` `(B, 2)` int64 (x, y) in level-0 pixels. It may be
            gone through more than once, while the slide is open.

        Raises:
            LongslideError: The slide has no microns per pixel, is smaller than a tile, or coarser than `mpp`.
        """
        from ..tiles.grid import make_grid
        from ..tiles.stream import TileStream

        found = self.tissue() if tissue is None else tissue
        grid = make_grid(self, found, tile_mpp=mpp, tile_px=px, overlap=overlap, min_tissue=min_tissue)
        return TileStream(
            self, grid, batch_size=batch_size, threads=threads, max_bad_tiles=max_bad_tiles, max_blur=max_blur
        )

    def _read_what_can_be_read(
        self, left: int, top: int, level: int, width: int, height: int, unreadable: Counter[int]
    ) -> np.ndarray:
        """Read a rectangle given in pixels of the level; on an error its quarters, down to a native tile's size.

        Args:
            left: Left edge, in pixels of the level.
            top: Top edge, in pixels of the level.
            level: The level.
            width: Pixels of the level.
            height: Pixels of the level.
            unreadable: Failed reads of each level so far. No error is kept: its traceback would hold an open file.
        """
        if level > 0 and unreadable[level] >= _MAX_UNREADABLE_REDUCED:
            return self._from_finer_level(left, top, level, width, height, unreadable)
        scale_x, scale_y = (a / b for a, b in zip(self.dimensions, self.level_dimensions[level], strict=True))
        try:
            return self.read_region(round(left * scale_x), round(top * scale_y), level, width, height)
        except LongslideError as error:
            unreadable[level] += 1
            if level > 0:
                self.unreadable_levels.add(level)
            elif unreadable[0] > _MAX_UNREADABLE:
                levels = ", ".join(str(one) for one in sorted({0, *self.unreadable_levels}))
                raise LongslideError(
                    f"{self.path}: almost none of it can be read (level{'s' * (levels != '0')} {levels} damaged: "
                    f"{str(error).removeprefix(f'{self.path}: ')}); copy it again"
                ) from None
        if max(width, height) <= _NATIVE_TILE:
            if level > 0:
                return self._from_finer_level(left, top, level, width, height, unreadable)
            self.unreadable_areas.add((left, top, width, height))
            return np.full((height, width, 3), self.background, np.uint8)
        region = np.empty((height, width, 3), np.uint8)
        for y, h in ((0, height // 2), (height // 2, height - height // 2)):
            for x, w in ((0, width // 2), (width // 2, width - width // 2)):
                if w and h:
                    region[y : y + h, x : x + w] = self._read_what_can_be_read(
                        left + x, top + y, level, w, h, unreadable
                    )
        return region

    def _from_finer_level(
        self, left: int, top: int, level: int, width: int, height: int, unreadable: Counter[int]
    ) -> np.ndarray:
        """A rectangle given in pixels of a reduced level, made of the next finer one."""
        finer = max(one for one in self._levels_like_level_0 if one < level)
        scale_x, scale_y = (
            a / b for a, b in zip(self.level_dimensions[finer], self.level_dimensions[level], strict=True)
        )
        region = np.empty((height, width, 3), np.uint8)
        step = max(1, int(_BLOCK / max(scale_x, scale_y)))  # no more than a block of the finer level in memory
        for y in range(0, height, step):
            for x in range(0, width, step):
                w, h = min(step, width - x), min(step, height - y)
                x0, y0 = round((left + x) * scale_x), round((top + y) * scale_y)
                x1, y1 = round((left + x + w) * scale_x), round((top + y + h) * scale_y)
                read = self._read_what_can_be_read(x0, y0, finer, max(1, x1 - x0), max(1, y1 - y0), unreadable)
                region[y : y + h, x : x + w] = cv2.resize(read, (w, h), interpolation=cv2.INTER_AREA)
        return region


def levels_remark(unreadable: str, differing: str) -> str:
    """What to remark on reduced levels that cannot be read, such as `1, 2`, or that differ; empty if there are none."""
    whys = ((unreadable, "unreadable, in part or whole"), (differing, "unlike level 0 in place or colours"))
    return "; ".join(
        f"level{'s' * (',' in levels)} {levels} {why}: finer ones were used" for levels, why in whys if levels
    )


def open_slide(
    path: str | Path,
    *,
    slide_mpp: float | None = None,
    slide_id: str | None = None,
    reader: str | type[SlideReader] | None = None,
) -> Slide:
    """Open a slide with the first reader that takes it, in the order of `READERS`.

    Args:
        path: The file.
        slide_mpp: Microns per pixel at level 0; overrides the file's.
        slide_id: The slide's id; the file's name without suffix by default.
        reader: Name or dotted path of the slide reader, or its class; no other is tried then.

    Returns:
        The slide. It may lack microns per pixel: only asking for `mpp` raises then.

    Raises:
        LongslideError: No such file, not a slide that can be read, or no such reader.
    """
    path = Path(path)
    if path.is_dir() and path.suffix.lower() in folders_looked_at(reader):
        return Slide(path, open_reader(path, reader), slide_mpp, slide_id)
    try:
        check_regular(path)
        with path.open("rb") as file:
            first = file.read(1)
    except IsADirectoryError:
        raise LongslideError(f"{path}: a folder, not a slide file") from None
    except OSError as error:  # no such file, no permission, a file server that is away
        raise LongslideError(f"{path}: cannot be opened ({error.strerror})") from error
    if not first:
        raise LongslideError(f"{path}: the file is empty (0 bytes); copy it again")
    return Slide(path, open_reader(path, reader), slide_mpp, slide_id)

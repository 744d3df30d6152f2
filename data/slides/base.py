"""Slide readers: what opens a slide file and reads its pixels. `Slide` is what users hold."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np

from ...errors import LongslideError
from ...registry import Plugin, Registry

VENDOR_SUFFIXES = frozenset(
    {".svs", ".svslide", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".bif", ".czi", ".zvi", ".dcm", ".qptiff"}
)
"""Suffixes of slide formats: such a file is never read as the plain image (a preview, say) that it may be as well."""

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
"""Plain images: slides only in a folder without others. Beside slides they are thumbnails, masks or parts of a .vms."""

TIFF_SUFFIXES = frozenset({".tif", ".tiff", ".ptif", ".btf"})
"""Suffixes of TIFF files that say nothing of who wrote them; `.ome.tif` ends with one of them."""


MOST_BYTES = 1_500_000_000
"""Memory that a plain image or a mask may take while it is decoded, and those of all slides of a job together."""


def without_suffix(path: Path) -> Path:
    """A path without the suffix of its format, which has two parts in OME's `.ome.tif` and `.ome.zarr`."""
    stem = path.parent / path.stem
    ome = stem.suffix.lower() == ".ome" and path.suffix.lower() in {*TIFF_SUFFIXES, ".zarr"}
    return stem.parent / stem.stem if ome else stem


class DeclinedError(Exception):
    """A reader's constructor raises it for a file that is not of its kind: the next reader is tried.

    Args:
        reason: What else the file is, shown where no reader takes it.
        remark: What a person should know where another reader takes it.
    """

    def __init__(self, reason: str = "", remark: str = "") -> None:
        super().__init__(reason)
        self.remark = remark


class SlideReader(Plugin, ABC):
    """One open slide file, as one library reads it. Reads may come from several threads at once.

    A subclass opens the file in its constructor and sets the attributes.

    Args:
        path: The file.

    Attributes:
        dimensions: (width, height) of level 0 in pixels.
        level_dimensions: (width, height) of each level, finest first.
        level_downsamples: Level-0 pixels per pixel of each level.
        properties: What the file says of itself, under OpenSlide's names: `openslide.mpp-x`, `openslide.mpp-y`,
            `openslide.objective-power`, `tiff.XResolution`, ...; with `openslide.quickhash-1`, an identity of the image
            data, the file is not hashed.
        vendor: Name of the format.
        background: RGB shown where the slide has no pixels.
        memory_bytes: Memory that the open slide takes for pixels, beyond a cache; 0 where they are read as they are needed.
        SUFFIXES: Suffixes, in small letters and with the dot, that a folder is searched for; a file that the user names is
            tried whatever its suffix.
        FOLDER_SUFFIXES: Suffixes of folders that are slides.
        library: Name and version of the library that decodes, for the record; empty for none.
        remark: What a person should know of how the file is read; `open_reader` adds why readers before it declined.
        whole_rows: Whether wide regions are read as fast as narrow ones, for rows are stored as a whole.
        cache_bytes: Memory for decoded native tiles that an open slide may keep, where it keeps any.
        reopens: Whether other processes may open the file for themselves: a pickled reader is then opened again where it is
            unpickled. Of others all tiles are read by threads of one process.

    Raises:
        DeclinedError: The file is not of a kind that this reader reads.
        LongslideError: It is, but it is broken.
    """

    GIVEN = frozenset({"path"})
    SUFFIXES: ClassVar[frozenset[str]] = frozenset()
    FOLDER_SUFFIXES: ClassVar[frozenset[str]] = frozenset()

    dimensions: tuple[int, int]
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    properties: Mapping[str, str]
    vendor: str
    background: tuple[int, int, int] = (255, 255, 255)
    memory_bytes: int = 0
    library: str = ""
    remark: str = ""
    whole_rows: bool = False
    cache_bytes: int = 256 * 2**20  # several rows of a 100,000 px wide level, so neighbours are not decoded twice
    reopens: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, path: Path) -> None: ...

    @abstractmethod
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

    def read_into(self, x: int, y: int, level: int, out: np.ndarray) -> None:
        """Read a rectangle of a level to where its pixels go; a reader may spare itself a copy.

        Args:
            x: As of `read_region`.
            y: As of `read_region`.
            level: As of `read_region`.
            out: `(height, width, 3)` uint8, where the pixels go; undefined after an error.

        Raises:
            LongslideError: As `read_region`.
        """
        out[...] = self.read_region(x, y, level, out.shape[1], out.shape[0])

    @abstractmethod
    def close(self) -> None:
        """Close the file."""


READERS: Registry[SlideReader] = Registry(
    "slide reader",
    SlideReader,
    {
        "tiff": "longslide.data.slides.tiled_tiff:TiledTiffReader",
        "openslide": "longslide.data.slides.openslide:OpenSlideReader",
        "fastslide": "longslide.data.slides.fastslide:FastSlideReader",
        "ome-zarr": "longslide.data.slides.ome_zarr:OmeZarrReader",
        "image": "longslide.data.slides.image:ImageReader",
    },
)
"""The slide readers, in the order in which they are tried."""


def open_reader(path: Path, choice: str | type[SlideReader] | None = None) -> SlideReader:
    """Open a file with the first reader that does not decline it, or with the one that is chosen.

    Args:
        path: The file.
        choice: Name or dotted path of a reader, or its class.

    Raises:
        LongslideError: No such reader, no reader for this file, or a broken file.
    """
    tried = READERS.names() if choice is None else [choice]
    if path.is_dir():  # no other reader is asked to open a folder
        tried = [name for name in tried if path.suffix.lower() in READERS.get(name).FOLDER_SUFFIXES]
    reasons, remarks = [], []
    for name in tried:
        try:
            reader = READERS.create(name, path)
        except DeclinedError as declined:
            reasons += [" ".join(str(declined).split())] if str(declined) else []
            remarks += [declined.remark] if declined.remark else []
        else:
            reader.remark = "; ".join(filter(None, [*remarks, reader.remark]))
            return reader
    why = "; ".join(dict.fromkeys(reasons))
    if choice is not None:
        why = f" ({why})" if why else ""
        raise LongslideError(f"{path}: the slide reader {READERS.name_of(READERS.get(choice))} does not take it{why}")
    why = f"{why}; " if why else ""
    raise LongslideError(
        f"{path}: not a slide or image in a format that is read here "
        f"({why}tried the readers {', '.join(map(str, tried))})"
    )


def reader_to_obey(name: str | None) -> str | None:
    """The recorded reader that later reading must use too.

    None for those of the package: which of them reads a file, and so its pixels, is settled by the file.
    """
    return None if name is None or name in READERS.builtin else name


def recorded_reader(name: str | None) -> type[SlideReader] | None:
    """The class of a reader that a file names; None for those of the package.

    Raises:
        LongslideError: There is no such reader here, or it is not imported: see `Registry.get`.
    """
    name = reader_to_obey(name)
    return None if name is None else READERS.get(name, from_file=True)


def inside_of(rectangle: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[int, int, slice, slice] | None:
    """The part of a rectangle that lies inside a picture.

    Args:
        rectangle: (x, y, width, height).
        size: (width, height) of the picture.

    Returns:
        x and y of that part in the picture, and its rows and columns within the rectangle; None if nothing lies inside.
    """
    x, y, width, height = rectangle
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + width, size[0]), min(y + height, size[1])
    if right <= left or bottom <= top:
        return None
    return left, top, slice(top - y, bottom - y), slice(left - x, right - x)


def over_background(bgra: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """RGB pixels over a background.

    Args:
        bgra: `(h, w, 4)` uint8 blue, green, red and alpha, colours multiplied by alpha.
        background: RGB that shines through where alpha is below 255.

    Returns:
        `(h, w, 3)` uint8 RGB.
    """
    rgb = np.asarray(cv2.cvtColor(bgra, cv2.COLOR_BGRA2RGB))
    if bgra.view("<u4").min() < 0xFF000000:  # some alpha, the highest byte, is below 255
        shine_through(rgb, cv2.extractChannel(bgra, 3), background)
    return rgb


def shine_through(rgb: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int]) -> None:
    """Add a background to pixels that are not opaque.

    Args:
        rgb: `(h, w, 3)` uint8, colours multiplied by alpha; changed in place.
        alpha: `(h, w)` uint8.
        background: RGB.
    """
    missing = cv2.bitwise_not(alpha)
    shining_through = cv2.merge([cv2.convertScaleAbs(missing, alpha=colour / 255) for colour in background])
    cv2.add(rgb, shining_through, dst=rgb)

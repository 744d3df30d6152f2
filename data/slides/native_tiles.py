"""The native tiles of one pyramid level of a TIFF file: where their bytes are, and how they become pixels."""

from collections.abc import Callable
from dataclasses import dataclass

import imagecodecs
import numpy as np
import simplejpeg
import tifffile

from .base import DeclinedError
from .jpeg2000 import jpeg2000_damage, jpeg2000_size

MAX_TILE_BYTES = 256 * 2**20
"""A native tile that would take more memory than this is not read."""
MAX_STRIP_BYTES = 64 * 2**20
"""Of a file in strips a larger one is not read: each is as wide as the picture, and several are kept."""

_NONE, _LZW, _JPEG, _DEFLATE, _ADOBE_DEFLATE, _PACKBITS = 1, 5, 7, 8, 32946, 32773
_JPEG2000 = (34712, 33005)  # the second is Aperio's; 33003, its YCbCr, is left to OpenSlide
_WEBP, _ZSTD, _JPEGXL, _JPEGXL_DNG = 50001, 50000, 50002, 52546

_TO_BYTES: dict[int, Callable[..., bytes | bytearray]] = {
    _LZW: imagecodecs.lzw_decode,
    _DEFLATE: imagecodecs.deflate_decode,
    _ADOBE_DEFLATE: imagecodecs.deflate_decode,
    _PACKBITS: imagecodecs.packbits_decode,
    _ZSTD: imagecodecs.zstd_decode,
}
_TO_PIXELS: dict[int, Callable[..., np.ndarray]] = {
    **dict.fromkeys(_JPEG2000, imagecodecs.jpeg2k_decode),
    _WEBP: imagecodecs.webp_decode,
    _JPEGXL: imagecodecs.jpegxl_decode,
    _JPEGXL_DNG: imagecodecs.jpegxl_decode,
}
_RGB, _YCBCR, _CHUNKY, _PLANES = 2, 6, 1, 2
_TILE_TAGS = (322, 323, 324, 325)
_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_ZEROS = bytes(512)  # in a row no coder writes so many; a disk leaves them where a block was lost
_EXCESS = 1024  # room for bytes that do not belong to a tile
# An Adobe marker says which colours a JPEG stream has, as TIFF's tag does; its last byte is 0 for RGB and 1 for YCbCr.
_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"


class DamagedTileError(Exception):
    """A native tile whose bytes are not what its encoder wrote."""


@dataclass(frozen=True)
class NativeTiles:
    """The native tiles of a level.

    Attributes:
        width: Of the level in pixels.
        height: Of the level in pixels.
        tile_width: Of a native tile in pixels; those at the right border are padded to it.
        tile_height: Of a native tile in pixels.
        strips: Whether they are strips, as wide as the level, of which the last one is not padded.
        offsets: `(planes * rows * columns,)` int64, first byte of each tile.
        counts: Bytes of each tile; 0 where the file has none.
        compression: TIFF's number of the codec.
        jpeg_prefix: What precedes the stream of each JPEG tile: start, colours and shared tables.
        planes: Planes in which the colours are stored: 1 if together, else 3.
        dtype: numpy's name of a sample's type, with its byte order.
        white: Value of a sample that stands for 255.
        predicted: Whether differences between neighbouring pixels are stored.
    """

    width: int
    height: int
    tile_width: int
    tile_height: int
    strips: bool
    offsets: np.ndarray
    counts: np.ndarray
    compression: int
    jpeg_prefix: bytes
    planes: int
    dtype: str
    white: int
    predicted: bool

    @classmethod
    def of(cls, page: tifffile.TiffPage, white: int | None = None) -> "NativeTiles":
        """Of a page of a TIFF file.

        Args:
            page: The page.
            white: Value of a sample that stands for 255, for samples of 16 bits.

        Raises:
            DeclinedError: It is not RGB of a kind that is read here.
        """
        compression, photometric = int(page.compression), int(page.photometric)
        bits = page.bitspersample
        planes = 3 if int(page.planarconfig) == _PLANES else 1
        if page.samplesperpixel != 3 or photometric not in (_RGB, _YCBCR):
            raise DeclinedError
        if bits != 8 and (bits != 16 or white is None or compression == _JPEG):
            raise DeclinedError
        if page.sampleformat not in (None, 1) or page.fillorder != 1 or page.tags.valueof(274, 1) != 1:
            raise DeclinedError
        if compression == _JPEG:
            if planes != 1:
                raise DeclinedError
        else:
            known = {_NONE, *_TO_BYTES, *_TO_PIXELS} if photometric == _RGB else {*_TO_PIXELS}  # else subsampled blocks
            if compression not in known or page.predictor not in (1, 2):
                raise DeclinedError
        tables = page.jpegtables or _SOI + _EOI
        if tables[:2] != _SOI or tables[-2:] != _EOI:
            raise DeclinedError("broken JPEG tables")
        width, height = page.tilewidth, page.tilelength
        if not page.is_tiled:
            if 273 not in page.tags or any(code in page.tags for code in _TILE_TAGS):  # tiles whose directory is broken
                raise DeclinedError
            width, height = page.imagewidth, min(page.rowsperstrip or page.imagelength, page.imagelength)
        if min(page.imagewidth, page.imagelength, width, height) < 1:
            raise DeclinedError("a TIFF page or tile without pixels")
        if width * height * 3 * bits // 8 > (MAX_TILE_BYTES if page.is_tiled else MAX_STRIP_BYTES):
            raise DeclinedError(f"native {'tiles' if page.is_tiled else 'strips'} of {width:,} x {height:,} px")
        tiles = cls(
            width=page.imagewidth,
            height=page.imagelength,
            tile_width=width,
            tile_height=height,
            strips=not page.is_tiled,
            offsets=np.array(page.dataoffsets, np.int64),
            counts=np.array(page.databytecounts, np.int64),
            compression=compression,
            jpeg_prefix=_SOI + _ADOBE + bytes([photometric == _YCBCR]) + tables[2:-2],
            planes=planes,
            dtype=f"{page.parent.byteorder}u{bits // 8}",
            white=255 if bits == 8 else int(white or 0),
            predicted=page.predictor == 2,
        )
        if not len(tiles.offsets) == len(tiles.counts) == tiles.columns * tiles.rows * planes:
            raise DeclinedError(
                f"a broken TIFF: {len(tiles.offsets):,} native tiles where {tiles.columns * tiles.rows * planes:,} belong"
            )
        return tiles

    @property
    def columns(self) -> int:
        """Native tiles side by side."""
        return -(-self.width // self.tile_width)

    @property
    def rows(self) -> int:
        """Native tiles one below the other."""
        return -(-self.height // self.tile_height)

    @property
    def end(self) -> int:
        """Byte at which the last tile ends."""
        return int((self.offsets + self.counts)[self.counts > 0].max(initial=0))

    def telling(self) -> list[tuple[int, int]]:
        """(column, row) of a few tiles: the one with most bytes, the last one, and one that is missing, if any is."""
        counts = self.counts[: self.columns * self.rows]
        numbers = [int(counts.argmax()), len(counts) - 1, *np.flatnonzero(counts == 0)[:1].tolist()]
        return [(number % self.columns, number // self.columns) for number in dict.fromkeys(numbers)]

    def parts(self, column: int, row: int) -> list[tuple[int, int]]:
        """(first byte, bytes) of a tile: one part for each plane."""
        first, step = row * self.columns + column, self.columns * self.rows
        numbers = range(first, first + step * self.planes, step)
        return [(int(self.offsets[number]), int(self.counts[number])) for number in numbers]

    def height_of(self, row: int) -> int:
        """Pixels of the tiles of a row from top to bottom."""
        return min(self.tile_height, self.height - row * self.tile_height) if self.strips else self.tile_height

    def decode(self, parts: list[bytes], out: np.ndarray | None = None, *, height: int | None = None) -> np.ndarray:
        """The pixels of a tile.

        Args:
            parts: Its bytes, one part for each plane.
            out: Contiguous `(tile_height, tile_width, 3)` uint8, where they may go.
            height: Its height, as of `height_of`; `tile_height` by default.

        Returns:
            `(height, tile_width, 3)` uint8 RGB: `out`, or an array of its own.

        Raises:
            DamagedTileError: The bytes are damaged.
        """
        height = self.tile_height if height is None else height
        try:
            if self.compression == _JPEG:
                return self._jpeg(parts[0], height, out)
            pixels = [self._samples(part, height) for part in parts]
        except DamagedTileError:
            raise
        except (ValueError, RuntimeError, OSError, MemoryError) as error:  # errors of imagecodecs are RuntimeErrors
            raise DamagedTileError(" ".join(str(error).split()) or type(error).__name__) from error
        together = pixels[0] if self.planes == 1 else np.concatenate(pixels, axis=-1)
        if self.white != 255:
            together = ((together.astype(np.uint32) * 255 + self.white // 2) // self.white).clip(0, 255)
        return np.ascontiguousarray(together, np.uint8)

    def _jpeg(self, stream: bytes, height: int, out: np.ndarray | None) -> np.ndarray:
        if stream[:2] != _SOI:
            raise DamagedTileError("no JPEG stream")
        shape = (height, self.tile_width, 3)
        # Tiles without an end marker are intact for OpenSlide; a second one does no harm. What libjpeg warns of is damage.
        whole = b"".join((self.jpeg_prefix, stream[2:], _EOI))
        pixels = np.empty(shape, np.uint8) if out is None else out
        decoded = simplejpeg.decode_jpeg(whole, "RGB", buffer=pixels)
        if decoded.shape != shape:
            raise DamagedTileError(f"pixels of the shape {decoded.shape} where {shape} belongs")
        return pixels

    def _samples(self, part: bytes, height: int) -> np.ndarray:
        samples = 3 // self.planes
        shape = (height, self.tile_width, samples)
        dtype = np.dtype(self.dtype)
        if self.compression in _TO_PIXELS:
            end = len(part.rstrip(b"\0"))  # some encoders pad
            if self.compression in _JPEG2000:
                end = part.find(_EOI)  # the same bytes end a JPEG 2000 stream, and are nowhere within its data
                if jpeg2000_size(part) != shape[1::-1]:
                    raise DamagedTileError("no JPEG 2000 stream of a tile's size")
                if damage := jpeg2000_damage(part):
                    raise DamagedTileError(f"a damaged JPEG 2000 stream: {damage}")
            if part.find(_ZEROS, 0, end) >= 0:  # OpenJPEG decodes them without a word
                raise DamagedTileError(f"{len(_ZEROS)} zeros in a row")
            # With `out` a stream of another size is an error before memory is taken for it.
            pixels = np.empty(shape if samples > 1 else shape[:2], dtype.newbyteorder("="))
            return np.asarray(_TO_PIXELS[self.compression](part, out=pixels)).reshape(shape)
        size = int(np.prod(shape)) * dtype.itemsize
        raw = part if self.compression == _NONE else _TO_BYTES[self.compression](part, out=size + _EXCESS)
        if len(raw) < size or (len(raw) > size and self.compression == _LZW):  # damaged LZW gives more as often as less
            raise DamagedTileError(f"{len(raw):,} bytes of pixels where {size:,} belong")
        pixels = np.frombuffer(raw, dtype, count=size // dtype.itemsize).reshape(shape).astype(dtype.newbyteorder("="))
        return np.asarray(imagecodecs.delta_decode(pixels, axis=1)) if self.predicted else pixels

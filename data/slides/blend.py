"""Regions between the pixels of a level, as OpenSlide (cairo 1.18, pixman) blends them: in float32, step by step."""

import math

import numpy as np

from .base import shine_through

_CAIRO_FIXED = 256  # cairo takes a position this close to a pixel's for the pixel's
_PIXMAN_FIXED = 65536
_STRIP = 2**14  # values worked on at once


def is_whole(position: float) -> bool:
    """Whether cairo takes a position on an axis for that of a pixel."""
    return round(position * _CAIRO_FIXED) % _CAIRO_FIXED == 0


def split(position: float) -> tuple[int, float]:
    """The pixel at or before a position, and the weight of the next one."""
    fixed = math.floor(position * _PIXMAN_FIXED + 0.5)
    return fixed // _PIXMAN_FIXED, (fixed % _PIXMAN_FIXED) / _PIXMAN_FIXED


def blend(
    pixels: np.ndarray,
    corner: tuple[int, int],
    weights: tuple[float, float],
    tile: tuple[int, int],
    background: tuple[int, int, int],
) -> np.ndarray:
    """Pixels that lie between those of a level.

    OpenSlide paints native tile by native tile, from the last to the first, each with a transparent surrounding, and adds
    them up (cairo's operator "saturate").

    Args:
        pixels: `(h + 1, w + 1, 3)` uint8 RGB of the level, or `(h + 1, w + 1, 4)` where it does not have pixels everywhere:
            colours and alpha are 0 there.
        corner: (x, y) of the top-left pixel in the level.
        weights: Of the right one of two pixels, and of the lower one, 0 to 1.
        tile: (width, height) of a native tile.
        background: RGB that shines through.

    Returns:
        `(h, w, 3)` uint8 RGB.
    """
    x, y = (np.float32(weight) for weight in weights)
    one = np.float32(1)
    shares = ((one - x) * (one - y), x * (one - y), (one - x) * y, x * y)
    opaque = pixels.shape[2] == 3
    out = _within_tiles(pixels, shares)
    height, width = out.shape[:2]
    columns = range((-corner[0] - 1) % tile[0], width if x else 0, tile[0])
    rows = range((-corner[1] - 1) % tile[1], height if y else 0, tile[1])

    def put(top: slice, left: slice, tiles: tuple[tuple[int, ...], ...]) -> None:
        around = pixels[top.start : top.stop + 1, left.start : left.stop + 1]
        seam = _seam(around, shares, tiles)
        out[top, left] = _over(seam, background) if opaque else seam

    for column in columns:
        put(slice(0, height), slice(column, column + 1), ((1, 3), (0, 2)))
    for row in rows:
        put(slice(row, row + 1), slice(0, width), ((2, 3), (0, 1)))
        for column in columns:
            put(slice(row, row + 1), slice(column, column + 1), ((3,), (2,), (1,), (0,)))
    return out if opaque else _over(out, background)


def _within_tiles(pixels: np.ndarray, shares: tuple[np.float32, ...]) -> np.ndarray:
    """What one tile gives where all four neighbours are in it: `(h, w, 3)` or `(h, w, 4)` uint8."""
    height, width, channels = pixels.shape[0] - 1, pixels.shape[1] - 1, pixels.shape[2]
    out = np.empty((height, width, channels), np.uint8)
    whole = sum(shares[1:], shares[0])  # 1, but for rounding
    step = max(1, _STRIP // (width * channels))  # so that what is worked on stays in the cache of the processor
    for top in range(0, height, step):
        share = _sample(pixels[top : top + step + 1], shares)
        if channels == 3:
            if whole > 1:  # then a tile is a little too much for the room there is
                share *= np.float32(1) / whole
            out[top : top + step] = _to_bytes(np.minimum(share, np.float32(1), out=share))
        else:
            out[top : top + step] = _to_bytes(_paint(share, None))
    return out


def _seam(pixels: np.ndarray, shares: tuple[np.float32, ...], tiles: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Pixels whose neighbours lie in several tiles: `tiles` has the numbers of the neighbours, in the order of painting."""
    if pixels.shape[-1] == 3:
        pixels = np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], axis=-1)
    painted = None
    for neighbours in tiles:
        part = tuple(share if i in neighbours else np.float32(0) for i, share in enumerate(shares))
        painted = _to_bytes(_paint(_sample(pixels, part), painted))
    assert painted is not None
    return painted


def _sample(pixels: np.ndarray, shares: tuple[np.float32, ...]) -> np.ndarray:
    source = pixels.astype(np.float32)
    source *= np.float32(1 / 255)
    out = source[:-1, :-1] * shares[0]
    part = np.empty_like(out)
    for neighbours, share in zip((source[:-1, 1:], source[1:, :-1], source[1:, 1:]), shares[1:], strict=True):
        out += np.multiply(neighbours, share, out=part)
    return out


def _paint(share: np.ndarray, painted: np.ndarray | None) -> np.ndarray:
    """One tile's share added to what is painted already, as far as that is transparent: `(h, w, 4)` float32."""
    below = np.zeros((1, 1, 4), np.float32) if painted is None else painted * np.float32(1 / 255)
    alpha = share[..., 3:]
    nothing = alpha == 0
    fits = np.clip((np.float32(1) - below[..., 3:]) / np.where(nothing, np.float32(1), alpha), 0, 1)
    return np.asarray(np.minimum(share * np.where(nothing, np.float32(1), fits) + below, np.float32(1)))


def _to_bytes(colours: np.ndarray) -> np.ndarray:
    """pixman's rounding: 256 steps, of which the last two are one."""
    return np.minimum(colours * np.float32(256), np.float32(255)).astype(np.uint8)


def _over(rgba: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    rgb, alpha = rgba[..., :3].copy(), rgba[..., 3].copy()
    if alpha.min(initial=255) < 255:
        shine_through(rgb, alpha, background)
    return rgb

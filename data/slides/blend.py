"""Regions between the pixels of a level, as OpenSlide (cairo 1.18, pixman) blends them: in float32, step by step."""

import math

import numpy as np

_CAIRO_FIXED = 256  # cairo takes a position this close to a pixel's for the pixel's
_PIXMAN_FIXED = 65536


def is_whole(position: float) -> bool:
    """Whether cairo takes a position on an axis for that of a pixel."""
    return round(position * _CAIRO_FIXED) % _CAIRO_FIXED == 0


def split(position: float) -> tuple[int, float]:
    """The pixel at or before a position, and the weight of the next one."""
    fixed = math.floor(position * _PIXMAN_FIXED + 0.5)
    return fixed // _PIXMAN_FIXED, (fixed % _PIXMAN_FIXED) / _PIXMAN_FIXED


def blend(rgba: np.ndarray, corner: tuple[int, int], weights: tuple[float, float], tile: tuple[int, int]) -> np.ndarray:
    """Pixels that lie between those of a level.

    OpenSlide paints native tile by native tile, from the last to the first, each with a transparent surrounding, and adds
    them up (cairo's operator "saturate").

    Args:
        rgba: `(h + 1, w + 1, 4)` uint8 of the level; colours and alpha are 0 where it has no pixels. Without the alpha,
            `(h + 1, w + 1, 3)`, it has pixels everywhere.
        corner: (x, y) of its top-left pixel in the level.
        weights: Of the right one of two pixels, and of the lower one, 0 to 1.
        tile: (width, height) of a native tile.

    Returns:
        `(h, w, 4)` uint8, colours multiplied by alpha.
    """
    x, y = (np.float32(weight) for weight in weights)
    one = np.float32(1)
    shares = ((one - x) * (one - y), x * (one - y), (one - x) * y, x * y)
    source = rgba * np.float32(1 / 255)
    share = _sample(source, shares)
    opaque = rgba.shape[-1] == 3
    alpha = np.full((1, 1, 1), sum(shares[1:], shares[0]), np.float32) if opaque else share[..., 3:]
    out = np.full((*share.shape[:2], 4), 255, np.uint8)
    out[..., : rgba.shape[-1]] = _to_bytes(_paint(share, alpha, None))
    columns = range((-corner[0] - 1) % tile[0], out.shape[1] if x else 0, tile[0])
    rows = range((-corner[1] - 1) % tile[1], out.shape[0] if y else 0, tile[1])
    for column in columns:
        out[:, column : column + 1] = _seam(source[:, column : column + 2], shares, ((1, 3), (0, 2)))
    for row in rows:
        out[row : row + 1] = _seam(source[row : row + 2], shares, ((2, 3), (0, 1)))
        for column in columns:
            four = source[row : row + 2, column : column + 2]
            out[row : row + 1, column : column + 1] = _seam(four, shares, ((3,), (2,), (1,), (0,)))
    return out


def _seam(source: np.ndarray, shares: tuple[np.float32, ...], tiles: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Pixels whose neighbours lie in several tiles: `tiles` has the numbers of the neighbours, in the order of painting."""
    if source.shape[-1] == 3:
        source = np.concatenate([source, np.ones_like(source[..., :1])], axis=-1)
    painted = None
    for neighbours in tiles:
        part = tuple(share if i in neighbours else np.float32(0) for i, share in enumerate(shares))
        share = _sample(source, part)
        painted = _to_bytes(_paint(share, share[..., 3:], painted))
    assert painted is not None
    return painted


def _sample(source: np.ndarray, shares: tuple[np.float32, ...]) -> np.ndarray:
    top_left, top_right, bottom_left, bottom_right = shares
    out = source[:-1, :-1] * top_left
    out += source[:-1, 1:] * top_right
    out += source[1:, :-1] * bottom_left
    out += source[1:, 1:] * bottom_right
    return out


def _paint(share: np.ndarray, alpha: np.ndarray, painted: np.ndarray | None) -> np.ndarray:
    """One tile's share added to what is painted already, as far as that is transparent."""
    below = np.zeros((1, 1, 4), np.float32) if painted is None else painted * np.float32(1 / 255)
    room = np.float32(1) - below[..., 3:]
    fits = np.where(alpha == 0, np.float32(1), np.clip(room / np.where(alpha == 0, np.float32(1), alpha), 0, 1))
    return np.asarray(np.minimum(share * fits.astype(np.float32) + below[..., : share.shape[-1]], np.float32(1)))


def _to_bytes(colours: np.ndarray) -> np.ndarray:
    scaled = (colours * np.float32(256)).astype(np.uint16)
    return (scaled - (scaled >> 8)).astype(np.uint8)

"""Sums over red, green and blue, channel by channel: numpy takes ten times as long to reduce a last axis of three."""

import numpy as np


def highest(colours: np.ndarray) -> np.ndarray:
    """The highest channel; `(..., 3)` to `(...)`."""
    return np.asarray(np.maximum(np.maximum(colours[..., 0], colours[..., 1]), colours[..., 2]))


def lowest(colours: np.ndarray) -> np.ndarray:
    """The lowest channel; `(..., 3)` to `(...)`."""
    return np.asarray(np.minimum(np.minimum(colours[..., 0], colours[..., 1]), colours[..., 2]))


def spread(colours: np.ndarray) -> np.ndarray:
    """The highest less the lowest channel; `(..., 3)` to `(...)`."""
    return np.asarray(highest(colours) - lowest(colours))


def average(colours: np.ndarray) -> np.ndarray:
    """The mean channel; `(..., 3)` to `(...)`."""
    return np.asarray((colours[..., 0] + colours[..., 1] + colours[..., 2]) / colours.dtype.type(3))


def length(colours: np.ndarray) -> np.ndarray:
    """The Euclidean length; `(..., 3)` to `(...)`."""
    red, green, blue = (colours[..., channel] for channel in range(3))
    return np.asarray(np.sqrt(red * red + green * green + blue * blue))


def unit(colours: np.ndarray) -> np.ndarray:
    """The direction, of length 1 (of those shorter than 0.001, less); `(..., 3)` to `(..., 3)`."""
    return np.asarray(colours / np.maximum(length(colours), 1e-3)[..., None])

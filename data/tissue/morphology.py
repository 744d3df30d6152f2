"""Binary morphology with round elements of any radius, by distance transforms."""

import cv2
import numpy as np

_SMALL = 6.0  # pixels; up to here a kernel is faster than two distance transforms, and gives the same


def depth(mask: np.ndarray) -> np.ndarray:
    """Distance of each pixel of a mask to the nearest one outside; beyond the picture is neither. `(h, w)` float32."""
    return np.asarray(cv2.distanceTransform(_bytes(mask), cv2.DIST_L2, 5))


def opening(mask: np.ndarray, radius: float, depths: np.ndarray | None = None) -> np.ndarray:
    """What of a mask a disc of this radius, in pixels, fits into; faster with its `depth`, where that is known."""
    if radius <= _SMALL:
        return np.asarray(cv2.morphologyEx(_bytes(mask), cv2.MORPH_OPEN, _disc(radius))).view(bool)
    core = (depth(mask) if depths is None else depths) > radius
    return depth(~core) <= radius if core.any() else np.zeros_like(mask)


def _disc(radius: float) -> np.ndarray:
    """What lies within a radius of the middle, as `depth` measures it."""
    reach = int(radius)
    around = np.ones((2 * reach + 1, 2 * reach + 1), bool)
    around[reach, reach] = False
    return (depth(around) <= radius).astype(np.uint8)


def _bytes(mask: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(mask).view(np.uint8)


def closing(mask: np.ndarray, radius: float) -> np.ndarray:
    """A mask with the gaps filled that a disc of this radius, in pixels, does not fit into."""
    margin = int(radius) + 2
    padded = np.pad(mask, margin, mode="edge")
    return ~opening(~padded, radius)[margin:-margin, margin:-margin]


def without_small(mask: np.ndarray, least_px: float) -> np.ndarray:
    """A mask without its pieces of fewer pixels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(_bytes(mask), connectivity=4)
    keep = stats[:, cv2.CC_STAT_AREA] >= least_px
    keep[0] = False
    return np.asarray(keep[labels])


def connected_to(mask: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """The pieces of a mask that hold a seed."""
    count, labels = cv2.connectedComponents(_bytes(mask), connectivity=8)
    keep = np.zeros(count, bool)
    keep[labels[seeds]] = True
    keep[0] = False
    return np.asarray(keep[labels])


def local_deviation(values: np.ndarray, window: int) -> np.ndarray:
    """Standard deviation in a square window around each pixel."""
    mean = cv2.blur(values, (window, window))
    variance = cv2.blur(values * values, (window, window))
    variance -= np.multiply(mean, mean, out=mean)
    return np.asarray(np.sqrt(np.maximum(variance, 0, out=variance), out=variance))

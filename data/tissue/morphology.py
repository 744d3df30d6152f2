"""Binary morphology with round elements of any radius, by distance transforms."""

import cv2
import numpy as np


def depth(mask: np.ndarray) -> np.ndarray:
    """Distance of each pixel of a mask to the nearest one outside; beyond the picture is neither. `(h, w)` float32."""
    return np.asarray(cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5))


def opening(mask: np.ndarray, radius: float) -> np.ndarray:
    """What of a mask a disc of this radius, in pixels, fits into."""
    core = depth(mask) > radius
    return depth(~core) <= radius if core.any() else np.zeros_like(mask)


def closing(mask: np.ndarray, radius: float) -> np.ndarray:
    """A mask with the gaps filled that a disc of this radius, in pixels, does not fit into."""
    margin = int(radius) + 2
    padded = np.pad(mask, margin, mode="edge")
    return ~opening(~padded, radius)[margin:-margin, margin:-margin]


def without_small(mask: np.ndarray, least_px: float) -> np.ndarray:
    """A mask without its pieces of fewer pixels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    keep = stats[:, cv2.CC_STAT_AREA] >= least_px
    keep[0] = False
    return np.asarray(keep[labels])


def connected_to(mask: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """The pieces of a mask that hold a seed."""
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    keep = np.zeros(count, bool)
    keep[np.unique(labels[seeds])] = True
    keep[0] = False
    return np.asarray(keep[labels])


def local_deviation(values: np.ndarray, window: int) -> np.ndarray:
    """Standard deviation in a square window around each pixel."""
    mean = cv2.blur(values, (window, window))
    return np.asarray(np.sqrt(np.maximum(cv2.blur(values * values, (window, window)) - mean * mean, 0)))

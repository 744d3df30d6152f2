"""Where the tissue is on a slide, by its optical density: a classical method that needs no weights."""

from dataclasses import dataclass

import cv2
import numpy as np

from ...errors import LongslideError
from ..slides.slide import Slide
from .base import MAX_MASK_PX, Tissue, TissueSegmenter

METHOD = "longslide-tissue-1"
"""Name and version of the classical method, recorded in feature files."""

MASK_MPP = 10.0
"""Microns per pixel the tissue is looked for at."""

MIN_REGION_UM2 = 20_000.0
"""Smaller pieces are debris: a square of 140 um, a quarter of a tile of 256 px at 0.5 um/px."""

MIN_HOLE_UM2 = 10_000.0
"""Smaller holes are lumens and tears within tissue, and are filled."""


MIN_EXCESS = 0.02
"""Optical density of green above the lower of red and blue: faint eosin and fat have 0.03, noise of glass below 0.015."""


@dataclass(frozen=True)
class OpticalDensity(TissueSegmenter):
    """Tissue by its optical density; see `find_tissue`.

    Attributes:
        threshold: Least optical density of green above the lower of red and blue; less finds paler tissue, and dirt.
        min_area: Smallest piece of tissue in square microns.
        keep_ink: Whether ink of a marker counts as tissue, for slides whose stain looks like ink.
    """

    threshold: float = MIN_EXCESS
    min_area: float = MIN_REGION_UM2
    keep_ink: bool = False

    method = METHOD

    def __call__(self, slide: Slide) -> Tissue:
        """See `find_tissue`."""
        return find_tissue(slide, threshold=self.threshold, min_area=self.min_area, keep_ink=self.keep_ink)


def find_tissue(
    slide: Slide, *, threshold: float = MIN_EXCESS, min_area: float = MIN_REGION_UM2, keep_ink: bool = False
) -> Tissue:
    """Find the tissue of an H&E slide (or of another stain that has colour) by its optical density.

    Glass is estimated as the brightest common colour. Tissue absorbs light and, unlike shadows, coverslip edges and
    black ink or borders, absorbs it unevenly over red, green and blue, and unlike pen ink not in one saturated flat hue.

    Args:
        slide: The slide.
        threshold: See `OpticalDensity`.
        min_area: See `OpticalDensity`.
        keep_ink: See `OpticalDensity`.

    Returns:
        The tissue; with an empty mask when there is none.
    """
    try:
        mpp = slide.mpp.value
    except LongslideError:
        mpp = 0.5  # only the sizes of debris and holes depend on it
    longest = max(slide.dimensions)
    max_px = int(np.clip(longest * mpp / MASK_MPP, min(longest, 512), MAX_MASK_PX))
    picture = slide.thumbnail(max_px)
    height, width = picture.shape[:2]
    downsample = (slide.dimensions[0] / width, slide.dimensions[1] / height)
    mask = segment_tissue(picture, downsample[0] * mpp, threshold=threshold, min_area=min_area, keep_ink=keep_ink)
    return Tissue(mask, downsample, METHOD)


def segment_tissue(
    picture: np.ndarray,
    mpp: float,
    *,
    threshold: float = MIN_EXCESS,
    min_area: float = MIN_REGION_UM2,
    keep_ink: bool = False,
) -> np.ndarray:
    """Find tissue on a thumbnail.

    Args:
        picture: `(h, w, 3)` uint8 RGB.
        mpp: Microns per pixel of the thumbnail.
        threshold: See `OpticalDensity`.
        min_area: See `OpticalDensity`.
        keep_ink: See `OpticalDensity`.

    Returns:
        `(h, w)` bool.
    """
    smooth = cv2.GaussianBlur(picture, (0, 0), 1.0)
    density = _optical_density(smooth)
    red, green, blue = (density[..., channel] for channel in range(3))
    absorbed, chroma = density.mean(-1), density.max(-1) - density.min(-1)

    # Haematoxylin and eosin absorb green most, or nearly: pure haematoxylin a little more red, DAB (brown) more blue.
    excess = green - np.minimum(red, blue)
    stained = (excess > threshold) & (excess > 0.15 * absorbed) & (green >= 0.75 * red) & (green >= 0.6 * blue)
    dark = (absorbed > 0.9) & (chroma < 0.35 * absorbed)
    mask = stained & ~dark
    if not keep_ink:
        mask &= ~_pen(smooth, density, mpp)

    radius = max(1, round(15 / mpp))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
    closed = cv2.morphologyEx(opened, cv2.MORPH_CLOSE, kernel)
    closed[dark] = 0
    return _drop_small(closed, min_area / mpp**2, MIN_HOLE_UM2 / mpp**2)


def _optical_density(picture: np.ndarray) -> np.ndarray:
    """-log10 of the transmitted share of light in each channel, 0 for glass; (h, w, 3) float32."""
    pixels = picture.reshape(-1, 3)
    # Glass: the most common bright colour that is not the pure white of stitching gaps.
    brightness = pixels.min(1)
    bright = pixels[(brightness > 150) & (brightness < 254)]
    glass = np.full(3, 245.0)
    if len(bright) > 0.001 * len(pixels):
        level = np.percentile(bright.min(1), 90)
        near = bright[np.abs(bright.min(1).astype(np.float32) - level) < 8]
        # A slide full of pale tissue has no glass to measure: never take the colour of a stain for it. Stains absorb
        # green more than red or blue; glass of another colour, blue or yellow, may have more of it.
        candidate = np.median(near, axis=0)
        spread, lacks_green = np.ptp(candidate), candidate[[0, 2]].min() > candidate[1] + 3
        if candidate.min() > 180 and spread < (22 if lacks_green else 45):
            glass = candidate
    return np.asarray(np.maximum(-np.log10(np.maximum(picture, 1) / glass), 0), np.float32)


def _pen(picture: np.ndarray, density: np.ndarray, mpp: float) -> np.ndarray:
    """Ink of a marker: blue, green or red in a saturated hue that stains do not have, with its soft rim."""
    red, green, blue = (density[..., channel] for channel in range(3))
    # Blue ink absorbs red most, as blue haematoxylin does; but nuclei make tissue uneven, and ink is flat.
    absorbed = density.mean(-1)
    deviation = np.sqrt(np.maximum(cv2.blur(absorbed**2, (5, 5)) - cv2.blur(absorbed, (5, 5)) ** 2, 0))
    flat = deviation < 0.2 * absorbed
    blue_pen = flat & (red > 1.05 * green) & (red > blue + 0.15)
    green_pen = (density.max(-1) > 0.25) & (green < 0.75 * np.minimum(red, blue))
    # Red ink lets red through almost whole, and absorbs blue as strongly as green; eosin absorbs blue far less.
    red_pen = flat & (blue > 0.8 * green) & (red < 0.3 * green) & (green > 0.2)
    ink = (blue_pen | green_pen | red_pen).astype(np.uint8)
    ink = cv2.morphologyEx(ink, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    rim = max(1, round(40 / mpp))
    return cv2.dilate(ink, np.ones((2 * rim + 1, 2 * rim + 1), np.uint8)).astype(bool)


def _drop_small(mask: np.ndarray, min_region_px: float, min_hole_px: float) -> np.ndarray:
    def without_small(binary: np.ndarray, smallest: float) -> np.ndarray:
        _, labels, stats, _ = cv2.connectedComponentsWithStats(binary.astype(np.uint8), connectivity=4)
        keep = stats[:, cv2.CC_STAT_AREA] >= smallest
        keep[0] = False
        return np.asarray(keep[labels])

    filled = ~without_small(mask == 0, min_hole_px)
    return without_small(filled, max(4.0, min_region_px))

"""Where the tissue is on a slide, by its optical density: a classical method that needs no weights."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from ...errors import LongslideError
from ..slides.slide import Slide
from .base import MAX_MASK_PX, Tissue, TissueSegmenter
from .channels import average, highest, lowest, spread
from .ink import find_ink
from .morphology import closing, connected_to, depth, local_deviation, opening, without_small
from .under_ink import tissue_under_ink

METHOD = "longslide-tissue-5"
"""Name and version of the classical method, recorded in feature files."""

MASK_MPP = 10.0
"""Microns per pixel the tissue is looked for at, unless that makes a mask larger than `MAX_MASK_PX` squared."""

FINEST_MASK_MPP = 4.0
"""Microns per pixel that a small piece of a slide is looked at at: finer, single nuclei would be seen."""

LARGE_PX = 1_500_000
"""Glass, fat and ink are looked for at half the resolution on pictures of more pixels: it takes a quarter of the time."""

MIN_REGION_UM2 = 2_500.0
"""Smaller pieces are debris: a square of 50 um."""

MAX_HOLE_UM2 = 60_000.0
"""Smaller holes are lumens, tears and fat cells within tissue, and are filled: a square of 245 um."""

MAX_HOLE_SHARE = 0.05
"""Of a picture of a few hundred microns larger gaps are glass."""

MIN_DENSITY = 0.02
"""Optical density of green above the lower of red and blue: faint eosin and fat have 0.03, noise of glass below 0.015."""

# Glass is flat over 60 and over 300 um, in grey levels after smoothing: 0.1 to 0.9; the palest tissue has 1.2 and 2.
_FLAT, _FLAT_WIDELY = 1.2, 1.4


@dataclass(frozen=True)
class OpticalDensity(TissueSegmenter):
    """Tissue by its optical density; see `find_tissue`.

    Attributes:
        threshold: Least optical density of green above the lower of red and blue; or, for stains that absorb green least,
            of the highest channel above the lowest, then 1.25 times as much. Less finds paler tissue, and dirt.
        min_area: Smallest piece of tissue in square microns.
        keep_ink: Whether ink on glass counts as tissue too, for slides whose stain looks like ink.
    """

    threshold: float = MIN_DENSITY
    min_area: float = MIN_REGION_UM2
    keep_ink: bool = False

    method = METHOD

    def __call__(self, slide: Slide) -> Tissue:
        """See `find_tissue`."""
        return find_tissue(slide, threshold=self.threshold, min_area=self.min_area, keep_ink=self.keep_ink)


def find_tissue(
    slide: Slide, *, threshold: float = MIN_DENSITY, min_area: float = MIN_REGION_UM2, keep_ink: bool = False
) -> Tissue:
    """Find the tissue of an H&E slide (or of another stain that has colour) by its optical density.

    Glass is the brightest colour that is flat. Tissue absorbs light and, unlike shadows, dust, coverslip edges and
    black borders, absorbs it unevenly over red, green and blue (in a grey scan its darkness alone is judged). It ends where
    its density is half of that within. Fat is found by its mean colour and unevenness, ink as `find_ink` says,
    and tissue below ink as `tissue_under_ink` does.

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
    *_, width, height = slide.bounds
    longest = max(width, height)
    most = MAX_MASK_PX * np.sqrt(longest / min(width, height))  # so many pixels in all as a square of that edge
    least = min(longest, 512, longest * mpp / FINEST_MASK_MPP)
    max_px = int(np.clip(longest * mpp / MASK_MPP, max(16, least), most))
    picture = slide.thumbnail(max_px)
    mask, ink = _tissue_and_ink(picture, width / picture.shape[1] * mpp, threshold, min_area, keep_ink)
    return Tissue.on_thumbnail(mask, slide, METHOD, {"ink": ink})


def segment_tissue(
    picture: np.ndarray,
    mpp: float,
    *,
    threshold: float = MIN_DENSITY,
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
    return _tissue_and_ink(picture, mpp, threshold, min_area, keep_ink)[0]


def _tissue_and_ink(
    picture: np.ndarray, mpp: float, threshold: float, min_area: float, keep_ink: bool
) -> tuple[np.ndarray, np.ndarray]:
    glass = _glass(picture, mpp)
    density = _optical_density(cv2.GaussianBlur(picture.astype(np.float32), (0, 0), 0.8), glass)
    red, green, blue = (density[..., channel] for channel in range(3))
    absorbed, chroma = average(density), spread(density)
    grey = np.mean(spread(picture) < 3) > 0.995
    if grey:  # a grey scan: darkness is all there is
        strength = absorbed / 1.5
        stained = strength > threshold
    else:
        # H&E absorb green most; other stains any colour. What absorbs all alike is a shadow, a coverslip's edge or dust.
        strength = np.maximum(green - np.minimum(red, blue), chroma / 1.25)
        strength = np.maximum(strength, _of_pale_tissue(strength, chroma - 0.4 * absorbed, threshold, mpp))
        stained = (strength > threshold) & (chroma > 0.15 * absorbed)
    dark = (absorbed > 0.9) & (chroma < 0.35 * absorbed)
    if not grey:
        dark |= (absorbed > 0.5) & (chroma < 0.2 * absorbed)  # black ink that is worn

    foreground = closing(_within_half_density(stained | dark, np.maximum(strength, 0.5 * absorbed), mpp), 1.0)
    ink = np.zeros_like(dark)
    without_glass = foreground.mean() > 0.9  # there is nothing that a stroke stands out from
    if not (grey or keep_ink or without_glass):
        ink = _coarsely(find_ink, (foreground, density), mpp) & foreground
        if ink.sum() > 0.5 * foreground.sum() and foreground.mean() > 0.5:  # no marker covers half of a picture
            ink = np.zeros_like(dark)
        rim = 2 * max(2, round(25 / mpp)) + 1
        ink = cv2.dilate(ink.astype(np.uint8), np.ones((rim, rim), np.uint8)) > 0
    lost = ink if glass.max() >= 252 else ink | (lowest(picture) > 253)  # a gap between parts that were stitched
    not_tissue = dark | lost
    solid = _within_half_density(stained & foreground & ~not_tissue, strength, mpp)
    solid = _within_half_density(solid, absorbed, mpp)  # JPEG keeps colours at half the resolution, brightness whole
    tissue = closing(solid, max(1.0, 20 / mpp))
    within_fat = _coarsely(_within_fat, (density, solid, not_tissue), mpp)
    loose = opening((within_fat > 72) & ~tissue, max(1.5, 32 / mpp))  # back by as much as it was smoothed
    thick = opening(~without_small(~tissue, MAX_HOLE_UM2 / mpp**2), max(2.0, 40 / mpp))
    beyond_blur = depth(~thick) > max(5.0, 100 / mpp)
    loose = connected_to(loose, loose & (thick | beyond_blur))  # the halo of a core is no fat
    if loose.any():
        loose |= (within_fat > 50) & (depth(~loose) < 40 / mpp) & ~tissue  # a margin of fat is thin strands
        both = tissue | loose
        tissue = closing(both, max(1.0, 25 / mpp)) | (closing(both, 120 / mpp) & (depth(~loose) < 150 / mpp))
    tissue &= ~lost & (~dark | closing(solid, max(1.0, 60 / mpp)))  # what is dark amid tissue is pigment or a fold
    if ink.any():
        layers = (ink & foreground, (stained | dark) & ~lost | ink, tissue, density)
        tissue |= _coarsely(tissue_under_ink, layers, mpp)
    filled = ~without_small(~tissue, min(MAX_HOLE_UM2 / mpp**2, MAX_HOLE_SHARE * tissue.size))
    tissue = without_small(filled, max(4.0, min_area / mpp**2))
    return tissue, ink & ~tissue


def _coarsely(find: Callable[..., np.ndarray], layers: tuple[np.ndarray, ...], mpp: float) -> np.ndarray:
    """What a function of rasters and microns per pixel finds; on large pictures at half their resolution."""
    height, width = layers[0].shape[:2]
    if height * width <= LARGE_PX or mpp > 1.2 * MASK_MPP:
        return find(*layers, mpp)
    size = (-(-width // 2), -(-height // 2))
    halves = [
        cv2.resize(layer.view(np.uint8) * 255 if layer.dtype == bool else layer, size, interpolation=cv2.INTER_AREA)
        for layer in layers
    ]
    found = find(*(half > 127 if half.dtype == np.uint8 else half for half in halves), 2 * mpp)
    if found.dtype == bool:
        return cv2.resize(found.view(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST).view(bool)
    return np.asarray(cv2.resize(found, (width, height), interpolation=cv2.INTER_LINEAR))


def _glass(picture: np.ndarray, mpp: float) -> np.ndarray:
    """The colour of glass, whatever it is: the brightest one that is flat, as no tissue is."""
    if picture.shape[0] * picture.shape[1] > LARGE_PX:
        picture = cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        mpp *= 2
    smooth = cv2.GaussianBlur(picture.astype(np.float32), (0, 0), 1.5)
    near, wide = (2 * max(2, round(microns / mpp / 2)) + 1 for microns in (60, 300))
    deviation, darkest = highest(local_deviation(smooth, near)), lowest(smooth)
    flat = (deviation < _FLAT) & (highest(local_deviation(smooth, wide)) < _FLAT_WIDELY) & (darkest > 120)
    if np.mean(flat) < 0.01 and min(flat.shape) * mpp < 1000:  # it may lie in gaps, brighter than all else
        brightest = darkest > max(200.0, float(np.percentile(darkest, 95)) - 4)
        flat = (deviation < 0.75 * _FLAT) & brightest & (spread(smooth) < 20)
    if np.mean(coloured := flat & (darkest < 253.5)) > 0.02:
        flat = coloured  # the pure white of stitching gaps is no glass
    if np.mean(flat) < 0.01:  # tissue fills the picture: glass would be neutral, and as bright as anything
        return np.full(3, max(200.0, float(np.percentile(highest(smooth), 99.5))), np.float32)
    colours = smooth[flat]
    level = average(colours)
    counts, edges = np.histogram(level, bins=np.arange(120, 260, 4))
    peak = int(np.flatnonzero(np.convolve(counts, [1, 1, 1], "same") > 0.15 * counts.sum())[-1])
    while peak > 0 and counts[peak - 1] > counts[peak]:
        peak -= 1
    return np.asarray(np.median(colours[np.abs(level - edges[peak] - 2) < 6], axis=0))


def _optical_density(picture: np.ndarray, glass: np.ndarray) -> np.ndarray:
    """-log10 of the share of light that passes, in each channel: 0 for glass, below for what is brighter; float32."""
    return np.asarray(cv2.log(np.maximum(glass, 1) / np.maximum(picture, 1)) * np.float32(1 / np.log(10)))


def _of_pale_tissue(strength: np.ndarray, coloured: np.ndarray, threshold: float, mpp: float) -> np.ndarray:
    """What to take for the strength of pale tissue, which JPEG's blocks and gaps between cells make uneven.

    It is 1.5 times the median within 40 um, up to 1.5 times the threshold: glass has a third of that, a bluish shadow two.
    """
    window = 2 * max(2, round(40 / mpp)) + 1
    scaled = np.minimum(strength * np.float32(50 / threshold), 255).astype(np.uint8)
    median = cv2.medianBlur(scaled, window)
    beside = np.ones((2 * max(6, round(120 / mpp)) + 1,) * 2, np.uint8)
    is_pale = cv2.dilate(cv2.blur(scaled, (3, 3)), beside) < 200  # not the halo of what is stained well
    is_pale &= cv2.blur(coloured, (window, window)) > 0  # no shadow
    return np.where(is_pale, np.minimum(median, 50) * np.float32(1.5 * threshold / 50), 0)


def _within_half_density(mask: np.ndarray, strength: np.ndarray, mpp: float) -> np.ndarray:
    """A mask up to where its strength is half of that around: a blurred border runs through its middle."""
    window = 2 * max(2, round(50 / mpp)) + 1
    inside = np.where(mask, strength, 0).astype(np.float32)
    squares, sums = (cv2.blur(values, (window, window)) for values in (inside * inside, inside))
    return mask & (strength * np.maximum(sums, 1e-3) > 0.5 * squares)


def _within_fat(density: np.ndarray, solid: np.ndarray, not_tissue: np.ndarray, mpp: float) -> np.ndarray:
    """How many microns deep each pixel is in fat, smoothed by 60 um; 0 outside.

    Its strands are too thin to be seen one by one: it is pinker than glass on average, and uneven where glass is not.
    """
    excess = np.clip(density[..., 1] - 0.5 * (density[..., 0] + density[..., 2]), -0.02, 0.02)
    bulk = opening(solid & (density[..., 1] > 0.12), max(2.0, 20 / mpp)) | opening(solid, max(4.0, 60 / mpp))
    # JPEG's halo of cells, stroma and ink is pink too.
    unknown = (depth(~bulk) <= max(4.0, 20 / mpp)) | (depth(~not_tissue) <= max(6.0, 20 / mpp))
    excess[unknown] = 0

    def smoothed(values: np.ndarray, microns: float) -> np.ndarray:
        return cv2.GaussianBlur(values, (0, 0), max(1.0, microns / mpp))

    share = np.maximum(smoothed((~unknown).astype(np.float32), 60), 0.3)
    mean = smoothed(excess, 60) / share
    fine = excess - smoothed(excess, max(20, 1.5 * mpp))
    fine[unknown] = 0
    uneven = np.sqrt(smoothed(fine * fine, 60) / share)
    quiet = mean < 0.001
    noise = float(np.median(uneven[quiet])) if np.mean(quiet) > 0.01 else 0.0
    window = 2 * max(1, round(90 / mpp)) + 1
    red, green = (cv2.blur(np.clip(density[..., channel], -0.05, 0.2), (window, window)) for channel in (0, 1))
    pink = (mean > 0.0009) & ((uneven > max(5 * noise, 0.0006)) | solid)
    pink &= solid | (green > red)  # not the tint of a shadow
    pink = connected_to(pink, pink & (mean > 0.0018))
    pink |= bulk
    margin = int(400 / mpp)
    wide = opening(np.pad(pink, margin, mode="edge"), 150 / mpp)  # not the halo of a thin core or of a few cells
    within = np.minimum(depth(wide), np.float32(1e6))  # all of it: as deep as can be
    return np.asarray(within[margin:-margin, margin:-margin] * np.float32(mpp))

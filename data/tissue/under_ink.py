"""Tissue below the ink of markers: ink is a dye that light passes, and optical densities of layers add up."""

import cv2
import numpy as np

from .channels import length, unit
from .morphology import closing, connected_to, depth, opening

HALF_WIDTHS_UM = (40.0, 80.0, 160.0, 320.0, 640.0)
"""Half the widths of strokes that tissue goes on below."""

RIM_UM = 75.0
"""Ink's soft rim, and the tissue beside it that is pale in comparison."""

MUCH_TISSUE, NO_TISSUE = 0.5, 0.1
"""Shares of the tissue's usual density that there is, or is not, below ink."""

LEAST_DIFFERENCE = 0.06
"""Optical density by which usual tissue lies off a dye's colour, for its absence below ink to be believed."""


def tissue_under_ink(
    ink: np.ndarray, stained: np.ndarray, tissue: np.ndarray, density: np.ndarray, mpp: float
) -> np.ndarray:
    """Where ink lies on tissue: between tissue on both sides of a stroke, or denser than the dye by a tissue's density.

    Args:
        ink: `(h, w)` bool, strokes with their rims.
        stained: `(h, w)` bool, all that absorbs light.
        tissue: `(h, w)` bool, what is found beside ink.
        density: `(h, w, 3)` optical density of red, green and blue.
        mpp: Microns per pixel.

    Returns:
        `(h, w)` bool.
    """
    between = np.zeros_like(ink)
    if not ink.any() or not tissue.any():
        return between
    near = stained & (depth(~ink) <= RIM_UM / mpp)
    left = ink
    for half_width in HALF_WIDTHS_UM:
        if not left.any():
            break
        wider = opening(ink, half_width / mpp)
        strokes = left & ~wider
        if strokes.any():
            reach = min(half_width / mpp, float(depth(strokes).max())) + 50 / mpp
            between |= near & (depth(~strokes) <= RIM_UM / mpp) & closing(tissue, reach)
        left = wider
    amount, certain = _tissue_amount(ink, between, tissue, density, mpp)
    absent, beyond = between & certain & (amount < NO_TISSUE), ~(tissue | between)
    between &= ~(absent & connected_to(absent | beyond, beyond))  # amid tissue is tissue
    known = tissue | between
    denser = opening(amount > MUCH_TISSUE, max(1.0, 30 / mpp))
    return np.asarray(between | (denser & connected_to(denser | (depth(~known) <= max(2.0, 40 / mpp)), known)))


def _tissue_amount(
    ink: np.ndarray, between: np.ndarray, tissue: np.ndarray, density: np.ndarray, mpp: float
) -> tuple[np.ndarray, np.ndarray]:
    """How much tissue lies below ink, 1 for as much as elsewhere, and where that is certain.

    It is where the dye is of another colour than tissue and known from strokes that are not between tissue.
    """
    typical = np.median(density[tissue][::5], axis=0).astype(np.float64)
    sigma = max(1.0, 25 / mpp)
    share = cv2.GaussianBlur(ink.astype(np.float32), (0, 0), sigma)
    smooth = cv2.GaussianBlur(np.where(ink[..., None], density, 0), (0, 0), sigma)
    where = ink & (share > 0.2)
    colours = smooth[where] / share[where][:, None]
    directions, on_glass = unit(colours), ~between[where]
    amounts, unlike = np.zeros(len(colours), np.float32), np.zeros(len(colours), bool)
    left = length(colours) > 0.15
    while np.count_nonzero(left) > 50:
        # The commonest direction is a dye's, and those near it are of its strokes.
        known = np.count_nonzero(left & on_glass) >= 50
        pure = left & on_glass if known else left
        bins = np.rint(directions[pure][:, :2] * 20).astype(np.int64) @ np.array([1000, 1])
        values, counts = np.unique(bins, return_counts=True)
        dye = unit(np.median(directions[pure][bins == values[counts.argmax()]], axis=0).astype(np.float64))
        off = length(directions - dye.astype(np.float32))
        own = left & (off < 0.25)
        if not own.any():
            break
        along, pure = colours[own].astype(np.float64) @ dye, (off[own] < 0.06) & pure[own]
        strength = float(np.percentile(along[pure] if pure.any() else along, 40))
        # Least squares for the amounts of dye and tissue, with a dye near its usual strength: ridge regression.
        weight, prior = 1 / 0.05**2, 1 / (0.25 * strength) ** 2
        normal = weight * np.array([[1, dye @ typical], [dye @ typical, typical @ typical]]) + np.diag([prior, 0])
        right = weight * np.stack([along, colours[own] @ typical]) + np.array([[prior * strength], [0]])
        amounts[own] = np.linalg.solve(normal, right)[1]
        unlike[own] = (
            known and on_glass[own].mean() > 0.2 and np.linalg.norm(typical - (typical @ dye) * dye) > LEAST_DIFFERENCE
        )
        left &= ~own
    amount, certain = np.zeros(ink.shape, np.float32), np.zeros_like(ink)
    amount[where], certain[where] = amounts, unlike
    return amount, certain

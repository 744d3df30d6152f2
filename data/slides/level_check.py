"""Whether the reduced levels of a slide show what level 0 shows: the same colours at the same places."""

from typing import TYPE_CHECKING

import cv2
import numpy as np

from ...errors import LongslideError

if TYPE_CHECKING:
    from .slide import Slide

_PATCH = 96  # edge of what is compared, in pixels of the reduced level
_LARGEST = 2048  # edge of what is read of the finer level at most
_COLOUR = 25  # grey levels between the mean colours of a patch: labelled YCbCr as RGB they differ by about 100
_CONTRAST = 6  # standard deviation of grey below which a patch tells nothing of its place
_STRETCHED = 0.02  # by which the downsample in x may differ from that in y
_CORRELATION = 0.4  # of a patch with itself at the finer level; 0.9 and more on real slides, around 0 at another place


def differing_levels(slide: "Slide") -> set[int]:
    """Reduced levels that are of another shape than level 0, show other colours, or the same ones elsewhere.

    Each is compared with the next finer level that can be trusted, at the places of the coarsest level with most contrast.
    Places that cannot be read tell nothing.
    """
    places = _telling_places(slide)
    differing: set[int] = set()
    finer = 0
    for level in range(1, len(slide.level_dimensions)):
        found = [agrees for x, y in places if (agrees := _agrees(slide, level, finer, x, y)) is not None]
        if not _of_one_shape(slide.level_dimensions[level], slide.dimensions) or (found and not any(found)):
            differing.add(level)
        else:
            finer = level
    return differing


def _of_one_shape(size: tuple[int, int], whole: tuple[int, int]) -> bool:
    """Whether a level covers what level 0 covers; its edges may be a pixel or two off."""
    scale_x, scale_y = (b / a for a, b in zip(size, whole, strict=True))
    return abs(scale_x / scale_y - 1) <= _STRETCHED + 2 / min(size)


def _telling_places(slide: "Slide") -> list[tuple[float, float]]:
    """Centres of the patches, in level-0 pixels."""
    level = len(slide.level_dimensions) - 1
    width, height = slide.level_dimensions[level]
    if level == 0 or width * height > _LARGEST**2:
        return [(slide.dimensions[0] / 2, slide.dimensions[1] / 2)] if level else []
    try:
        overview = slide.read_region(0, 0, level, width, height)
    except LongslideError:
        return [(slide.dimensions[0] / 2, slide.dimensions[1] / 2)]
    cells = max(1, width // 32), max(1, height // 32)
    grey = cv2.cvtColor(overview, cv2.COLOR_RGB2GRAY).astype(np.float32)
    mean, square = (cv2.resize(values, cells, interpolation=cv2.INTER_AREA) for values in (grey, grey**2))
    order = np.argsort(-(square - mean**2), axis=None)[:3]
    scale_x, scale_y = (a / b for a, b in zip(slide.dimensions, cells, strict=True))
    return [((number % cells[0] + 0.5) * scale_x, (number // cells[0] + 0.5) * scale_y) for number in order.tolist()]


def _agrees(slide: "Slide", level: int, finer: int, x: float, y: float) -> bool | None:
    downsample, ratio = slide.level_downsamples[level], slide.level_downsamples[level] / slide.level_downsamples[finer]
    edge = max(8, min(_PATCH, int(_LARGEST / ratio), *slide.level_dimensions[level]))
    left, top = (
        round(min(max(0.0, centre - edge * downsample / 2), max(0.0, size - edge * downsample)))
        for centre, size in zip((x, y), slide.dimensions, strict=True)
    )
    try:
        coarse = slide.read_region(left, top, level, edge, edge)
        fine = slide.read_region(left, top, finer, round(edge * ratio), round(edge * ratio))
    except LongslideError:
        return None
    fine = cv2.resize(fine, (edge, edge), interpolation=cv2.INTER_AREA)
    if np.abs(coarse.mean((0, 1)) - fine.mean((0, 1))).max() > _COLOUR:
        return False
    greys = [
        cv2.GaussianBlur(cv2.cvtColor(one, cv2.COLOR_RGB2GRAY).astype(np.float32), (0, 0), 2) for one in (coarse, fine)
    ]
    if min(one.std() for one in greys) < _CONTRAST:
        return None if max(one.std() for one in greys) < 2 * _CONTRAST else False
    return bool(np.corrcoef(greys[0].ravel(), greys[1].ravel())[0, 1] > _CORRELATION)

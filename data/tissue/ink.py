"""Ink of markers on a slide: what distinguishes it from stained tissue of the same colour.

Ink is one dye: its hue does not change, and its density hardly; tissue holds two stains in uneven shares, and nuclei. Ink
lies in strokes, beside or across tissue, in a colour that the bulk of the tissue lacks. Whether tissue lies below it is
another question: see `under_ink.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from .channels import average, length, spread, unit
from .morphology import closing, connected_to, depth, opening

HALF_WIDTHS_UM = (40.0, 80.0, 160.0, 320.0, 640.0, 1200.0)
"""Half the widths of strokes that are looked for, in microns."""

MIN_CHROMA = 0.2
"""Spread of the optical densities of red, green and blue that a marker reaches; black ink reaches the next one."""

MIN_DARKNESS = 0.45
"""Mean optical density of black ink."""

MAX_HUE_SPREAD = 0.035
"""Median distance of the directions of optical density from their median: ink has 0.005 to 0.02, H&E 0.04 to 0.08."""

LEAST_TISSUE = 0.15
"""Where less than this of all that absorbs light were tissue, only what can be nothing else is ink."""

SMOOTH = 0.6
"""Ink is smoother, in hue from pixel to pixel and in density, than so much of what is usual in the picture."""

MIN_DEVIATION = 0.07
"""Least of what counts as usual unevenness of density: tissue has 0.07 to 0.12, ink 0.01 to 0.05."""

MIN_HUE_DEVIATION = 0.012
"""Least of what counts as usual: H&E has 0.015 to 0.03, ink 0.004 to 0.01; a slide of nothing but ink has no usual."""


@dataclass(frozen=True)
class _Piece:
    where: tuple[slice, slice]
    mask: np.ndarray
    slenderness: float
    flatness: float
    hue_spread: float
    direction: np.ndarray
    density: np.ndarray

    @property
    def is_green_or_black(self) -> bool:
        """Whether it is of a colour that no stain has."""
        red, green, blue = self.direction.tolist()
        black = max(red, green, blue) < (1.6 if average(self.density) > MIN_DARKNESS else 1.3) * min(red, green, blue)
        return bool(black or red > blue > 1.1 * green)

    @property
    def is_brown(self) -> bool:
        """Whether it is of the colour of DAB, which no marker has."""
        red, green, blue = self.direction.tolist()
        return bool(blue > 1.1 * green and red > 0.25 * blue and green > red and not self.is_green_or_black)

    @property
    def is_no_tissue(self) -> bool:
        """Whether it is so thin and even, or of such a colour, that no tissue is like it."""
        flat = self.flatness < (0.05 if self.slenderness > 40 else 0.01)
        thin = self.slenderness > 10 and flat and self.hue_spread < 0.02
        return self.is_green_or_black or (thin and not self.is_brown)

    @property
    def area(self) -> int:
        return int(np.count_nonzero(self.mask))


def find_ink(foreground: np.ndarray, density: np.ndarray, mpp: float) -> np.ndarray:
    """Find the ink in all that absorbs light.

    Args:
        foreground: `(h, w)` bool, tissue and ink.
        density: `(h, w, 3)` optical density of red, green and blue.
        mpp: Microns per pixel.

    Returns:
        `(h, w)` bool; without the soft rim of the strokes.
    """
    direction = unit(density)
    relative, unevenness, rough = _unevenness(foreground, density)
    ink = np.zeros_like(foreground)
    taken: list[_Piece] = []

    def take(piece: _Piece) -> None:
        ink[piece.where] |= piece.mask
        taken.append(piece)

    measured: dict[tuple[int, ...], _Piece | None] = {}  # most pieces are met again at the next width
    rest, depths = foreground.copy(), depth(foreground)
    for half_width in HALF_WIDTHS_UM:
        if half_width < 1.2 * mpp:
            continue
        bulk = opening(rest, half_width / mpp, depths)
        sample = density.reshape(-1, 3)[np.flatnonzero(bulk & rough)[::7]]
        for piece in _pieces(rest & ~bulk, density, direction, relative, max(8.0, (160 / mpp) ** 2), measured):
            if _is_stroke(piece, sample, 7):
                take(piece)
        if np.any(rest & ink):
            rest &= ~ink
            depths = depth(rest)
        elif not len(sample):
            break  # wider strokes would be the same pieces
    for stroke in _smooth_strokes(rest, density, direction, relative, unevenness, rough, mpp, taken):
        take(stroke)
    rest &= ~ink
    if np.count_nonzero(rest) < LEAST_TISSUE * np.count_nonzero(foreground):
        # Next to nothing but ink: a slide without tissue, or tissue of one even stain.
        taken = [piece for piece in taken if piece.is_no_tissue]
        ink = np.zeros_like(foreground)
        for piece in taken:
            ink[piece.where] |= piece.mask
        rest = foreground & ~ink
    for vivid in _vivid_strokes(rest, density, mpp):
        ink |= vivid
        rest &= ~vivid
    return ink


def _pieces(
    mask: np.ndarray,
    density: np.ndarray,
    direction: np.ndarray,
    relative: np.ndarray,
    least_px: float,
    measured: dict[tuple[int, ...], _Piece | None],
) -> Iterator[_Piece]:
    """The connected pieces that are of one saturated or dark colour."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    for number in np.flatnonzero(stats[:, cv2.CC_STAT_AREA] >= least_px):
        if number == 0:
            continue
        place = tuple(stats[number].tolist())
        if place not in measured:
            x, y, width, height, _ = place
            where = (slice(y, y + height), slice(x, x + width))
            measured[place] = _measure(where, labels[where] == number, density, direction, relative)
        piece = measured[place]
        if piece is not None:
            yield piece


def _measure(
    where: tuple[slice, slice], piece: np.ndarray, density: np.ndarray, direction: np.ndarray, relative: np.ndarray
) -> _Piece | None:
    """A connected piece, if it is of one saturated or dark colour."""
    depths = depth(np.pad(piece, 1))[1:-1, 1:-1]
    radius = float(depths.max())
    core = piece & (depths >= 0.6 * radius)
    if radius < 1 or np.count_nonzero(core) < 4:
        return None
    colours = density[where][core]
    chroma, darkness = spread(colours), average(colours)
    slenderness = float(np.count_nonzero(piece) / (np.pi * radius**2))
    least = MIN_CHROMA if slenderness < 15 else 0.75 * MIN_CHROMA
    if np.mean((chroma > least) | (darkness > MIN_DARKNESS)) < 0.3:
        return None
    densest = chroma + 0.5 * darkness >= np.median(chroma + 0.5 * darkness)
    directions = direction[where][core][densest]
    typical = unit(np.median(directions, axis=0))
    inner = piece & (depths >= min(2.0, 0.6 * radius))
    if np.mean(length(direction[where][inner] - typical) < 0.13) < 0.5:
        return None
    flatness = float(np.median(relative[where][core]))
    if slenderness < 6:  # short and thick: all of it must be flat, or it is tissue that a stroke crosses
        flatness = max(flatness, float(np.percentile(relative[where][piece & (depths >= 0.35 * radius)], 70)))
    hue_spread = float(np.median(length(directions - typical)))
    own = piece & (length(direction[where] - typical) < 0.1)  # without tissue that hangs on to it
    return _Piece(where, own, slenderness, flatness, hue_spread, typical, np.median(colours[densest], axis=0))


def _is_stroke(piece: _Piece, bulk: np.ndarray, every: int) -> bool:
    """Whether a thin piece is ink, given each `every`-th colour of the bulk that it is not part of."""
    sure = piece.is_green_or_black and piece.hue_spread < 0.02
    if piece.hue_spread > MAX_HUE_SPREAD or piece.slenderness < (1.5 if sure else 3 if piece.flatness <= 0.05 else 6):
        return False
    if piece.is_brown:
        return False
    if piece.flatness > 0.1 and piece.hue_spread > 0.02:
        return False  # strokes a few pixels wide run together, and are uneven by that; not in their hue
    if 0.07 < piece.flatness < 0.13 and piece.hue_spread > 0.01 and piece.slenderness < 20 and not sure:
        return False  # as uneven as tissue of one stain; strokes with gaps between them are more so
    if not len(bulk):
        return piece.is_no_tissue  # thin biopsies of a single stain, with nothing to compare them with
    alike = _alike(piece, bulk)
    # A stroke goes on over tissue; a margin of the tissue is of its colour, and uneven.
    one_dye = piece.flatness < 0.03 or (piece.flatness < 0.06 and piece.hue_spread < 0.006)
    return (
        bool(sure or np.mean(alike) < 0.3)
        and every * int(np.count_nonzero(alike)) < (8.0 if one_dye else 0.5) * piece.area
    )


def _alike(piece: _Piece, colours: np.ndarray) -> np.ndarray:
    """Which colours could be of the piece's dye."""
    return (length(unit(colours) - piece.direction) < 0.1) & (length(colours) > 0.5 * np.linalg.norm(piece.density))


def _smooth_strokes(
    rest: np.ndarray,
    density: np.ndarray,
    direction: np.ndarray,
    relative: np.ndarray,
    unevenness: np.ndarray,
    rough: np.ndarray,
    mpp: float,
    inks: list[_Piece],
) -> Iterator[_Piece]:
    """Strokes of any width and shape, which may touch tissue or run together: smooth, and of the hue of one dye."""
    rest = rest.copy()
    seeds = opening(rest & (cv2.blur(unevenness, (5, 5)) < SMOOTH), max(1.5, 30 / mpp))
    least_px = max(8.0, (100 / mpp) ** 2)
    dyes: list[_Piece] = []
    smooth = (
        piece
        for piece in _pieces(seeds, density, direction, relative, least_px, {})
        if piece.hue_spread < 0.03 and piece.flatness < 0.1 and not piece.is_brown
    )
    for piece in (*inks, *smooth):
        if all(np.linalg.norm(piece.direction - dye.direction) > 0.05 for dye in dyes):
            dyes.append(piece)
    by_glass = depth(rest) <= 4
    lengths = length(density)
    for dye in dyes:
        member = rest & (length(direction - dye.direction) < 0.08) & (lengths > 0.35 * np.linalg.norm(dye.density))
        for stroke in _pieces(opening(member, 1.0), density, direction, relative, least_px, {}):
            where = stroke.where
            border = stroke.mask & (depth(np.pad(stroke.mask, 1))[1:-1, 1:-1] <= 1.5)
            if stroke.hue_spread > 0.03 or np.mean(by_glass[where][border]) < 0.25:
                continue
            others = rough & rest
            others[where] &= ~stroke.mask
            sample = density.reshape(-1, 3)[np.flatnonzero(others)[::7]]
            evenness = float(np.median(unevenness[where][stroke.mask]))
            is_smooth = evenness < SMOOTH and stroke.flatness < 0.06
            is_smooth |= evenness < 0.5 * SMOOTH and stroke.slenderness > 9  # partly over tissue, or with gaps
            is_smoothest = evenness < 0.5 * SMOOTH and stroke.flatness < 0.02
            unlike = len(sample) > 0 and np.mean(_alike(stroke, sample)) < (0.6 if is_smoothest else 0.3)
            of_an_ink = any(dye is ink for ink in inks) and _is_stroke(stroke, sample, 7)
            if (is_smooth and (unlike or stroke.is_no_tissue)) or of_an_ink:
                rest[where] &= ~stroke.mask
                yield stroke


def _unevenness(foreground: np.ndarray, density: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How uneven density is within 5 pixels; how uneven hue, or hue and density, are by what is usual; what is no ink.

    All without the rims, along which every stroke is uneven.
    """
    depths = depth(foreground)
    core = foreground & (depths >= np.maximum(1, 0.75 * cv2.dilate(depths, np.ones((5, 5), np.uint8))))
    share = np.maximum(cv2.blur(core.astype(np.float32), (5, 5)), 0.04)
    inside = np.where(core[..., None], density, 0).astype(np.float32)
    mean = cv2.blur(inside, (5, 5)) / share[..., None]
    squares, along = (np.einsum("ijk,ijk->ij", inside, other) for other in (inside, unit(mean)))
    off = cv2.blur(squares - along * along, (5, 5)) / share
    hue = np.sqrt(np.maximum(off, 0)) / np.maximum(length(mean), 0.1)
    darkness = average(inside)
    variance = cv2.blur(darkness * darkness, (5, 5)) / share - average(mean) ** 2
    relative = np.sqrt(np.maximum(variance, 0)) / np.maximum(average(mean), 0.05)
    if not core.any():
        return relative, np.ones_like(hue), core
    usual_hue = max(float(np.median(hue[core])), MIN_HUE_DEVIATION)
    usual = max(float(np.median(relative[core])), MIN_DEVIATION)
    hue, uneven = hue / usual_hue, relative / usual
    return relative, np.minimum(hue, np.sqrt(hue * uneven)), foreground & (np.maximum(hue, uneven) > SMOOTH)


def _vivid_strokes(rest: np.ndarray, density: np.ndarray, mpp: float) -> Iterator[np.ndarray]:
    """Real strokes that tissue joins and that are uneven: vivid colours that are few, thin and lie along the glass."""
    red, green, blue = (density[..., channel] for channel in range(3))
    chroma = spread(density)
    on_glass = red < 0.08  # red light passes red ink whole: where it is absorbed, tissue lies below
    hues = (
        ((green < 0.8 * red) & (green < 1.25 * blue), (green < 0.85 * red) & (green < 1.3 * blue), 0.15, 0.075),
        ((red < 0.3 * green) & (blue > 0.35 * green) & on_glass, (red < 0.33 * green) & on_glass, 0.4, 0.15),
        (red > 1.1 * green, (red > 1.05 * green) & (blue < 0.7 * green), 0.4, 0.15),
    )
    rest = rest.copy()
    for sure, possible, sure_chroma, possible_chroma in hues:
        seeds = opening(sure & (chroma > sure_chroma) & rest, 1.0)
        if np.count_nonzero(seeds) < (100 / mpp) ** 2:
            continue
        grown = connected_to(opening(possible & (chroma > possible_chroma) & rest, 1.0) | seeds, seeds)
        strokes = closing(grown, max(1.0, 20 / mpp)) & rest
        area = np.count_nonzero(strokes)
        border = strokes & (depth(strokes) <= 1.5)
        along_glass = float(np.mean(depth(rest)[border] <= max(3.0, 45 / mpp)))
        thick = np.count_nonzero(opening(strokes, 500 / mpp)) / area
        if along_glass > 0.25 and thick < 0.3 and area < 0.25 * np.count_nonzero(rest):
            yield strokes
            rest &= ~strokes

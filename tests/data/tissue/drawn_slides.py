"""Thumbnails drawn with known tissue: the stains, inks, glass and pieces that make tissue hard to find.

Colours, outlines, sizes and resolution (4 to 20 um/px) are drawn at random from a seed. The texture is that of a real H&E
picture when one is given (mirrored at its borders), otherwise noise of two stains.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

RGB = tuple[float, float, float]

# Optical density of red, green and blue at a concentration of 1.
HAEMATOXYLIN, EOSIN = (0.65, 0.70, 0.29), (0.07, 0.99, 0.35)
BLUE_COUNTERSTAIN, DAB, AEC = (0.72, 0.45, 0.22), (0.30, 0.57, 0.78), (0.22, 0.75, 0.68)
ALCIAN, ANILINE_BLUE, PONCEAU = (0.85, 0.33, 0.14), (0.88, 0.55, 0.20), (0.15, 0.95, 0.62)

INKS: dict[str, RGB] = {
    "blue": (40, 60, 170), "green": (30, 130, 80), "black": (25, 25, 30), "crimson": (180, 20, 60), "red": (210, 40, 50),
    "purple": (100, 40, 160), "pink": (240, 90, 170), "violet": (130, 50, 190), "magenta": (205, 30, 140),
}  # fmt: skip
GLASS: dict[str, RGB] = {
    "white": (243, 241, 244), "yellow": (236, 232, 212), "pink": (245, 226, 235), "magenta": (236, 200, 230),
    "blue": (215, 224, 244), "grey": (205, 205, 205), "green": (226, 238, 226),
}  # fmt: skip


@dataclass(frozen=True)
class DrawnSlide:
    """A picture, `(h, w, 3)` uint8 RGB; its tissue, `(h, w)` bool; its microns per pixel."""

    picture: np.ndarray
    truth: np.ndarray
    mpp: float


class _Pen:
    """A slide in the making: densities add up on glass, as light passes one layer after the other."""

    def __init__(self, rng: np.random.Generator, texture: np.ndarray | None, width: int | None) -> None:
        self.rng = rng
        self.mpp = float(rng.choice([4.0, 6.0, 8.0, 10.0, 10.0, 12.0, 16.0, 20.0]))
        self.height, self.width = (round(edge * 8 / max(self.mpp, 8)) for edge in (620, 780))
        if width is not None:
            self.mpp, self.height, self.width = 10.0, round(0.8 * width), width
        self.glass: RGB = GLASS["white"]
        self.density = np.zeros((self.height, self.width, 3), np.float32)
        self.truth = np.zeros((self.height, self.width), np.uint8)
        self.texture = texture

    def um(self, microns: float) -> float:
        return microns / self.mpp

    def outline(self, radius: float, centre: tuple[float, float] | None = None, rough: float = 0.25) -> np.ndarray:
        """Raster of a rough blob; radius and centre as shares of the picture."""
        rng, n = self.rng, 48
        angle = np.linspace(0, 2 * np.pi, n, endpoint=False)
        wobble = sum(rng.normal() * np.cos(k * angle + rng.uniform(0, 6.28)) / k for k in range(2, 9))
        reach = radius * min(self.width, self.height) * np.clip(1 + rough * wobble, 0.3, 1.8)
        x, y = centre or (rng.uniform(0.42, 0.58), rng.uniform(0.42, 0.58))
        points = np.stack([x * self.width + reach * np.cos(angle) * 1.15, y * self.height + reach * np.sin(angle)], 1)
        raster = np.zeros((self.height, self.width), np.uint8)
        cv2.fillPoly(raster, [np.rint(points).astype(np.int32)], 1)
        return raster

    def noise(self, microns: float) -> np.ndarray:
        shape = [max(4, round(edge / max(self.um(microns), 1))) for edge in (self.height, self.width)]
        return cv2.resize(self.rng.normal(size=shape).astype(np.float32), (self.width, self.height), interpolation=2)

    def concentrations(self, nuclei: float = 0.17, pink: float = 0.15) -> tuple[np.ndarray, np.ndarray]:
        """Haematoxylin and eosin over the picture."""
        if self.texture is not None:
            flips = [self.texture, self.texture[:, ::-1], self.texture[::-1], self.texture[::-1, ::-1]]
            tile = np.vstack([np.hstack(flips[:2]), np.hstack(flips[2:])])
            scale = 10 / self.mpp
            tile = cv2.resize(tile, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else 1)
            repeat = (-(-self.height // tile.shape[0]) + 1, -(-self.width // tile.shape[1]) + 1, 1)
            big = np.tile(tile, repeat)
            y, x = (int(self.rng.integers(0, size)) for size in tile.shape[:2])
            both = big[y : y + self.height, x : x + self.width]
            return both[..., 0], both[..., 1]
        fine = self.noise(12) * min(1.0, 12 / self.mpp)
        cells = nuclei * np.clip(1 + 0.30 * self.noise(150) + 0.25 * self.noise(40) + 0.35 * fine, 0.15, 3)
        fibre = pink * np.clip(1 + 0.30 * self.noise(200) + 0.2 * self.noise(50) + 0.2 * self.noise(15), 0.2, 3)
        return cells, fibre

    def stain(self, raster: np.ndarray, layers: list[tuple[np.ndarray, RGB]], counts: bool = True) -> None:
        soft = cv2.GaussianBlur(raster.astype(np.float32), (0, 0), 0.6)[..., None]
        for amount, colour in layers:
            self.density += soft * amount[..., None] * np.float32(colour)
        if counts:
            self.truth |= raster

    def haematoxylin_eosin(self, raster: np.ndarray, strength: float = 1.0) -> None:
        cells, fibre = self.concentrations()
        self.stain(raster, [(strength * cells, HAEMATOXYLIN), (strength * fibre, EOSIN)])

    def single(self, raster: np.ndarray, colour: RGB, strength: float) -> None:
        cells, fibre = self.concentrations()
        self.stain(raster, [(strength * (cells + fibre) / 0.4, colour)])

    def ink(self, kind: str, colour: RGB, width_um: float, opacity: float) -> None:
        rng, (h, w) = self.rng, (self.height, self.width)
        raster = np.zeros((h, w), np.uint8)
        width = max(2, round(self.um(width_um)))
        if kind == "ring":
            axes = (round(0.44 * w * rng.uniform(0.9, 1.05)), round(0.45 * h * rng.uniform(0.9, 1.05)))
            start = rng.uniform(0, 360)
            cv2.ellipse(
                raster, (w // 2, h // 2), axes, rng.uniform(-8, 8), start, start + rng.uniform(280, 360), 1, width
            )
        elif kind == "hatching":
            x, tilt = 0.06 * w, rng.uniform(-0.05, 0.1) * w
            for line in range(int(rng.integers(3, 8))):
                left = round(x + line * width * rng.uniform(1.2, 1.7))
                cv2.line(raster, (left, round(0.1 * h)), (round(left + tilt), round(0.9 * h)), 1, width)
        elif kind == "over":
            y = rng.uniform(0.25, 0.75)
            cv2.line(raster, (round(0.08 * w), round(y * h)), (round(0.92 * w), round((1 - y) * h)), 1, width)
        else:  # dots
            for _ in range(int(rng.integers(1, 4))):
                centre = (round(rng.uniform(0.03, 0.1) * w), round(rng.uniform(0.1, 0.9) * h))
                cv2.circle(raster, centre, round(width * rng.uniform(0.8, 1.6)), 1, -1)
        soft = cv2.GaussianBlur(raster.astype(np.float32), (0, 0), 0.8)
        self.dye(soft * np.clip(1 + 0.15 * self.noise(1500), 0.3, 1.5) * opacity, colour)

    def dye(self, amount: np.ndarray, colour: RGB) -> None:
        """Ink that light passes: tissue below it remains tissue."""
        self.density += amount[..., None] * -np.log10(np.float32(colour) / 245)

    def stroke(self, points: np.ndarray, colour: RGB, width_um: float, opacity: float) -> None:
        """A stroke by hand through `(n, 2)` points as shares of the picture: of uneven width, streaky, dark at its ends."""
        rng, (h, w) = self.rng, (self.height, self.width)
        along = np.linspace(0, len(points) - 1, 12 * len(points))
        path = np.stack([np.interp(along, range(len(points)), points[:, axis]) for axis in range(2)], 1) * (w, h)
        path = cv2.GaussianBlur(path.astype(np.float32), (1, 0), 3, sigmaY=3) if len(path) > 20 else path
        amount, width = np.zeros((h, w), np.float32), self.um(width_um)
        widths = width * np.clip(1 + 0.15 * cv2.GaussianBlur(rng.normal(size=(len(path), 1)), (1, 0), 3) * 4, 0.6, 1.4)
        for n in range(len(path) - 1):
            ends = [tuple(int(v) for v in np.rint(path[n + k] * 16)) for k in (0, 1)]
            part = np.zeros((h, w), np.uint8)
            cv2.line(part, ends[0], ends[1], 255, max(1, round(float(widths[n, 0]))), cv2.LINE_AA, 4)
            amount = np.maximum(amount, part / np.float32(255) * (1 + 0.25 * np.sin(n / 9)))
        streaks = 1 + 0.12 * self.noise(max(width_um / 4, 10)) + 0.15 * self.noise(width_um * 3)
        amount *= np.clip(streaks, 0.4, 1.6)
        for end in (path[0], path[-1]):
            blot = np.zeros((h, w), np.uint8)
            cv2.circle(blot, tuple(int(v) for v in np.rint(end)), max(1, round(0.5 * width)), 1, -1)
            amount += 0.8 * blot * (rng.random() < 0.6)
        self.dye(cv2.GaussianBlur(amount, (0, 0), max(0.8, 0.06 * width)) * opacity, colour)

    def finish(self, grey: bool = False) -> DrawnSlide:
        rng = self.rng
        picture = np.float32(self.glass) * 10**-self.density
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.3, 0.8))
        picture += rng.normal(0, rng.uniform(0.5, 2.0), picture.shape)
        picture += rng.uniform(-4, 4) * np.linspace(-1, 1, self.width)[None, :, None]
        image = picture.clip(0, 255).astype(np.uint8)
        if grey:
            image = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, 2)
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(70, 96))]
        _, data = cv2.imencode(".jpg", image[..., ::-1], quality)
        return DrawnSlide(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].copy(), self.truth > 0, self.mpp)


def _pieces(pen: _Pen) -> np.ndarray:
    if pen.rng.random() < 0.6:
        return pen.outline(pen.rng.uniform(0.22, 0.33))
    return pen.outline(0.16, (0.3, 0.5)) | pen.outline(0.16, (0.68, 0.45))


def _inked(name: str, kind: str) -> Callable[[_Pen], None]:
    def draw(pen: _Pen) -> None:
        pen.haematoxylin_eosin(_pieces(pen), pen.rng.uniform(0.6, 1.3))
        pen.ink(kind, _jittered(pen.rng, name), pen.rng.uniform(60, 220), pen.rng.uniform(0.75, 1.0))

    return draw


def _jittered(rng: np.random.Generator, name: str) -> RGB:
    red, green, blue = (float(np.clip(value + rng.normal(0, 12), 12, 244)) for value in INKS[name])
    return red, green, blue


def _outline_points(raster: np.ndarray, reach: float) -> np.ndarray:
    """The outline of a raster, moved outwards by so many pixels, as shares of the picture."""
    size = 2 * max(0, round(reach)) + 1
    grown = cv2.dilate(raster, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)))
    contours, _ = cv2.findContours(grown, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    points = max(contours, key=len)[:, 0]
    return np.asarray(points[:: max(1, len(points) // 40)] / raster.shape[::-1])


def _by_hand(*names: str) -> Callable[[_Pen], None]:
    """Markers as pathologists use them: along the margin of the tissue, in rings upon it, and across it."""

    def draw(pen: _Pen) -> None:
        rng = pen.rng
        raster = _pieces(pen)
        pen.haematoxylin_eosin(raster, rng.uniform(0.6, 1.3))
        width, opacity = rng.uniform(100, 350), rng.uniform(0.35, 0.9)
        for number, name in enumerate(names):
            colour = _jittered(rng, name)
            way = ("margin", "rings", "across", "beside")[number if len(names) > 2 else int(rng.integers(4))]
            if way in ("margin", "beside"):
                reach = pen.um(width * (rng.uniform(0.2, 0.6) if way == "margin" else rng.uniform(1.0, 1.6)))
                points = _outline_points(raster, reach)
                first, count = int(rng.integers(len(points))), int(len(points) * rng.uniform(0.4, 0.9))
                points = np.roll(points, -first, axis=0)[:count] + rng.normal(0, 0.003, (count, 2))
                for part in np.array_split(points, int(rng.integers(1, 4))):
                    pen.stroke(part, colour, width, opacity)
            elif way == "rings":
                ys, xs = np.nonzero(cv2.erode(raster, np.ones((9, 9), np.uint8)))
                for _ in range(int(rng.integers(2, 9))):
                    pick = int(rng.integers(len(ys)))
                    angle = np.linspace(0, 6.4, 14) + rng.uniform(0, 6.28)
                    reach = pen.um(rng.uniform(0.8, 1.6) * width) * np.clip(rng.normal(1, 0.12, angle.shape), 0.7, 1.4)
                    ring = np.stack([xs[pick] + reach * np.cos(angle), ys[pick] + 0.8 * reach * np.sin(angle)], 1)
                    pen.stroke(ring / (pen.width, pen.height), colour, 0.6 * width, opacity)
            else:
                for _ in range(int(rng.integers(1, 3))):
                    left, right = rng.uniform(0.25, 0.75, 2)
                    points = np.array([[0.06, left], [0.5, (left + right) / 2], [0.94, right]])
                    pen.stroke(points + rng.normal(0, 0.01, points.shape), colour, width, opacity)

    return draw


def _glass(name: str) -> Callable[[_Pen], None]:
    def draw(pen: _Pen) -> None:
        pen.glass = GLASS[name]
        pen.haematoxylin_eosin(_pieces(pen), pen.rng.uniform(0.6, 1.2))

    return draw


def _one_stain(colour: RGB, low: float, high: float) -> Callable[[_Pen], None]:
    def draw(pen: _Pen) -> None:
        pen.single(_pieces(pen), colour, pen.rng.uniform(low, high))

    return draw


def _two_stains(first: RGB, second: RGB, strengths: tuple[float, float], banded: bool) -> Callable[[_Pen], None]:
    """Two stains in bands, or in patches of a third of the tissue."""

    def draw(pen: _Pen) -> None:
        raster = _pieces(pen)
        if banded:
            where = np.sin(np.arange(pen.height) / pen.um(pen.rng.uniform(80, 300)))[:, None] + 0.3 * pen.noise(300) > 0
        else:
            where = cv2.GaussianBlur(pen.noise(150), (0, 0), pen.um(30)) > 0.3
        cells, fibre = pen.concentrations()
        amount = (cells + fibre) / 0.4
        layers = [(strengths[0] * amount * where, first), (strengths[1] * amount * ~where, second)]
        pen.stain(raster, layers)

    return draw


def _fat(solid: bool) -> Callable[[_Pen], None]:
    def draw(pen: _Pen) -> None:
        rng = pen.rng
        raster = pen.outline(rng.uniform(0.24, 0.36))
        cell = pen.um(rng.uniform(90, 190))
        count = max(20, int(1.3 * raster.sum() / cell**2))
        ys, xs = np.nonzero(cv2.dilate(raster, np.ones((2 * round(cell) + 1,) * 2, np.uint8)))
        pick = rng.integers(0, len(ys), count)
        plane = cv2.Subdiv2D((0, 0, pen.width, pen.height))
        plane.insert([(float(x), float(y)) for x, y in zip(xs[pick], ys[pick], strict=True)])
        facets, _ = plane.getVoronoiFacetList([])
        strands = np.zeros((pen.height, pen.width), np.float32)
        for facet in facets:
            cv2.polylines(strands, [np.rint(facet * 16).astype(np.int32)], True, 1.0, 1, cv2.LINE_AA, 4)
        strands *= raster * np.clip(0.8 + 0.4 * pen.noise(60), 0, 1)
        pen.stain(np.ones_like(raster), [(strands * rng.uniform(0.12, 0.3), (0.1, 0.7, 0.35))], counts=False)
        pen.truth |= raster
        if solid:
            pen.haematoxylin_eosin(raster & pen.outline(0.15))

    return draw


def _cores(pen: _Pen) -> None:
    raster, rng = np.zeros((pen.height, pen.width), np.uint8), pen.rng
    width = max(3, round(pen.um(rng.uniform(90, 400))))
    for n in range(int(rng.integers(2, 6))):
        x, y = (0.12 + 0.16 * n + rng.uniform(-0.03, 0.03)) * pen.width, rng.uniform(0.1, 0.4) * pen.height
        end = (round(x + rng.uniform(-0.06, 0.06) * pen.width), round(y + rng.uniform(0.2, 0.5) * pen.height))
        cv2.line(raster, (round(x), round(y)), end, 1, width)
    pen.haematoxylin_eosin(raster, rng.uniform(0.7, 1.3))


def _clusters(pen: _Pen) -> None:
    raster, rng = np.zeros((pen.height, pen.width), np.uint8), pen.rng
    for _ in range(int(rng.integers(15, 60))):
        centre = (int(rng.uniform(0.1, 0.9) * pen.width), int(rng.uniform(0.1, 0.9) * pen.height))
        axes = [max(1.6, pen.um(rng.uniform(30, 68))) for _ in range(2)]
        cv2.ellipse(raster, (centre, (2 * axes[0], 2 * axes[1]), rng.uniform(0, 180)), 1, -1)
    pen.haematoxylin_eosin(raster, rng.uniform(0.9, 1.6))


def _filled(strength: tuple[float, float]) -> Callable[[_Pen], None]:
    def draw(pen: _Pen) -> None:
        pen.haematoxylin_eosin(np.ones((pen.height, pen.width), np.uint8), pen.rng.uniform(*strength))

    return draw


def _shadowed(pen: _Pen) -> None:
    """A coverslip's edge, a bubble, and dust: neutral, and no tissue."""
    pen.haematoxylin_eosin(_pieces(pen))
    canvas = np.zeros((pen.height, pen.width), np.float32)
    margin = round(0.04 * pen.width)
    cv2.rectangle(canvas, (margin, margin), (pen.width - margin, pen.height - margin), 0.15, 2)
    cv2.circle(canvas, (round(0.12 * pen.width), round(0.8 * pen.height)), round(pen.um(250)), 0.12, 2)
    for _ in range(30):
        x, y = int(pen.rng.uniform(0, pen.width)), int(pen.rng.uniform(0, pen.height))
        cv2.circle(canvas, (x, y), 1, 0.3, -1)
    pen.density += cv2.GaussianBlur(canvas, (0, 0), 0.8)[..., None]


def _empty(pen: _Pen) -> None:
    pen.glass = list(GLASS.values())[int(pen.rng.integers(len(GLASS)))]


def _grey(pen: _Pen) -> None:
    pen.haematoxylin_eosin(_pieces(pen))


KINDS: dict[str, Callable[[_Pen], None]] = {
    "clean": lambda pen: pen.haematoxylin_eosin(_pieces(pen), pen.rng.uniform(0.7, 1.3)),
    "faint": lambda pen: pen.haematoxylin_eosin(_pieces(pen), pen.rng.uniform(0.2, 0.35)),
    **{f"{ink} ink, {kind}": _inked(ink, kind) for ink in INKS for kind in ("ring", "hatching", "over", "dots")},
    **{f"{ink} ink, by hand": _by_hand(ink) for ink in INKS},
    "three markers": _by_hand("red", "black", "green"),
    "other three markers": _by_hand("blue", "violet", "pink"),
    **{f"{glass} glass": _glass(glass) for glass in GLASS if glass != "white"},
    "DAB": _one_stain(DAB, 0.25, 0.6),
    "DAB and counterstain": _two_stains(DAB, BLUE_COUNTERSTAIN, (0.45, 0.15), banded=False),
    "pale counterstain": _one_stain(BLUE_COUNTERSTAIN, 0.07, 0.2),
    "Masson": _two_stains(PONCEAU, ANILINE_BLUE, (0.4, 0.4), banded=True),
    "Masson in patches": _two_stains(PONCEAU, ANILINE_BLUE, (0.35, 0.35), banded=False),
    "Alcian blue": _one_stain(ALCIAN, 0.12, 0.4),
    "AEC": _one_stain(AEC, 0.25, 0.6),
    "AEC and counterstain": _two_stains(AEC, BLUE_COUNTERSTAIN, (0.45, 0.15), banded=False),
    "fat": _fat(solid=False),
    "fat and stroma": _fat(solid=True),
    "cores": _cores,
    "clusters": _clusters,
    "pale, fills the picture": _filled((0.15, 0.4)),
    "fills the picture": _filled((0.7, 1.2)),
    "shadows": _shadowed,
    "empty": _empty,
    "grey scan": _grey,
}


def least_overlap(kind: str) -> float:
    """The intersection over union to reach for a kind."""
    if kind.startswith(("fat", "clusters")):
        return 0.80
    return 0.85 if kind == "cores" else 0.90


def texture_of(picture: np.ndarray) -> np.ndarray:
    """`(h, w, 2)` concentrations of haematoxylin and eosin in an H&E picture of 10 um/px without glass."""
    density = -np.log10(np.maximum(picture, 1) / np.float32((243, 241, 244))).reshape(-1, 3)
    stains = np.float32([HAEMATOXYLIN, EOSIN])
    amounts = np.maximum(density @ np.linalg.pinv(stains), 0.01)
    return amounts.reshape(*picture.shape[:2], 2).astype(np.float32)


def draw_slide(kind: str, seed: int, texture: np.ndarray | None = None, width: int | None = None) -> DrawnSlide:
    """Draw a slide of a kind; the same seed draws the same one. With a width in pixels, at 10 um/px."""
    pen = _Pen(np.random.default_rng([seed, zlib.crc32(kind.encode())]), texture, width)
    KINDS[kind](pen)
    return pen.finish(grey=kind == "grey scan")

"""Synthetic H&E-like slides: pyramidal TIFF files that OpenSlide reads, for demos, tests and documentation."""

from pathlib import Path
from typing import Literal, get_args

import cv2
import numpy as np
import tifffile

EOSIN = np.array([226.0, 148.0, 190.0])
STROMA = np.array([236.0, 178.0, 206.0])
NUCLEUS = np.array([96.0, 62.0, 138.0])
GLASS = np.array([243.0, 241.0, 244.0])

NATIVE_TILE = 256

Texture = Literal["glandular", "solid"]

TEXTURES: tuple[Texture, ...] = get_args(Texture)


def write_synthetic_slide(
    path: str | Path,
    *,
    size: tuple[int, int] = (4096, 3072),
    mpp: float | None = 0.5,
    texture: Texture = "glandular",
    seed: int = 0,
) -> Path:
    """Write a slide with a few pieces of tissue on glass.

    Args:
        path: Where to; `.svs` writes Aperio's format (with the mpp in its description), `.tif` and `.tiff` a generic
            tiled TIFF (with the mpp as resolution tags).
        size: (width, height) of level 0 in pixels.
        mpp: Microns per pixel of level 0: also the scale of the tissue. None writes none, and draws at 0.5.
        texture: `glandular`: rings of nuclei around lumens in pink stroma; `solid`: sheets of crowded nuclei.
        seed: The same seed draws the same slide.

    Returns:
        The path.
    """
    path = Path(path)
    image = _draw(size, mpp or 0.5, texture, np.random.default_rng(seed))
    write_pyramid(path, image, mpp=mpp)
    return path


def write_pyramid(path: Path, image: np.ndarray, *, mpp: float | None, downsample: int = 2) -> None:
    """Write an RGB picture as a pyramidal tiled TIFF.

    Args:
        path: Where to; the suffix chooses the format as for `write_synthetic_slide`.
        image: `(height, width, 3)` uint8.
        mpp: Microns per pixel of level 0, or None.
        downsample: Factor from level to level; levels go on until one is smaller than 512 pixels.
    """
    levels = [image]
    while min(levels[-1].shape[:2]) >= 2 * NATIVE_TILE and downsample > 1:
        height, width = levels[-1].shape[:2]
        smaller = (round(width / downsample), round(height / downsample))
        levels.append(cv2.resize(levels[-1], smaller, interpolation=cv2.INTER_AREA))
    aperio = path.suffix.lower() == ".svs"
    with tifffile.TiffWriter(path, bigtiff=image.nbytes > 2**31) as file:
        for number, level in enumerate(levels):
            height, width = level.shape[:2]
            description = f"Aperio Image Library v12.0.0\r\n{width}x{height}"
            if mpp is not None:
                description += f"|AppMag = {10 / mpp:g}|MPP = {mpp:g}"
            per_cm = 10_000 / (mpp * image.shape[1] / width) if mpp is not None else 0
            file.write(
                level,
                tile=(NATIVE_TILE, NATIVE_TILE),
                photometric="rgb",
                compression="zlib",
                compressionargs={"level": 1},
                predictor=True,
                description=description if aperio else None,
                metadata=None,
                software=False,
                subfiletype=int(number > 0),
                resolution=(per_cm, per_cm) if per_cm and not aperio else None,
                resolutionunit="CENTIMETER" if per_cm and not aperio else None,
            )


def _draw(size: tuple[int, int], mpp: float, texture: str, rng: np.random.Generator) -> np.ndarray:
    width, height = size
    tissue = _tissue_pieces(width, height, rng)
    # Stroma: fibres are noise that is smooth along one direction and fine across it.
    fibres = _noise(width, height, (max(2, 60 / mpp), max(2, 4 / mpp)), rng)
    patches = _noise(width, height, (40 / mpp, 40 / mpp), rng)
    share = np.clip(0.5 + 0.22 * fibres + 0.12 * patches, 0, 1)[..., None].astype(np.float32)
    picture = np.float32(EOSIN - STROMA) * share
    picture += np.float32(STROMA)
    (_draw_glands if texture == "glandular" else _draw_sheets)(picture, tissue, mpp, rng)
    picture = np.asarray(cv2.GaussianBlur(picture, (0, 0), max(0.4, 0.35 / mpp)), np.float32)
    soft = cv2.GaussianBlur(tissue.astype(np.float32), (0, 0), 2 / mpp)[..., None]
    picture -= np.float32(GLASS)
    picture *= soft
    picture += np.float32(GLASS)
    grain = 2.5 * rng.standard_normal((height // 2 + 1, width // 2 + 1), np.float32)
    picture += cv2.resize(grain, (width, height))[..., None]
    return np.clip(picture, 0, 255, out=picture).astype(np.uint8)


def _noise(width: int, height: int, scale: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of unit deviation; `scale` is its grain in x and y pixels."""
    small = rng.normal(size=(max(4, round(height / scale[1])), max(4, round(width / scale[0])))).astype(np.float32)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def _tissue_pieces(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[0 : height : height / 192, 0 : width : width / 256].astype(np.float32)
    outline = cv2.GaussianBlur(rng.normal(size=x.shape).astype(np.float32), (0, 0), 9)
    outline /= outline.std()
    pieces = np.full(x.shape, -np.inf, np.float32)
    for _ in range(3):
        centre_x, centre_y = rng.uniform(0.25, 0.75) * width, rng.uniform(0.25, 0.75) * height
        radius_x, radius_y = rng.uniform(0.12, 0.24) * width, rng.uniform(0.14, 0.28) * height
        distance = ((x - centre_x) / radius_x) ** 2 + ((y - centre_y) / radius_y) ** 2
        pieces = np.maximum(pieces, 1 - distance)
    inside = cv2.resize(pieces + 0.22 * outline, (width, height), interpolation=cv2.INTER_CUBIC) > 0
    return np.asarray(inside)


def _draw_nuclei(
    picture: np.ndarray, centres: np.ndarray, mpp: float, rng: np.random.Generator, angles: np.ndarray | None = None
) -> None:
    """Ellipses of 6 to 9 um with a darker rim, at (n, 2) pixel positions."""
    axes = rng.uniform(2.4, 4.2, (len(centres), 2)) / mpp
    axes[:, 0] *= 1.25
    turns = np.degrees(angles) if angles is not None else rng.uniform(0, 180, len(centres))
    shades = rng.normal(0, 9, len(centres))
    for (x, y), (major, minor), turn, shade in zip(centres, axes, turns, shades, strict=True):
        box = ((float(x), float(y)), (2 * float(major), 2 * float(minor)), float(turn))
        cv2.ellipse(picture, box, (NUCLEUS - 14 + shade).tolist(), -1)
        inner = (box[0], (1.3 * float(major), 1.3 * float(minor)), box[2])
        cv2.ellipse(picture, inner, (NUCLEUS + 18 + shade).tolist(), -1)


def _scattered(tissue: np.ndarray, spacing: float, rng: np.random.Generator, jitter: float = 0.35) -> np.ndarray:
    """(n, 2) jittered grid positions (x, y) that lie on tissue."""
    height, width = tissue.shape
    grid = np.stack(np.meshgrid(np.arange(0, width, spacing), np.arange(0, height, spacing)), axis=-1).reshape(-1, 2)
    grid = grid + rng.uniform(-jitter, jitter, grid.shape) * spacing
    column, row = grid.round().astype(int).T
    inside = (column >= 0) & (row >= 0) & (column < width) & (row < height)
    grid, column, row = grid[inside], column[inside], row[inside]
    return np.asarray(grid[tissue[row, column]])


def _draw_sheets(picture: np.ndarray, tissue: np.ndarray, mpp: float, rng: np.random.Generator) -> None:
    picture *= np.array([0.95, 0.88, 0.98], np.float32)  # little stroma, bluish cytoplasm
    _draw_nuclei(picture, _scattered(tissue, 10.5 / mpp, rng), mpp, rng)


def _draw_glands(picture: np.ndarray, tissue: np.ndarray, mpp: float, rng: np.random.Generator) -> None:
    _draw_nuclei(picture, _scattered(tissue, 34 / mpp, rng), mpp, rng)
    for x, y in _scattered(tissue, 95 / mpp, rng, jitter=0.2):
        radius = rng.uniform(24, 38) / mpp
        flatness, turn = rng.uniform(0.7, 1.0), rng.uniform(0, np.pi)
        box = ((float(x), float(y)), (2 * radius, 2 * radius * flatness), float(np.degrees(turn)))
        cv2.ellipse(picture, box, (EOSIN * [0.97, 0.86, 0.97]).tolist(), -1)
        lumen = (box[0], (1.0 * radius, 1.0 * radius * flatness), box[2])
        cv2.ellipse(picture, lumen, (GLASS - 4).tolist(), -1)
        angles = np.linspace(0, 2 * np.pi, max(8, round(2 * np.pi * radius * mpp / 7)), endpoint=False)
        around = np.stack([radius * 0.84 * np.cos(angles), radius * 0.84 * flatness * np.sin(angles)], axis=1)
        rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        _draw_nuclei(picture, around @ rotation + [x, y], mpp, rng, angles + turn)

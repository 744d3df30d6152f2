"""Feature files of other tools: TRIDENT, AtlasPatch, CLAM, prov-gigapath and STAMP."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ...errors import LongslideError
from .features import Features, Layout


def read_foreign(
    path: Path, file: h5py.File, name: str, features: np.ndarray, raw: np.ndarray, batched: bool
) -> Features:
    """The content of a file that another tool has written.

    Args:
        path: The file.
        file: It, open.
        name: The dataset of the embeddings.
        features: `(N, D)` its content.
        raw: `(N, 2)` content of `coords`.
        batched: Whether the embeddings have a leading batch axis in the file.

    Returns:
        The tiles row by row, in whatever order the file has them.

    Raises:
        LongslideError: Its coordinates are on no grid that is known.
    """
    attributes = {**file.attrs, **file["coords"].attrs}
    several = "/" in name  # AtlasPatch: a dataset for each encoder
    if attributes.get("unit") == "um" or name == "feats":
        return _row_by_row(_read_stamp(path, features, raw, attributes))
    coords = _integral(path, raw)
    overlap = attributes.get("overlap")
    tile_px = _whole(attributes.get("patch_size"))
    tile_size = _whole(attributes.get("patch_size_level0"))
    layout: Layout = "trident" if tile_size else "clam"
    if name == "tile_embeds" or (batched and not tile_size):
        layout = "prov-gigapath"
    if several:
        layout = "atlaspatch"
    if tile_size and tile_px and overlap is not None:
        step = round(tile_size * (tile_px - float(overlap)) / tile_px)
    else:
        step = _most_common_step(path, coords)
    width, height = attributes.get("level0_width"), attributes.get("level0_height")
    encoder = name.partition("/")[2] if several else file[name].attrs.get("encoder")
    magnification = _magnification(attributes.get("target_magnification"))
    found = Features(
        slide_id=path.stem,
        features=features,
        coords=coords,
        step_level0=step,
        tile_size_level0=tile_size,
        tile_px=tile_px,
        overlap=_whole(overlap),
        tile_mpp=None if magnification is None else 10 / magnification,  # nominal in files of TRIDENT: 20 is 0.5 um/px
        level0_size=(int(width), int(height)) if width is not None and height is not None else None,
        encoder=None if encoder in (None, "None") else str(encoder),  # TRIDENT writes None as text
        layout=layout,
    )
    return _row_by_row(found)


def one_encoder(path: Path, there: list[str], wanted: str | None) -> str:
    """The encoder whose features are read, of those that a file of AtlasPatch holds."""
    there = [name for name in there if not name.startswith("__tmp_")]  # what it had not finished
    if wanted is None and len(there) == 1:
        return there[0]
    if wanted in there:
        return str(wanted)
    if not there:
        raise LongslideError(
            f"{path}: coordinates of AtlasPatch without features; let it embed the tiles, or embed the slide"
        )
    which = f"none of {wanted}" if wanted else "which is wanted is not said"
    raise LongslideError(
        f"{path}: features of {', '.join(there)}, {which}; name one: "
        f"`longslide export --features {path.parent} --to trident --encoder {there[0]}`, or read_features(..., encoder=...)"
    )


def _row_by_row(features: Features) -> Features:
    column, row = features.cells.T
    order = np.lexsort((column, row))
    left_on_disk = not any(features.features.strides)
    tiles = features.features if left_on_disk else features.features[order]
    return replace(features, features=tiles, coords=features.coords[order])


def _read_stamp(path: Path, features: np.ndarray, raw: np.ndarray, attributes: dict[str, Any]) -> Features:
    """STAMP's coordinates are microns; in files of its first version, which say nothing, units of 256 um / 224."""
    microns, tile_px = attributes.get("tile_size_um"), attributes.get("tile_size_px")
    if microns is None and attributes.get("unit") == "um":
        microns = attributes.get("tile_size")
    step = float(
        microns or attributes.get("tile_size") or np.diff(np.unique(raw[:, 0].astype(float))).min(initial=np.inf)
    )
    if microns is None and abs(step - 224) < 0.5:
        microns, tile_px = 256.0, 224
    if microns is None or not np.isfinite(raw).all():
        raise LongslideError(
            f"{path}: a file of STAMP whose `coords` are not microns on a grid of a `tile_size_um`; extract it again"
        )
    # STAMP rounds the size of a tile up to whole level-0 pixels: tiles are `tile_size_um` apart or a little more.
    cells = np.floor(raw / step + 0.001)
    extractor = attributes.get("extractor")
    return Features(
        slide_id=path.stem,
        features=features,
        coords=cells.astype(np.int64),
        step_level0=1,
        tile_px=_whole(tile_px),
        overlap=0,
        tile_mpp=float(microns) / float(tile_px) if tile_px else None,
        encoder=None if extractor is None else str(extractor),
        layout="stamp",
    )


def _magnification(value: Any) -> float | None:
    """Not known where it is no number above 0: features can be used without it."""
    try:
        return float(value) if value is not None and 0 < float(value) < float("inf") else None
    except (TypeError, ValueError):
        return None


def _whole(value: Any) -> int | None:
    return None if value is None else round(float(value))


def _integral(path: Path, coords: np.ndarray) -> np.ndarray:
    if coords.dtype == np.float16 and np.abs(coords).max(initial=0) > 2048:
        raise LongslideError(f"{path}: `coords` are float16, which rounds pixels beyond 2,048; write them as integers")
    whole: np.ndarray = np.rint(coords)
    if not np.isfinite(coords).all() or np.abs(coords - whole).max(initial=0) > 1e-6:
        raise LongslideError(f"{path}: `coords` are not whole level-0 pixels")
    return np.asarray(whole, np.int64)


def _most_common_step(path: Path, coords: np.ndarray) -> int:
    """The grid step of coordinates that come without one: the most common distance of neighbours in a row or column.

    CLAM starts a grid anew for each piece of tissue, so the distances have no common divisor.
    """
    steps = []
    for along, across in ((0, 1), (1, 0)):
        ordered = coords[np.lexsort((coords[:, along], coords[:, across]))]
        same_line = np.diff(ordered[:, across]) == 0
        steps.append(np.diff(ordered[:, along])[same_line])
    distances = np.concatenate(steps)
    values, counts = np.unique(distances[distances > 0], return_counts=True)
    if len(values) == 0:
        if len(coords) > 1:
            raise LongslideError(f"{path}: the file does not say its tile size, and its `coords` do not show it")
        return 1 if len(coords) == 0 else max(1, int(coords.max()))
    return int(values[counts.argmax()])

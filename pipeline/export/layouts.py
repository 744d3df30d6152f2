"""Feature files in the layouts of TRIDENT, CLAM and STAMP, as their own code reads them."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from ...data.features.feature_file import magnifications
from ...data.features.features import Features
from ...data.whole_file import write_whole
from ...errors import LongslideError

Target = Literal["trident", "clam", "stamp", "anndata", "spatialdata"]

_TRIDENT_NAMES = {
    "conch-v1": "conch_v1",
    "conch-v15": "conch_v15",
    "h-optimus-0": "hoptimus0",
    "h-optimus-1": "hoptimus1",
    "hibou-l": "hibou_l",
    "midnight-12k": "midnight12k",
    "phikon-v2": "phikon_v2",
    "uni": "uni_v1",
    "uni2-h": "uni_v2",
}
_STAMP_NAMES = {
    "conch-v1": "conch",
    "conch-v15": "conch1_5",
    "musk-multiscale": "musk",
    "uni2-h": "uni2",
    "virchow": "virchow-full",
}
_STAMP_SINCE = "2.1.0"  # the first version whose files say `tile_size_um`


def write_trident(features: Features, output: Path) -> list[Path]:
    """`features_<encoder>/<slide_id>.h5` and `patches/<slide_id>_patches.h5`, as in the folder of a patching of TRIDENT."""
    need_level0(features, "trident")
    encoder = features.encoder or "features"
    folder = output / f"features_{_TRIDENT_NAMES.get(encoder, encoder)}"
    attributes: dict[str, Any] = {
        "patch_size": features.tile_px,
        "patch_size_level0": features.tile_size_level0,
        **magnifications(features),
        "overlap": features.overlap,
        "name": features.slide_id,
        "savetodir": str(output),
    }
    if features.level0_size is not None:
        attributes["level0_width"], attributes["level0_height"] = features.level0_size
    coords = {"coords": (features.coords, attributes)}
    own = {"encoder": encoder, "name": features.slide_id, "savetodir": str(folder)}
    return [
        _write(folder / f"{features.slide_id}.h5", {"features": (features.features, own)} | coords),
        _write(output / "patches" / f"{features.slide_id}_patches.h5", coords),
    ]


def write_clam(features: Features, output: Path) -> list[Path]:
    """`h5_files/<slide_id>.h5` and `pt_files/<slide_id>.pt`, as CLAM's feature folder has them: float32 and int32.

    `patch_size` is that of the pixels read at `patch_level`, which CLAM does not resample.
    """
    import torch

    need_level0(features, "clam")
    values = features.features.astype(np.float32)
    attributes: dict[str, Any] = {"name": features.slide_id, "save_path": str(output)}
    level, coarser = features.settings.get("patch_level"), features.settings.get("custom_downsample")
    if level is not None and coarser is not None and features.tile_px is not None:
        attributes |= {"patch_level": level, "patch_size": round(features.tile_px * coarser)}
    stream = io.BytesIO()
    torch.save(torch.from_numpy(values), stream)
    tensor = output / "pt_files" / f"{features.slide_id}.pt"
    write_whole(tensor, stream.getbuffer())
    content = {"features": (values, {}), "coords": (features.coords.astype(np.int32), attributes)}
    return [_write(output / "h5_files" / f"{features.slide_id}.h5", content), tensor]


def write_stamp(features: Features, output: Path) -> list[Path]:
    """`<slide_id>.h5` with `feats` and, in `coords`, microns of the tiles' top-left corners, as STAMP 2 writes it."""
    if features.layout == "stamp":
        microns = features.tile_mpp * features.tile_px if features.tile_mpp and features.tile_px else None
        per_unit = microns
    else:
        per_unit = features.slide_mpp
        microns = per_unit * features.tile_size_level0 if per_unit and features.tile_size_level0 else None
    if microns is None or per_unit is None:
        raise LongslideError(
            f"{features.slide_id}: STAMP's coordinates are microns, and the {features.layout} file does not say how many a "
            "pixel has; embed the slide here"
        )
    coords = features.coords * np.float64(per_unit)
    encoder = features.encoder or "unknown"
    path = output / f"{features.slide_id}.h5"
    facts = {
        "stamp_version": _STAMP_SINCE,
        "extractor": _STAMP_NAMES.get(encoder, encoder),
        "unit": "um",
        "tile_size_um": float(microns),
        "tile_size_px": features.tile_px,
        "feat_type": "tile",
    }
    return [_write(path, {"coords": (coords, {}), "feats": (features.features, {})}, facts)]


WRITERS: dict[Literal["trident", "clam", "stamp"], Callable[[Features, Path], list[Path]]] = {
    "trident": write_trident,
    "clam": write_clam,
    "stamp": write_stamp,
}
"""Writes a slide's features into a folder, and says which files it wrote."""


def need_level0(features: Features, target: str) -> None:
    """Refuse coordinates that are not level-0 pixels."""
    if features.layout == "stamp":
        raise LongslideError(
            f"{features.slide_id}: a file of STAMP holds microns; {target} needs level-0 pixels; embed the slide here"
        )


def _write(
    path: Path, datasets: dict[str, tuple[np.ndarray, dict[str, Any]]], attributes: dict[str, Any] | None = None
) -> Path:
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for name, (values, own) in datasets.items():
            file[name] = values
            file[name].attrs.update({key: value for key, value in own.items() if value is not None})
        file.attrs.update({key: value for key, value in (attributes or {}).items() if value is not None})
    write_whole(path, content.getbuffer())
    return path

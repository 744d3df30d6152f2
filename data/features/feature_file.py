"""Feature files: what is known of a slide after embedding, in HDF5."""

import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ...errors import LongslideError, refuse_newer
from ...version import SOFTWARE
from ..regular_file import check_regular
from ..whole_file import write_whole
from .features import Features
from .foreign_layouts import one_encoder, read_foreign
from .trusted_hdf5 import check_file, check_numbers

SCHEMA = 1
"""Version of the layout, in the file attribute `schema`."""

# Attribute of the file <- attribute of `Features`, for each dataset.
_FEATURES = {"encoder": "encoder", "weights": "weights", "precision": "precision"}
_COORDS = {
    "patch_size": "tile_px",
    "patch_size_level0": "tile_size_level0",
    "step_level0": "step_level0",
    "overlap": "overlap",
    "target_mpp": "tile_mpp",
    "level0_mpp": "slide_mpp",
}
_SLIDE = {"encoder": "slide_encoder", "weights": "slide_weights", "pool": "pool"}
_FILE = {name: name for name in ("slide_id", "slide_path", "quickhash", "slide_size", "slide_modified")}


def write_features(path: str | Path, features: Features) -> None:
    """Write a feature file. It appears under its name only when it is complete and on the disk.

    Args:
        path: Where to; an existing file is replaced.
        features: The content.

    Raises:
        LongslideError: The file cannot be written (full disk, read-only folder). Nothing is left behind then.
    """
    content = io.BytesIO()  # in memory first: HDF5 cannot close a file that it could not write
    with h5py.File(content, "w") as file:
        _fill(file, features)
    write_whole(Path(path), content.getbuffer())


def _fill(file: h5py.File, features: Features) -> None:
    def attributes(target: h5py.AttributeManager, table: dict[str, str]) -> None:
        for name, ours in table.items():
            value = getattr(features, ours)
            if value is not None:
                target[name] = value

    # One chunk a file: it is always read whole.
    data = file.create_dataset("features", data=features.features)
    attributes(data.attrs, _FEATURES)
    coords = file.create_dataset("coords", data=features.coords.astype(np.int64, copy=False))
    attributes(coords.attrs, _COORDS)
    coords.attrs.update(features.settings)
    if features.blur is not None:
        file.create_dataset("blur", data=features.blur.astype(np.float32, copy=False))
    if features.level0_size is not None:
        coords.attrs["level0_width"], coords.attrs["level0_height"] = features.level0_size
    coords.attrs.update(magnifications(features))
    if features.tissue is not None:
        tissue = file.create_dataset("tissue", data=features.tissue, dtype=h5py.string_dtype())
        tissue.attrs["method"] = features.tissue_method or ""
    if features.slide_embedding is not None:
        embedding = file.create_dataset("slide_embedding", data=features.slide_embedding.astype(np.float32, copy=False))
        attributes(embedding.attrs, _SLIDE)
    attributes(file.attrs, _FILE)
    file.attrs["schema"] = SCHEMA
    file.attrs["software"] = SOFTWARE
    file.attrs["created"] = datetime.now(UTC).isoformat(timespec="seconds")


def magnifications(features: Features) -> dict[str, float]:
    """The attributes of `coords` by which TRIDENT's tools find the tiles' size; empty where the features do not say.

    Their quotient is that of `patch_size_level0` and `patch_size`, so that the same pixels are read.
    """
    if not (features.slide_mpp and features.tile_px and features.tile_size_level0):
        return {}
    of_level0 = 10 / features.slide_mpp
    of_tiles = of_level0 * features.tile_px / features.tile_size_level0
    return {"level0_magnification": of_level0, "target_magnification": of_tiles}


def read_features(path: str | Path, *, embeddings: bool = True, encoder: str | None = None) -> Features:
    """Read a feature file of Longslide, TRIDENT, AtlasPatch, CLAM, prov-gigapath or STAMP.

    Args:
        path: The file.
        encoder: Which tile encoder's features to read, of a file of AtlasPatch that holds several.
        embeddings: False leaves the tile embeddings on the disk: `features` then has their shape and dtype, is all zeros
            and takes no memory. For a look at how many tiles there are, and what made them.

    Returns:
        Its content; `layout` says what the file was taken for. The tiles are row by row, in whatever order the file
        has them: TRIDENT and CLAM write column by column, STAMP in the order its threads were done.

    Raises:
        LongslideError: Not a feature file, a truncated one, or one whose parts do not fit together.
    """
    path = Path(path)
    try:
        check_regular(path)
        with h5py.File(path, "r") as file:
            return _read(path, file, embeddings, encoder)
    except (FileNotFoundError, IsADirectoryError):
        raise LongslideError(f"{path}: no such feature file") from None
    except PermissionError as error:
        raise LongslideError(f"{path}: no permission to read it") from error
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:  # what broken bytes lead to
        if path.suffix.lower() not in (".h5", ".hdf5"):  # a slide, for one, that nobody should delete
            raise LongslideError(f"{path}: not a feature file; give the .h5 file of the slide") from error
        raise LongslideError(
            f"{path}: not a readable HDF5 file, perhaps truncated ({' '.join(str(error).split())}); delete it and "
            "embed the slide again"
        ) from error


def _read(path: Path, file: h5py.File, embeddings: bool, wanted: str | None) -> Features:
    check_file(path, file)
    name = next((name for name in ("features", "feats", "tile_embeds") if name in file), None)
    if name is None or "coords" not in file:
        raise LongslideError(
            f"{path}: not a feature file: it has {', '.join(file) or 'nothing'}, and not `features` and `coords`"
        )
    several = isinstance(file[name], h5py.Group)  # AtlasPatch: a dataset for each encoder
    if several:
        name = f"{name}/{one_encoder(path, list(file[name]), wanted)}"
    for read in (name, "coords", *(["slide_embedding"] if "slide_embedding" in file else [])):
        check_numbers(path, file[read], read)
    raw = file["coords"][()]
    features = file[name][()] if embeddings else np.broadcast_to(np.zeros((), file[name].dtype), file[name].shape)
    batched = features.ndim == 3 and features.shape[0] == 1
    if batched:
        features = features[0]
    if raw.ndim == 3 and raw.shape[0] == 1:
        raw = raw[0]
    if features.ndim != 2 or raw.ndim != 2 or raw.shape[1] < 2 or len(features) != len(raw):
        raise LongslideError(
            f"{path}: `{name}` {features.shape} and `coords` {raw.shape} do not belong together; expected (N, D) and (N, 2)"
        )
    raw = raw[:, :2]
    if "schema" in file.attrs:
        return _read_longslide(path, file, features, raw)
    return read_foreign(path, file, name, features, raw, batched)


def _read_longslide(path: Path, file: h5py.File, features: np.ndarray, coords: np.ndarray) -> Features:
    def plain(value: Any) -> Any:
        return value.item() if isinstance(value, np.generic) else value

    refuse_newer(path, file.attrs["schema"], SCHEMA)
    content: dict[str, Any] = {}
    embedding = file.get("slide_embedding")
    groups = [(file.attrs, _FILE), (file["features"].attrs, _FEATURES), (file["coords"].attrs, _COORDS)]
    if embedding is not None:
        groups.append((embedding.attrs, _SLIDE))
        content["slide_embedding"] = embedding[()]
    for attributes, table in groups:
        content |= {ours: plain(attributes[name]) for name, ours in table.items() if name in attributes}
    size = ("level0_width", "level0_height")
    derived = ("level0_magnification", "target_magnification")
    rest = {
        key: plain(value) for key, value in file["coords"].attrs.items() if key not in _COORDS and key not in derived
    }
    if all(key in rest for key in size):
        content["level0_size"] = (rest.pop(size[0]), rest.pop(size[1]))
    if "blur" in file:
        content["blur"] = file["blur"][()]
        if content["blur"].shape != (len(coords),):
            raise LongslideError(
                f"{path}: `blur` {content['blur'].shape} and `coords` {coords.shape} do not belong together"
            )
    if "tissue" in file:
        content["tissue"] = file["tissue"].asstr()[()]
        content["tissue_method"] = str(file["tissue"].attrs["method"])
    return Features(features=features, coords=coords, settings=rest, **content)

"""Feature files: what is known of a slide after embedding, in HDF5; and the layouts other tools write."""

import io
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import h5py
import numpy as np

from ...errors import LongslideError
from ...version import __version__
from ..regular_file import check_regular
from ..slides.identity import SlideIdentity
from ..whole_file import write_whole
from .trusted_hdf5 import check_file, check_numbers

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

SCHEMA = 1
"""Version of the layout, in the file attribute `schema`."""

Layout = Literal["longslide", "trident", "atlaspatch", "clam", "prov-gigapath", "stamp"]


@dataclass(frozen=True, repr=False)
class Features:
    """The tile embeddings of a slide, where the tiles are, and the slide embedding.

    What a foreign file does not say is None.

    Attributes:
        slide_id: The slide's id.
        features: `(N, D)` float16 or float32 tile embeddings.
        coords: `(N, 2)` int64 top-left corner (x, y) of each tile in level-0 pixels, row by row. Files of STAMP hold
            microns: there it is the grid cell.
        step_level0: Distance between tiles in the units of `coords`.
        tile_size_level0: Edge of a tile in level-0 pixels.
        tile_px: Edge of a tile in pixels as the encoder got it.
        overlap: Pixels that neighbouring tiles share, of `tile_px`.
        tile_mpp: Microns per pixel of the tiles.
        slide_mpp: Microns per pixel of level 0.
        level0_size: (width, height) of level 0 in pixels.
        encoder: Name of the tile encoder.
        weights: Source and digest of its weights.
        precision: Precision it ran in.
        tissue: Tissue contours as GeoJSON in level-0 pixels.
        tissue_method: How they were found.
        blur: `(N,)` float32, how blurred each tile is, 0 (sharp) to 1; see `longslide.data.tiles.blur`.
        slide_embedding: `(D_slide,)` float32.
        slide_encoder: Name of the slide encoder.
        slide_weights: Source and digest of its weights.
        pool: How it pools.
        slide_path: The slide file, absolute.
        quickhash: Identity of its image data.
        slide_size: Its size in bytes.
        slide_modified: When it was last written, in nanoseconds since 1970.
        settings: Further settings the file was made with, stored as attributes of `coords`.
        layout: The layout the file was taken for.
    """

    slide_id: str
    features: np.ndarray
    coords: np.ndarray
    step_level0: int
    tile_size_level0: int | None = None
    tile_px: int | None = None
    overlap: int | None = None
    tile_mpp: float | None = None
    slide_mpp: float | None = None
    level0_size: tuple[int, int] | None = None
    encoder: str | None = None
    weights: str | None = None
    precision: str | None = None
    tissue: str | None = None
    tissue_method: str | None = None
    blur: np.ndarray | None = None
    slide_embedding: np.ndarray | None = None
    slide_encoder: str | None = None
    slide_weights: str | None = None
    pool: str | None = None
    slide_path: str | None = None
    quickhash: str | None = None
    slide_size: int | None = None
    slide_modified: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    layout: Layout = "longslide"

    def __repr__(self) -> str:
        tiles, width = self.features.shape
        made = "" if self.encoder is None else f", {self.encoder}"
        slide = "" if self.slide_embedding is None else f", slide embedding of {len(self.slide_embedding)}"
        return f"Features({self.slide_id!r}, {tiles:,} tiles x {width}{made}{slide})"

    def to_pandas(self) -> "pd.DataFrame":
        """One row per tile: `x`, `y` (as `coords`), `column`, `row` (the cell), `blur`, `feature_0`, `feature_1`, ..."""
        import pandas as pd

        places = pd.DataFrame(np.hstack([self.coords, self.cells]), columns=["x", "y", "column", "row"])
        if self.blur is not None:
            places["blur"] = self.blur
        names = [f"feature_{number}" for number in range(self.features.shape[1])]
        return pd.concat([places, pd.DataFrame(self.features, columns=names)], axis=1)

    def to_anndata(self) -> "AnnData":
        """The tiles as observations of an AnnData, as scanpy, squidpy and spatialdata read it.

        Returns:
            `X` the embeddings, float32; `obs` with `slide_id`, `x`, `y`, `column`, `row`, `blur`; `obsm["spatial"]` the
            centres of the tiles in the units of `coords`; `uns["longslide"]` what the features were made with, and
            `uns["slide_embedding"]` if there is one.

        Raises:
            LongslideError: The package anndata is not installed.
        """
        try:
            from anndata import AnnData
        except ModuleNotFoundError as error:
            raise LongslideError("to_anndata needs the package anndata: pip install 'longslide[anndata]'") from error

        places = replace(self, features=self.features[:, :0]).to_pandas()
        places.insert(0, "slide_id", self.slide_id)
        places.index = places.index.astype(str)
        names = (
            "encoder",
            "weights",
            "precision",
            "tile_px",
            "overlap",
            "tile_mpp",
            "slide_mpp",
            "slide_encoder",
            "pool",
        )
        made = {name: getattr(self, name) for name in names}
        content: dict[str, Any] = {"longslide": {name: value for name, value in made.items() if value is not None}}
        if self.slide_embedding is not None:
            content["slide_embedding"] = self.slide_embedding
        centres = self.coords + (self.tile_size_level0 or self.step_level0) / 2
        return AnnData(self.features.astype(np.float32), obs=places, obsm={"spatial": centres}, uns=content)

    @property
    def slide(self) -> SlideIdentity:
        """The slide file it was made of."""
        return SlideIdentity(self.slide_path, self.quickhash, self.slide_size, self.slide_modified)

    @property
    def cells(self) -> np.ndarray:
        """`(N, 2)` int64 grid cell (column, row) of each tile: what slide encoders take."""
        return self.coords // self.step_level0


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
    file.attrs["software"] = f"longslide {__version__}"
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
        name = f"{name}/{_one_encoder(path, list(file[name]), wanted)}"
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
    attributes = {**file.attrs, **file["coords"].attrs}
    if "schema" in file.attrs:
        return _read_longslide(path, file, features, raw)
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
    found = Features(
        slide_id=path.stem,
        features=features,
        coords=coords,
        step_level0=step,
        tile_size_level0=tile_size,
        tile_px=tile_px,
        overlap=_whole(overlap),
        level0_size=(int(width), int(height)) if width is not None and height is not None else None,
        encoder=None if encoder is None else str(encoder),
        layout=layout,
    )
    return _row_by_row(found)


def _one_encoder(path: Path, there: list[str], wanted: str | None) -> str:
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


def _read_longslide(path: Path, file: h5py.File, features: np.ndarray, coords: np.ndarray) -> Features:
    def plain(value: Any) -> Any:
        return value.item() if isinstance(value, np.generic) else value

    if file.attrs["schema"] > SCHEMA:
        raise LongslideError(f"{path}: written by a newer Longslide (schema {file.attrs['schema']}); update Longslide")
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


def _whole(value: Any) -> int | None:
    return None if value is None else round(float(value))


def _integral(path: Path, coords: np.ndarray) -> np.ndarray:
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

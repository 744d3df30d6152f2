"""What is known of a slide after embedding."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...errors import LongslideError
from ...plurals import count
from ..slides.identity import SlideIdentity

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

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
        return f"Features({self.slide_id!r}, {count(tiles, 'tile')} x {width}{made}{slide})"

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

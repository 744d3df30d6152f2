"""Feature files as AnnData and SpatialData: tiles as observations, in level-0 pixels, over a picture of the slide."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...data.features.features import Features
from ...data.slides.slide import open_slide
from ...data.table import read_records
from ...data.whole_file import whole_path
from ...errors import LongslideError
from .layouts import need_level0

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

THUMBNAIL_PX = 2048
"""Longest edge of the picture of a slide."""


class Thumbnail(NamedTuple):
    """A picture of a slide: `(h, w, 3)` uint8, level-0 pixels per pixel (x, y), and its corner in level-0 pixels."""

    pixels: np.ndarray
    scale: tuple[float, float]
    corner: tuple[int, int]


def read_scores(results: Path, features: Features) -> "pd.DataFrame":
    """The scores that `predict --explain` gave the tiles of a slide.

    Args:
        results: The folder that `predict` wrote.
        features: The slide's features.

    Returns:
        A row for each tile, in the order of the features, with the columns `score_<class>`.

    Raises:
        LongslideError: The folder has no scores of this slide, or they are of other tiles.
    """
    import pandas as pd

    path = results / "slides" / features.slide_id / "tiles.csv"
    if not path.is_file():
        raise LongslideError(
            f"{features.slide_id}: {results} has no scores of its tiles; predict it there with --explain"
        )
    header, rows = read_records(path)
    places = {(int(x), int(y)): scores for x, y, *scores in rows}
    wanted = [(int(x), int(y)) for x, y in features.coords]
    if len(rows) != len(wanted) or any(place not in places for place in wanted):
        raise LongslideError(
            f"{path}: scores of other tiles than those of the feature file; predict with these features"
        )
    return pd.DataFrame([places[place] for place in wanted], columns=header[2:]).astype(np.float32)


def read_thumbnail(features: Features) -> Thumbnail:
    """A picture of the slide that the features are of.

    Raises:
        LongslideError: The slide is not where it was, or cannot be read.
    """
    if features.slide_path is None or not Path(features.slide_path).exists():
        raise LongslideError(
            f"its slide is not at {features.slide_path}" if features.slide_path else "its slide is not known"
        )
    with open_slide(features.slide_path, reader=features.settings.get("reader")) as slide:
        pixels = slide.thumbnail(THUMBNAIL_PX)
        x, y, width, height = slide.bounds
    return Thumbnail(pixels, (width / pixels.shape[1], height / pixels.shape[0]), (x, y))


def write_anndata(features: Features, output: Path, scores: "pd.DataFrame | None", thumbnail: Thumbnail | None) -> Path:
    """`<slide_id>.h5ad`, as scanpy and squidpy read it: see `table_of`.

    `uns["spatial"][slide_id]` has the picture as `squidpy.pl.spatial_scatter` looks for it, `uns["tissue"]` the contours
    as GeoJSON.
    """
    table = table_of(features, scores, "anndata")
    if thumbnail is not None:
        height, width = thumbnail.pixels.shape[:2]
        scale = 1 / thumbnail.scale[0 if width >= height else 1]  # of the longer edge, whose rounding weighs least
        left, top = (round(edge * scale) for edge in thumbnail.corner)  # the picture begins at the corner of the canvas
        image = np.pad(thumbnail.pixels, ((top, 0), (left, 0), (0, 0)), constant_values=255)
        diameter = float(features.tile_size_level0 or features.step_level0)
        factors = {"tissue_hires_scalef": scale, "spot_diameter_fullres": diameter}
        table.uns["spatial"] = {features.slide_id: {"images": {"hires": image}, "scalefactors": factors}}
    if features.tissue is not None:
        table.uns["tissue"] = features.tissue
    path = output / f"{features.slide_id}.h5ad"
    with whole_path(path) as temporary:
        table.write_h5ad(temporary)
    return path


def write_spatialdata(
    features: Features, output: Path, scores: "pd.DataFrame | None", thumbnail: Thumbnail | None
) -> Path:
    """`<slide_id>.zarr`, a SpatialData object in level-0 pixels.

    Its table `features` (see `table_of`) annotates the shapes `tiles`, the squares; the shapes `tissue` are the contours,
    and the image `thumbnail` is the slide.
    """
    import geopandas
    import shapely
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Scale, Sequence, Translation

    table = table_of(features, scores, "spatialdata")
    table.obs = table.obs.assign(region="tiles", instance=np.arange(len(table))).astype({"region": "category"})
    size = features.tile_size_level0 or features.step_level0
    squares = shapely.box(*features.coords.T, *(features.coords + size).T)
    shapes: dict[str, Any] = {"tiles": ShapesModel.parse(geopandas.GeoDataFrame(geometry=squares))}
    if features.tissue is not None:
        contours = shapely.get_parts(shapely.from_geojson(features.tissue))
        if len(contours):
            shapes["tissue"] = ShapesModel.parse(geopandas.GeoDataFrame(geometry=list(contours)))
    images: dict[str, Any] = {}
    if thumbnail is not None:
        axes = ("x", "y")
        place = Sequence([Scale(list(thumbnail.scale), axes), Translation(list(thumbnail.corner), axes)])
        images["thumbnail"] = Image2DModel.parse(
            np.ascontiguousarray(thumbnail.pixels.transpose(2, 0, 1)),
            dims=("c", "y", "x"),
            c_coords=["r", "g", "b"],
            transformations={"global": place},
        )
    annotated = TableModel.parse(table, region="tiles", region_key="region", instance_key="instance")
    content = SpatialData(images=images, shapes=shapes, tables={"features": annotated})
    path = output / f"{features.slide_id}.zarr"
    with whole_path(path) as temporary:
        content.write(temporary)
    return path


def table_of(features: Features, scores: "pd.DataFrame | None", target: str) -> "AnnData":
    """Tiles as observations.

    Returns:
        `obs` as `Features.to_anndata` has it, and the scores; `obsm["features"]` the embeddings as they are in the file;
        `obsm["spatial"]` the centres of the tiles in level-0 pixels; `uns["longslide"]` what they were made with.

    Raises:
        LongslideError: The package is not installed, or the file's coordinates are no level-0 pixels.
    """
    try:
        from anndata import AnnData

        __import__(target)
    except ModuleNotFoundError as error:
        raise LongslideError(f"--to {target} needs the package: pip install 'longslide[{target}]'") from error
    need_level0(features, target)
    whole = features.to_anndata()
    obs = whole.obs
    if scores is not None:
        obs = obs.assign(**{str(name): scores[name].to_numpy() for name in scores.columns})
    return AnnData(obs=obs, obsm={"spatial": whole.obsm["spatial"], "features": features.features}, uns=dict(whole.uns))


SPATIAL_WRITERS: dict[str, Callable[[Features, Path, "pd.DataFrame | None", Thumbnail | None], Path]] = {
    "anndata": write_anndata,
    "spatialdata": write_spatialdata,
}
"""Writes a slide's features, with the scores of its tiles and its picture, into a folder, and says where."""

"""Tissue segmenters: a slide in, where its tissue is out."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import cv2
import numpy as np

from ...errors import LongslideError
from ...registry import Plugin, Registry
from ..slides.slide import Slide

MAX_MASK_PX = 4096
"""Edge of the largest mask, if it is a square; a longer one is as much narrower."""


@dataclass(frozen=True)
class Tissue:
    """The tissue of a slide.

    Attributes:
        mask: `(h, w)` bool raster, from `origin` on; beyond it there is no tissue.
        downsample: Level-0 pixels per pixel of the mask, in x and y.
        method: How it was found: the name and version of the method, or the name and digest of the user's file.
        origin: (x, y) in level-0 pixels of the mask's corner.
        left_out: What was found and is no tissue to be embedded, such as ink: a raster like `mask` by its name.
    """

    mask: np.ndarray
    downsample: tuple[float, float]
    method: str
    origin: tuple[int, int] = (0, 0)
    left_out: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def on_thumbnail(
        cls, mask: np.ndarray, slide: Slide, method: str, left_out: Mapping[str, np.ndarray] | None = None
    ) -> "Tissue":
        """Tissue as it was found on a thumbnail of a slide.

        Args:
            mask: `(h, w)` bool over `Slide.thumbnail`, of its size or another.
            slide: The slide.
            method: How it was found.
            left_out: Rasters like `mask` of what is no tissue to be embedded, by name.
        """
        x, y, width, height = slide.bounds
        return cls(mask, (width / mask.shape[1], height / mask.shape[0]), method, (x, y), left_out or {})

    @cached_property
    def contours(self) -> list[list[np.ndarray]]:
        """One polygon per region: its outline first, then its holes, each an `(n, 2)` array of (x, y) in level-0 pixels."""
        # Traced at the corners of the pixels, not at their centres: an upscaled mask's border is the pixels' border.
        doubled = cv2.resize(self.mask.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
        padded = cv2.copyMakeBorder(doubled, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        rings, hierarchy = cv2.findContours(padded, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        polygons: dict[int, list[np.ndarray]] = {}
        scale = np.array(self.downsample) / 2
        for number, ring in enumerate(rings):
            parent = int(hierarchy[0][number][3])
            # The ring runs through the outermost pixels' centres: half a (doubled) pixel inside the border.
            points = (ring[:, 0].astype(np.float64) - 0.5) * scale + self.origin
            if len(points) < 3:
                continue
            if parent < 0:
                polygons[number] = [points, *polygons.get(number, [])]
            else:
                polygons.setdefault(parent, []).append(points)
        return list(polygons.values())

    def area_mm2(self, slide_mpp: float) -> float:
        """Area in square millimetres, given the microns per pixel of level 0."""
        return self._area_mm2(self.mask, slide_mpp)

    def left_out_mm2(self, slide_mpp: float) -> dict[str, float]:
        """Area in square millimetres of each thing in `left_out` that is there."""
        areas = {name: self._area_mm2(mask, slide_mpp) for name, mask in self.left_out.items()}
        return {name: area for name, area in areas.items() if area}

    def _area_mm2(self, mask: np.ndarray, slide_mpp: float) -> float:
        pixel = self.downsample[0] * self.downsample[1] * (slide_mpp / 1000) ** 2
        return float(np.count_nonzero(mask) * pixel)

    def to_geojson(self, name: str = "Tissue", colour: tuple[int, int, int] = (213, 94, 0)) -> str:
        """The contours as a GeoJSON FeatureCollection in level-0 pixels, one Polygon a region; QuPath opens it.

        Rings are closed and wound as RFC 7946 asks: outlines counterclockwise, holes clockwise (with y as given).

        Args:
            name: QuPath's class of the regions.
            colour: RGB of that class.
        """
        features = []
        for polygon in self.contours:
            rings = []
            for number, points in enumerate(polygon):
                ring = points if (_signed_area(points) > 0) == (number == 0) else points[::-1]
                rings.append(np.round([*ring, ring[0]], 2).tolist())
            properties = {"objectType": "annotation", "classification": {"name": name, "color": list(colour)}}
            features.append(
                {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": rings}, "properties": properties}
            )
        return json.dumps({"type": "FeatureCollection", "features": features})


class TissueSegmenter(Plugin, ABC):
    """Finds the tissue of slides. Options are the arguments of its constructor, in plain types.

    Attributes:
        method: Name and version of the method, as feature files record it; a new version when it finds other tissue.
    """

    method: str

    def check(self) -> None:
        """Called before the first slide, so that an error that every slide would meet is raised once; nothing by default.

        Raises:
            LongslideError: Weights or a package are missing.
        """
        return

    @abstractmethod
    def __call__(self, slide: Slide) -> Tissue:
        """Find the tissue of a slide.

        Returns:
            The tissue; with an empty mask when there is none. Its `method` is this one's.

        Raises:
            LongslideError: It cannot be found.
        """


SEGMENTERS: Registry[TissueSegmenter] = Registry(
    "tissue segmenter",
    TissueSegmenter,
    {
        "optical-density": "longslide.data.tissue.optical_density:OpticalDensity",
        "hest": "longslide.pipeline.embed.learned_tissue:Hest",
        "grandqc": "longslide.pipeline.embed.learned_tissue:GrandQc",
    },
)
"""The tissue segmenters; the first one is the default."""


def settings_of(segmenter: TissueSegmenter) -> dict[str, str]:
    """What feature files record beside the method, so that the segmenter can be made again.

    Raises:
        LongslideError: An option is not of a plain type.
    """
    name = SEGMENTERS.name_of(segmenter)
    try:
        return {"tissue_segmenter": name, "tissue_settings": json.dumps(segmenter.options, sort_keys=True)}
    except TypeError as error:
        raise LongslideError(
            f"tissue segmenter {name}: its options must be of plain types (numbers, text, lists) to be recorded: {error}"
        ) from error


def segmenter_of(name: str | None, settings: str | None) -> TissueSegmenter:
    """The segmenter that a file says, as `settings_of` recorded it; the default one where it says none.

    Raises:
        LongslideError: There is no such segmenter here, or it does not take these options.
    """
    options = json.loads(settings) if settings else {}
    return SEGMENTERS.create(name or SEGMENTERS.names()[0], from_file=True, **options)


def _signed_area(points: np.ndarray) -> float:
    x, y = points.T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) / 2)

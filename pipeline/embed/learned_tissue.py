"""Tissue segmenters that were learned: HEST's and GrandQC's, behind the same door as the classical one."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import cv2
import numpy as np

from ...data.slides.slide import Slide
from ...data.tiles.grid import LEVEL_TOLERANCE, grid_of_tiles
from ...data.tiles.stream import TileStream
from ...data.tissue.base import Tissue, TissueSegmenter
from ...errors import LongslideError

if TYPE_CHECKING:
    from ...models.tissue_networks import TissueNetwork

BLOCK_UM = 8.0
"""Microns of the pixels of a mask that a finer network predicts: its prediction is taken by the majority."""

_RUNS = frozenset({"device", "batch_size"})  # options of where it runs, which change nothing


class _Weights(NamedTuple):
    """A network, the file of its weights (None: from the hub), and the option that names the file."""

    network: "TissueNetwork"
    checkpoint: str | None
    option: str


class LearnedSegmenter(TissueSegmenter):
    """What the learned segmenters share."""

    device: str
    batch_size: int

    @property
    @abstractmethod
    def _weights(self) -> list[_Weights]:
        """The networks it runs."""

    @property
    def method(self) -> str:  # type: ignore[override]
        """The names of the networks and the digests of their weights."""
        return " + ".join(network.find(checkpoint, option)[1] for network, checkpoint, option in self._weights)

    def check(self) -> None:
        """Find the weights, and the package that has the networks."""
        for network, checkpoint, option in self._weights:
            network.find(checkpoint, option)
            network.build()

    @property
    def options(self) -> dict[str, Any]:
        """The options that decide what is found."""
        return {name: value for name, value in super().options.items() if name not in _RUNS}

    def __reduce__(self) -> NoReturn:
        """A network is not sent to the process that opens slides: it stays where the device is."""
        raise TypeError(f"{type(self).__name__} stays in its process")

    def _predict(
        self,
        slide: Slide,
        weights: _Weights,
        threshold: float | None = None,
        where: np.ndarray | None = None,
    ) -> np.ndarray:
        """The class of each block over the slide's bounds.

        Args:
            slide: The slide.
            weights: The network and its weights.
            threshold: See `classes_of`.
            where: `(h, w)` bool over the slide's bounds: patches without any of it are not looked at.

        Returns:
            `(h, w)` uint8 index of `network.classes`; of what is not looked at or cannot be read the background.
        """
        from ...models.tissue_networks import PATCH_PX, classes_of
        from .tile_embedding import resolve_device

        network, checkpoint, option = weights
        mpp = slide.mpp.value
        if mpp > network.mpp * (1 + LEVEL_TOLERANCE):
            raise LongslideError(
                f"{slide.path}: {mpp:g} um/px is coarser than the {network.mpp:g} that {network.name} needs; find its "
                "tissue by --tissue optical-density, or give a mask"
            )
        model = network.load(network.find(checkpoint, option)[0], resolve_device(self.device))
        left, top, width, height = slide.bounds
        edge = round(PATCH_PX * network.mpp / mpp)
        columns, rows = -(-width // edge), -(-height // edge)
        cells = np.array([(column, row) for row in range(rows) for column in range(columns)])
        if where is not None:
            scale = np.array([where.shape[1] / width, where.shape[0] / height])
            touched = []
            for cell in cells:
                x0, y0 = np.floor(cell * edge * scale).astype(int)
                x1, y1 = np.ceil((cell + 1) * edge * scale).astype(int)
                touched.append(bool(where[y0:y1, x0:x1].any()))
            cells = cells[np.array(touched)]
        block = max(1, round(BLOCK_UM / network.mpp)) if network.mpp < BLOCK_UM else 1
        size = PATCH_PX // block
        found = np.full((rows * size, columns * size), network.classes.index("background"), np.uint8)
        if len(cells):
            grid = grid_of_tiles(
                slide, cells * edge + (left, top), tile_px=PATCH_PX, tile_size_level0=edge, step_level0=edge
            )
            for batch in TileStream(slide, grid, batch_size=self.batch_size, max_bad_tiles=len(cells)):
                classes = _majority(classes_of(network, model, batch.tiles, threshold), block, len(network.classes))
                for (column, row), one in zip(cells[batch.index].tolist(), classes, strict=True):
                    found[row * size : (row + 1) * size, column * size : (column + 1) * size] = one
                batch.release()
        blocks = edge * block / PATCH_PX
        return found[: max(1, round(height / blocks)), : max(1, round(width / blocks))]


@dataclass(frozen=True)
class Hest(LearnedSegmenter):
    """The DeepLabV3 of HEST-1k (Jaume et al., 2024), at 1 um/px: for any stain of frozen and fixed tissue.

    Attributes:
        checkpoint: Its weights, `deeplabv3_seg_v4.ckpt`; by default those of the hub.
        threshold: Probability above which a pixel is tissue; less keeps more.
        device: `auto`, or a torch device.
        batch_size: Patches of 512 px a batch.
    """

    checkpoint: str | None = None
    threshold: float = 0.5
    device: str = "auto"
    batch_size: int = 16

    @property
    def _weights(self) -> list[_Weights]:
        from ...models.tissue_networks import HEST

        return [_Weights(HEST, self.checkpoint, "--tissue.checkpoint")]

    def __call__(self, slide: Slide) -> Tissue:
        """Find the tissue."""
        classes = self._predict(slide, self._weights[0], self.threshold)
        return Tissue.on_thumbnail(classes == 1, slide, self.method)


@dataclass(frozen=True)
class GrandQc(LearnedSegmenter):
    """The networks of GrandQC (Weng et al., 2024): tissue at 10 um/px and, if asked for, its artefacts at 1 um/px.

    Folds, dark spots, pen, air bubbles and edges, and what is out of focus are then no tissue.

    Attributes:
        checkpoint: Weights of the network for tissue, `Tissue_Detection_MPP10.pth`; by default those of the hub.
        artefacts: Whether artefacts are left out.
        artefact_checkpoint: Weights of that network, `GrandQC_MPP1_state_dict.pth`; by default those of the hub.
        device: `auto`, or a torch device.
        batch_size: Patches of 512 px a batch.
    """

    checkpoint: str | None = None
    artefacts: bool = False
    artefact_checkpoint: str | None = None
    device: str = "auto"
    batch_size: int = 16

    @property
    def _weights(self) -> list[_Weights]:
        from ...models.tissue_networks import GRANDQC_ARTEFACTS, GRANDQC_TISSUE

        found = [_Weights(GRANDQC_TISSUE, self.checkpoint, "--tissue.checkpoint")]
        if self.artefacts:
            found.append(_Weights(GRANDQC_ARTEFACTS, self.artefact_checkpoint, "--tissue.artefact-checkpoint"))
        return found

    def __call__(self, slide: Slide) -> Tissue:
        """Find the tissue, and what of it is an artefact."""
        first, *second = self._weights
        tissue = self._predict(slide, first) == 0
        left_out = {}
        for weights in second:
            classes = self._predict(slide, weights, where=tissue)
            height, width = tissue.shape
            classes = cv2.resize(classes, (width, height), interpolation=cv2.INTER_NEAREST)
            for number in range(2, 7):
                left_out[weights.network.classes[number]] = tissue & (classes == number)
            for mask in left_out.values():
                tissue &= ~mask
        return Tissue.on_thumbnail(tissue, slide, self.method, left_out)


def _majority(classes: np.ndarray, block: int, count: int) -> np.ndarray:
    """The most frequent class of each block; `(B, h, w)` to `(B, h / block, w / block)`."""
    if block == 1:
        return classes
    batch, height, width = classes.shape
    blocks = classes.reshape(batch, height // block, block, width // block, block)
    counts = np.stack([(blocks == number).sum((2, 4)) for number in range(count)])
    return np.asarray(counts.argmax(0), np.uint8)

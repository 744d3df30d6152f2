"""Bags: the tiles of a slide, or of all slides of a patient, with a target; and the packed batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...bag_lengths import with_lengths
from ...errors import LongslideError
from ...plurals import count
from ..features.cache import FeatureCache, SlideTiles
from ..table import listed
from .augmentation import Augmentation
from .cohort import Cohort

BagKey = tuple[int, int, int]
"""A draw of a bag: its number, the epoch, and which of its draws in this epoch. All randomness of a bag is a function of the
seed and this key, so neither worker processes nor an interruption change it."""


@dataclass(frozen=True)
class Bag:
    """One sample.

    Attributes:
        patient_id: The patient.
        slide_ids: The slides: one, or all of the patient.
        files: Their feature files.
        tiles: Tiles of each slide.
        target: Target as in `Cohort.targets`; None without labels.
    """

    patient_id: str
    slide_ids: tuple[str, ...]
    files: tuple[Path, ...]
    tiles: tuple[int, ...]
    target: np.ndarray | None


def make_bags(cohort: Cohort, rows: np.ndarray, tiles: np.ndarray, unit: Literal["slide", "patient"]) -> list[Bag]:
    """Bags of some slides of a cohort.

    Args:
        cohort: The cohort.
        rows: Row numbers of the slides.
        tiles: `(N,)` tiles of each slide of the cohort.
        unit: One bag per slide, or one bag per patient.

    Returns:
        The bags in the order of the rows; a patient comes where the first of its slides is.

    Raises:
        LongslideError: One bag per patient was asked for, and the slides of a patient have different labels.
    """
    patients = cohort.rows["patient_id"]
    if unit == "slide":
        groups = [[row] for row in rows.tolist()]
    else:
        mixed = cohort.mixed_patients
        if mixed:
            raise LongslideError(
                f"{count(len(mixed), 'patient has', 'patients have')} slides with different labels "
                f"({listed(mixed)}); use --data.bags slide, or give "
                "each patient one label"
            )
        together: dict[str, list[int]] = {}
        for row in rows.tolist():
            together.setdefault(patients[row], []).append(row)
        groups = list(together.values())
    return [
        Bag(
            patient_id=patients[group[0]],
            slide_ids=tuple(cohort.rows["slide_id"][group]),
            files=tuple(cohort.files[row] for row in group),
            tiles=tuple(int(tiles[row]) for row in group),
            target=None if cohort.targets is None else _joined(cohort.targets[group]),
        )
        for group in groups
    ]


def _float32(target: np.ndarray | None) -> np.ndarray | None:
    """A target as models take it; the table's own digits stay in the bag."""
    return target.astype(np.float32) if target is not None and target.dtype == np.float64 else target


def _joined(targets: np.ndarray) -> np.ndarray:
    """The target of slides that agree wherever they have one."""
    if targets.dtype.kind != "f":
        return np.asarray(targets[0])
    has_label = ~np.isnan(targets)
    return np.asarray(np.where(has_label.any(0), np.where(has_label, targets, -np.inf).max(0), np.nan), targets.dtype)


class BagDataset(Dataset[dict[str, Tensor]]):
    """Batches of bags. An item is a whole packed batch: it is asked for by the keys of its bags.

    Args:
        bags: The bags.
        cache: Reads their features.
        augmentation: Changes the bags; None leaves them as they are.
        max_tiles: Tiles of a bag at most: more are drawn from at random. None keeps all.
        feature_std: `(D,)` the unit of the augmentation's noise.
        seed: With the key of a bag it makes its random numbers.
        part: Which tiles of a bag of so many go into a batch, where several processes share a slide. None for all.
    """

    def __init__(
        self,
        bags: Sequence[Bag],
        cache: FeatureCache,
        *,
        augmentation: Augmentation | None = None,
        max_tiles: int | None = None,
        feature_std: np.ndarray | None = None,
        seed: int = 0,
        part: Callable[[int], slice] | None = None,
    ) -> None:
        self.bags = list(bags)
        self.cache = cache
        self.augmentation = None if augmentation == Augmentation() else augmentation
        self.max_tiles = max_tiles
        self.feature_std = feature_std
        self.seed = seed
        self.part = part

    def __len__(self) -> int:
        """Number of bags."""
        return len(self.bags)

    @property
    def lengths(self) -> np.ndarray:
        """`(bags,)` int64 most tiles that each bag gives: known without reading it."""
        dropout = 0.0 if self.augmentation is None else self.augmentation.tile_dropout
        kept = [sum(max(1, round(count * (1 - dropout))) for count in bag.tiles) for bag in self.bags]
        return np.minimum(np.array(kept, np.int64), self.max_tiles or np.iinfo(np.int64).max)

    def __getitem__(self, keys: int | Sequence[BagKey]) -> dict[str, Tensor]:
        """The packed batch of these bags; a number stands for that bag alone, as in epoch 0."""
        return self.batch([(keys, 0, 0)] if isinstance(keys, int) else keys)

    def batch(self, keys: Sequence[BagKey], device: torch.device | None = None) -> dict[str, Tensor]:
        """The packed batch of these bags, on a device: see `collate`."""
        samples = [self.sample(key, pinned=device is not None) for key in keys]
        if self.part is not None:
            for sample in samples:
                own = self.part(len(sample["tile_features"]))
                sample |= {name: sample[name][own] for name in ("tile_features", "grid_cells")}
        return collate(samples, device, parts=self.part is not None)

    def sample(self, key: BagKey, *, pinned: bool = False) -> dict[str, Any]:
        """One bag: `tile_features` `(N, D)`, `grid_cells` `(N, 2)` int64 row by row, `index`, `target`, `slide_embedding`.

        Args:
            key: Which draw of which bag.
            pinned: Whether features that are kept in memory are to lie in page-locked memory.

        Raises:
            LongslideError: A file cannot be read.
        """
        bag = self.bags[key[0]]
        slides = [self.cache.read(path, pinned=pinned) for path in bag.files]
        features, cells = slides[0].features, slides[0].cells  # row by row
        whole = self.max_tiles is None or sum(bag.tiles) <= self.max_tiles
        if len(slides) > 1 or self.augmentation is not None or not whole:
            features, cells = self._drawn(key, slides)
        sample = {"tile_features": features, "grid_cells": cells, "index": key[0], "target": _float32(bag.target)}
        embeddings = [slide.slide_embedding for slide in slides if slide.slide_embedding is not None]
        if len(embeddings) == len(slides):
            sample["slide_embedding"] = np.mean(embeddings, axis=0, dtype=np.float32)
        return sample

    def _drawn(self, key: BagKey, slides: Sequence[SlideTiles]) -> tuple[np.ndarray, np.ndarray]:
        """Features and cells of what the augmentation and `max_tiles` leave of the slides of a bag, row by row."""
        rng = np.random.default_rng([self.seed, *key])
        chosen = [self._changed(slide, rng) for slide in slides]
        cells = _side_by_side([cells for _, cells in chosen])
        order = np.lexsort((cells[:, 0], cells[:, 1]))
        if self.max_tiles is not None and len(order) > self.max_tiles:
            order = order[np.sort(rng.choice(len(order), self.max_tiles, replace=False))]
        if len(chosen) == 1:
            features = _taken(slides[0].features, chosen[0][0][order])
        else:
            features = np.concatenate([slide.features[kept] for slide, (kept, _) in zip(slides, chosen, strict=True)])[
                order
            ]
        if self.augmentation is not None and self.augmentation.noise > 0:
            assert self.feature_std is not None
            features = self.augmentation.add_noise(features, self.feature_std, rng)
        return features, cells[order]

    def _changed(self, slide: SlideTiles, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the tiles that stay, and their cells."""
        if self.augmentation is None:
            return np.arange(len(slide.cells)), slide.cells
        kept = self.augmentation.keep(slide.cells, rng)
        return kept, self.augmentation.move(slide.cells[kept], rng)


def _taken(features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """These rows; without a copy if they are all, in order."""
    return features if len(rows) == len(features) and (np.diff(rows) > 0).all() else features[rows]


def _side_by_side(grids: Sequence[np.ndarray]) -> np.ndarray:
    """Lay the grids of slides beside each other, an empty column between them, so that no two tiles share a cell."""
    if len(grids) == 1:
        return grids[0]
    placed, column = [], 0
    for cells in grids:
        corner = cells.min(0)
        placed.append(cells - corner + np.array([column, 0]))
        column = int(placed[-1][:, 0].max()) + 2
    return np.concatenate(placed)


def collate(
    samples: Sequence[dict[str, Any]], device: torch.device | None = None, *, parts: bool = False
) -> dict[str, Tensor]:
    """Pack bags end to end: no padding.

    Args:
        samples: Bags as `BagDataset.sample` gives them.
        device: Where the batch goes: each bag's features are copied to their place there, on the current stream; None for
            the host.
        parts: Whether they are parts of slides whose other parts other processes have.

    Returns:
        `tile_features` (T, D) float16 or float32, `grid_cells` (T, 2) int64, `cu_seqlens` (B + 1,) int32 from 0 (known to
        `lengths_of` without asking a GPU), `index` (B,) int64, `target` (not without labels) as in `Cohort.targets` but
        float32 for float64, `slide_embedding` (B, D_slide) float32 if all files have one.
    """
    lengths = [len(sample["tile_features"]) for sample in samples]
    batch = {
        "tile_features": _end_to_end([sample["tile_features"] for sample in samples], device),
        "grid_cells": torch.from_numpy(np.concatenate([sample["grid_cells"] for sample in samples])),
        "cu_seqlens": torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        "index": torch.tensor([sample["index"] for sample in samples], dtype=torch.int64),
    }
    for name in ("target", "slide_embedding"):
        values = [sample[name] for sample in samples if sample.get(name) is not None]
        if len(values) == len(samples):
            batch[name] = torch.from_numpy(np.stack(values))
    if device is not None:
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    batch["cu_seqlens"] = with_lengths(batch["cu_seqlens"], lengths, parts=parts)
    return batch


def _end_to_end(parts: Sequence[np.ndarray], device: torch.device | None) -> Tensor:
    """The parts one after the other; float32 where float16 and float32 meet."""
    dtype = torch.from_numpy(np.empty(0, np.result_type(*parts))).dtype
    whole = torch.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=dtype, device=device)
    # In one call: a thread that gives up the interpreter for each of them keeps training waiting for it each time.
    places = torch.split(whole, [len(part) for part in parts])
    torch._foreach_copy_(places, [torch.from_numpy(part) for part in parts], non_blocking=True)
    return whole

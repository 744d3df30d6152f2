"""What features were made with: the one rule by which features belong together."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ...errors import LongslideError
from ...plurals import count
from ..slides.base import reader_to_obey
from ..table import listed
from .features import Features

MPP_TOLERANCE = 0.01
"""Relative difference below which two microns per pixel are the same: a pyramid level so close is read as it is."""

_EARLIER_NAMES = {"mpp": "tile_mpp"}
"""Keys of `to_dict` in checkpoints of earlier versions -> their names now."""


def _decisive() -> Any:
    """A setting without which embeddings cannot be compared; others shift them a little, or choose the tiles."""
    return field(default=None, metadata={"decisive": True})


@dataclass(frozen=True)
class Difference:
    """One setting that is not the same.

    Attributes:
        name: The setting, as `Preprocessing` calls it.
        value: What it is.
        wanted: What it should be.
        decisive: Whether embeddings made so cannot be compared.
    """

    name: str
    value: Any
    wanted: Any
    decisive: bool

    def __str__(self) -> str:
        """Both values, for a message."""
        return f"{self.name} {self.value} instead of {self.wanted}"


@dataclass(frozen=True)
class Preprocessing:
    """What features were made with; None for what is not known.

    Attributes:
        tile_encoder: Name of the tile encoder.
        tile_weights: Source and digest of its weights.
        tile_mpp: Microns per pixel of the tiles.
        tile_px: Edge of a tile in pixels, as the tile encoder got it.
        overlap: Pixels that neighbouring tiles share.
        slide_encoder: Name of the slide encoder, where there is a slide embedding.
        slide_weights: Source and digest of its weights.
        pool: How it pools.
        precision: Precision of the encoders.
        min_tissue: Smallest share of a tile that must be tissue.
        max_blur: Tiles more blurred than this were left out.
        tissue_method: How tissue was found; `mask:...` for a mask of the user's.
        tissue_segmenter: The segmenter that found it.
        tissue_settings: The segmenter's options, as JSON.
        reader: The slide reader, if it is not one of the package: those give equal pixels.
    """

    tile_encoder: str | None = _decisive()
    tile_weights: str | None = _decisive()
    tile_mpp: float | None = _decisive()
    tile_px: int | None = _decisive()
    overlap: int | None = _decisive()
    slide_encoder: str | None = _decisive()
    slide_weights: str | None = _decisive()
    pool: str | None = _decisive()
    precision: str | None = None
    min_tissue: float | None = None
    max_blur: float | None = None
    tissue_method: str | None = None
    tissue_segmenter: str | None = None
    tissue_settings: str | None = None
    reader: str | None = None

    @classmethod
    def of(cls, features: Features) -> "Preprocessing":
        """What a feature file says of itself."""
        recorded = {"tile_encoder": features.encoder, "tile_weights": features.weights}
        for one in fields(cls):
            if one.name not in recorded:
                recorded[one.name] = getattr(features, one.name, features.settings.get(one.name))
        recorded["reader"] = reader_to_obey(recorded["reader"])
        return cls(**recorded)  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Preprocessing":
        """What `to_dict` gave, of this version or an earlier one."""
        known = {one.name for one in fields(cls)}
        renamed = {_EARLIER_NAMES.get(name, name): value for name, value in content.items()}
        return cls(**{name: value for name, value in renamed.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """What is known, in plain types, for checkpoints and JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def of_tiles(self) -> "Preprocessing":
        """Without the slide encoder: of the tile embeddings alone."""
        return replace(self, slide_encoder=None, slide_weights=None, pool=None)

    @property
    def without_mask(self) -> "Preprocessing":
        """Without how tissue was found, if that was a mask of the user's: it belongs to its slide."""
        if not str(self.tissue_method).startswith("mask:"):
            return self
        return replace(self, tissue_method=None, tissue_segmenter=None, tissue_settings=None)

    def differences(self, wanted: "Preprocessing") -> tuple[Difference, ...]:
        """What is not as wanted. What either does not know is no difference: see `unstated`.

        Weights are the same when their digests are, wherever they lie; microns per pixel within `MPP_TOLERANCE`.
        """
        pairs = [(one, getattr(self, one.name), getattr(wanted, one.name)) for one in fields(self)]
        return tuple(
            Difference(one.name, value, other, one.metadata.get("decisive", False))
            for one, value, other in pairs
            if value is not None and other is not None and not _same(one.name, value, other)
        )

    def unstated(self, wanted: "Preprocessing") -> tuple[str, ...]:
        """The decisive settings that are wanted and not known here."""
        return tuple(
            one.name
            for one in fields(self)
            if one.metadata.get("decisive")
            and getattr(self, one.name) is None
            and getattr(wanted, one.name) is not None
        )

    def unlike_training(self, trained: "Preprocessing") -> list[str]:
        """The differences for which a classifier cannot be used on these features.

        Args:
            trained: What its training features were made with.
        """
        return [str(one) for one in self.differences(trained) if one.decisive]

    def remarks(self, trained: "Preprocessing") -> list[str]:
        """What to remark where a classifier is used on these features: what is not stated, and lesser differences.

        Args:
            trained: What its training features were made with.
        """
        unstated = self.unstated(trained)
        remarks = [f"the feature file does not say its {', '.join(unstated)}"] if unstated else []
        different = replace(self.without_mask, precision=None).differences(trained)  # the machine chooses the precision
        lesser = [one for one in different if not one.decisive]
        return remarks + [f"{one} as in training" for one in lesser]


def agreed(
    files: Sequence[Path],
    settings: Sequence[Preprocessing],
    *,
    what: str = "the feature files were",
    remedy: str = "embed all slides alike",
) -> tuple[Preprocessing, list[str]]:
    """What all of a cohort's features were made with.

    Args:
        files: The feature files, for the messages; or the checkpoints that were trained on them.
        settings: What each was made with.
        what: What they are, for the error.
        remedy: What to do about it, for the error.

    Returns:
        The settings, the most common value of those that need not agree; and notes on files that do not state one.

    Raises:
        LongslideError: Two files differ in a decisive setting.
    """
    settings = [each.without_mask for each in settings]
    common: dict[str, Any] = {}
    notes: list[str] = []
    for one in fields(Preprocessing):
        stated = [
            (path, value)
            for path, each in zip(files, settings, strict=True)
            if (value := getattr(each, one.name)) is not None
        ]
        if not stated:
            continue
        first_path, first = stated[0]
        if not one.metadata.get("decisive"):
            counts = Counter(value for _, value in stated)
            common[one.name] = counts.most_common(1)[0][0]
            if len(counts) > 1:
                notes.append(f"the feature files differ in {one.name}: {', '.join(sorted(map(str, counts)))}")
            continue
        common[one.name] = first
        for path, value in stated:
            if not _same(one.name, value, first):
                raise LongslideError(
                    f"{what} made with different settings: {one.name} is {first} in {first_path} and {value} in {path}; "
                    f"{remedy}"
                )
        if len(stated) < len(files):
            known = {path for path, _ in stated}
            silent = [path.name for path in files if path not in known]
            notes.append(
                f"{count(len(silent), 'feature file does', 'feature files do')} not say {one.name}; taken for {first}: "
                f"{listed(silent)}"
            )
    return Preprocessing(**common), notes


def same_weights(one: str, other: str) -> bool:
    """Whether two records of weights are of the same ones: by their digests, wherever they lie."""
    return bool(_identity(one) == _identity(other))


def _same(name: str, one: Any, other: Any) -> bool:
    if name == "tile_mpp":
        return math.isclose(one, other, rel_tol=MPP_TOLERANCE)
    if name == "tissue_settings":
        one, other = (_without_checkpoints(settings) for settings in (one, other))
    return bool(_identity(one) == _identity(other))


def _without_checkpoints(settings: str) -> str:
    """Settings of a segmenter without where its weights lie: their digest is part of `tissue_method`."""
    options = json.loads(settings)
    return json.dumps({name: value for name, value in options.items() if not name.endswith("checkpoint")})


def _identity(value: Any) -> Any:
    return value.partition(" sha256:")[2] or value if isinstance(value, str) else value

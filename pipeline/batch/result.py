"""How one slide of a job ended."""

import json
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self, cast, get_args

import numpy as np

from ...data.features.features import Features
from ...data.slides.mpp import mpp_remark
from ...data.slides.slide import levels_remark
from ...data.slides.slide_table import SlideEntry
from ...errors import LongslideError, printable

Status = Literal["done", "failed", "skipped"]

BUSY = "another process is working on it"
"""Why a slide is skipped that another process has claimed; who that is follows."""


@dataclass(frozen=True)
class SlideResult:
    """How one slide of a job ended; the columns of `summary.csv`.

    Attributes:
        slide_id: The slide's id, the stem of its output files.
        slide: Path of the slide file.
        status: `done` (the output is complete), `failed`, or `skipped` (nothing to do here: no tissue, or another
            process is at work on it).
        reason: Why it failed or was skipped, or a remark on a slide that is done.
        tiles: Tiles embedded.
        bad_tiles: Tiles that could not be read and were left out.
        blurred_tiles: Tiles that were left out for their blur.
        slide_mpp: Microns per pixel at level 0.
        mpp_source: Where that came from.
        tile_mpp: Microns per pixel of the tiles.
        tissue_mm2: Area of the tissue in square millimetres.
        left_out_mm2: Area of what was found and is no tissue to be embedded, such as ink.
        blur: Median blur of the tiles, 0 (sharp) to 1.
        seconds: Time spent on the slide in this run.
        took: What took the time of a prediction, such as `tile embeddings 81.0 s, explanation 9.2 s`.
        features: Path of the feature file.
    """

    slide_id: str
    slide: str
    status: Status
    reason: str = ""
    tiles: int | None = None
    bad_tiles: int | None = None
    blurred_tiles: int | None = None
    slide_mpp: float | None = None
    mpp_source: str | None = None
    tile_mpp: float | None = None
    tissue_mm2: float | None = None
    left_out_mm2: float | None = None
    blur: float | None = None
    seconds: float | None = None
    took: str | None = None
    features: str | None = None

    @classmethod
    def of_row(cls, row: Mapping[str, str]) -> Self:
        """Of a row of a summary, cells as text."""
        numbers: dict[str, Any] = {name: kind(row[name]) for name, kind in _NUMBERS.items() if row.get(name)}
        text: dict[str, Any] = {name: row.get(name) or None for name in ("mpp_source", "took", "features")}
        return cls(row["slide_id"], row["slide"], cast(Status, row["status"]), row["reason"], **numbers, **text)

    @property
    def ok(self) -> bool:
        """Whether the slide does not count against the exit status."""
        return self.status != "failed"

    @classmethod
    def done(
        cls, entry: SlideEntry, features: Features, path: Path, reason: str = "", seconds: float | None = None
    ) -> Self:
        """Of a slide whose feature file is complete.

        Args:
            entry: The slide.
            features: What is in the feature file.
            path: The feature file.
            reason: A remark; what a person should look at in the file itself is added.
            seconds: Time spent on the slide in this run.
        """
        return cls(
            entry.slide_id,
            entry.shown,
            "done",
            "; ".join(filter(None, [reason, *remarks_on(features)])),
            tiles=len(features.coords),
            bad_tiles=features.settings.get("bad_tiles"),
            blurred_tiles=features.settings.get("blurred_tiles"),
            slide_mpp=features.slide_mpp,
            mpp_source=features.settings.get("mpp_source"),
            tile_mpp=features.tile_mpp,
            tissue_mm2=features.settings.get("tissue_mm2"),
            left_out_mm2=_total(features.settings.get("left_out_mm2")),
            blur=None if features.blur is None else round(float(np.median(features.blur)), 4),
            seconds=seconds,
            features=str(path),
        )

    @classmethod
    def skipped(cls, entry: SlideEntry, reason: str) -> Self:
        """Of a slide with nothing to do."""
        return cls(entry.slide_id, entry.shown, "skipped", reason)

    @classmethod
    def failed(cls, entry: SlideEntry, error: Exception) -> Self:
        """Of a slide that an exception ended; one that is no user's mistake is printed with its traceback."""
        if isinstance(error, LongslideError):
            reason = " ".join(str(error).splitlines())
        elif isinstance(error, OSError):  # the disk, not the program
            reason = printable(f"{error.filename or entry.path}: {error.strerror or error}")
        else:
            traceback.print_exception(error)  # not the user's mistake: whoever reports it needs to know where
            reason = printable(f"unexpected {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return cls(entry.slide_id, entry.shown, "failed", reason)


_NUMBERS: Mapping[str, type[int] | type[float]] = {
    **dict.fromkeys(("tiles", "bad_tiles", "blurred_tiles"), int),
    **dict.fromkeys(("slide_mpp", "tile_mpp", "tissue_mm2", "left_out_mm2", "blur", "seconds"), float),
}


def remarks_on(features: Features) -> list[str]:
    """What a person should look at in a slide, by its feature file."""
    settings = features.settings
    remarks = [
        mpp_remark(features.slide_mpp, settings.get("file_mpp")) if features.slide_mpp else "",
        settings.get("metadata_remark", ""),
        settings.get("reader_remark", ""),
        levels_remark(settings.get("unreadable_levels", ""), settings.get("differing_levels", "")),
    ]
    return [remark for remark in remarks if remark]


class _Ended(Protocol):
    @property
    def status(self) -> Status: ...


def counted(results: Iterable[_Ended]) -> str:
    """How many slides ended how, such as `3 done, 0 failed, 1 skipped`."""
    count = Counter(result.status for result in results)
    return ", ".join(f"{count[status]} {status}" for status in get_args(Status))


def _total(areas: str | None) -> float | None:
    """The sum of areas by name, as feature files hold them in JSON."""
    return None if areas is None else float(sum(json.loads(areas).values()))

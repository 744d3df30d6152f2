"""Microns per pixel at level 0: where it may come from, and in what order."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import LongslideError

PLAUSIBLE = (0.05, 10.0)
"""Microns per pixel outside this range are refused."""

FAR_OFF = 0.1
"""Relative difference to the file's own above which a given value is remarked."""

MICRONS_PER_UNIT = {"inch": 25_400.0, "centimeter": 10_000.0}
"""Of the units of TIFF's resolution tags."""


@dataclass(frozen=True)
class Mpp:
    """Microns per pixel at level 0.

    Attributes:
        value: Microns per pixel, as found: never rounded.
        source: `option` (the user's), `file`, `tiff-resolution` or `objective-power`.
        in_file: What the file says, where the user gave the value and the file has one too.
    """

    value: float
    source: str
    in_file: float | None = field(default=None, compare=False)

    @property
    def remark(self) -> str:
        """What a person should look at: a given value far off the file's own; empty if there is nothing."""
        return mpp_remark(self.value, self.in_file)


def mpp_remark(value: float, in_file: float | None) -> str:
    """What to remark on a given value that is far off the file's own; empty if it is not, or the file has none."""
    if in_file is None or abs(value - in_file) <= FAR_OFF * in_file:
        return ""
    return f"slide_mpp {value:g} was given, the file says {in_file:g}"


def resolve_mpp(properties: Mapping[str, str], path: Path, given: float | None = None) -> Mpp:
    """Find a slide's microns per pixel: the user's word, the file's own, TIFF resolution tags, the objective power.

    Args:
        properties: OpenSlide's properties of the slide.
        path: The slide, for the messages.
        given: What the user says it is.

    Returns:
        The value and its source.

    Raises:
        LongslideError: There is none, or the one to trust is implausible or differs between x and y.
    """
    remedy = "give it with --slide-mpp or a column `slide_mpp` in the slide table"
    if given is not None:
        try:
            in_file = resolve_mpp(properties, path).value
        except LongslideError:
            in_file = None
        return Mpp(plausible(given, f"{path}: {given:g} microns per pixel"), "option", in_file)
    x, y = number(properties.get("openslide.mpp-x")), number(properties.get("openslide.mpp-y"))
    if properties.get("openslide.vendor") == "generic-tiff":
        x = y = None  # OpenSlide took them from the resolution tags, whether they are plausible or not
    if x is not None or y is not None:
        value = _mean(x if x is not None else y, y if y is not None else x, path, remedy)
        return Mpp(plausible(value, f"{path}: the file's {value:g} microns per pixel", remedy), "file")
    unit = MICRONS_PER_UNIT.get(properties.get("tiff.ResolutionUnit", ""))
    x, y = number(properties.get("tiff.XResolution")), number(properties.get("tiff.YResolution"))
    if unit and x and y:
        value = _mean(unit / x, unit / y, path, remedy)
        if PLAUSIBLE[0] <= value <= PLAUSIBLE[1]:  # else it is a screen's or a printer's resolution, 72 dpi
            return Mpp(value, "tiff-resolution")
    power = number(properties.get("openslide.objective-power"))
    if power:
        value = 10 / power
        return Mpp(
            plausible(value, f"{path}: objective power {power:g}, {value:g} microns per pixel", remedy),
            "objective-power",
        )
    raise LongslideError(f"{path}: the file does not say its microns per pixel; {remedy}")


def number(text: str | None) -> float | None:
    """A positive, finite number of a slide's properties; None if it is none."""
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _mean(x: float | None, y: float | None, path: Path, remedy: str) -> float:
    assert x is not None
    assert y is not None
    if abs(x - y) > 0.02 * max(x, y):
        raise LongslideError(f"{path}: microns per pixel differ between x ({x:g}) and y ({y:g}); {remedy}")
    return (x + y) / 2


def plausible(value: float, what: str, remedy: str = "check --slide-mpp or the column `slide_mpp`") -> float:
    """The value, if it can be microns per pixel.

    Args:
        value: Microns per pixel.
        what: What it is and where it stands, for the message.
        remedy: What to do about it, for the message.

    Raises:
        LongslideError: It is outside `PLAUSIBLE`.
    """
    if not PLAUSIBLE[0] <= value <= PLAUSIBLE[1]:
        raise LongslideError(f"{what} is not plausible ({PLAUSIBLE[0]:g} to {PLAUSIBLE[1]:g}); {remedy}")
    return value

"""What a slide file says of itself that contradicts itself, or that no reader follows."""

from collections.abc import Mapping

from PIL import ImageCms

from .mpp import FAR_OFF, MICRONS_PER_UNIT, PLAUSIBLE, number

ICC_PROFILE = "longslide.icc-profile"
"""Property of a slide, beside those of OpenSlide: the description of the ICC profile that its colours are stored with."""

_AXES_DIFFER = 0.005  # beyond what rounding to four digits makes
_POWER_FACTOR = 1.4  # 40x objectives have 0.21 to 0.27 um/px, 20x ones 0.42 to 0.55


def metadata_remark(properties: Mapping[str, str]) -> str:
    """What a person should look at in a slide's metadata; empty if nothing.

    Microns per pixel that differ between the axes, from the resolution tags or from what the objective's magnification
    suggests; an ICC profile other than sRGB, which is not applied.

    Args:
        properties: `Slide.properties`.
    """
    remarks = []
    x, y = (number(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
    if x and y and abs(x - y) > _AXES_DIFFER * max(x, y):
        remarks.append(f"the file's microns per pixel differ between x ({x:g}) and y ({y:g})")
    mpp = x or y
    power = number(properties.get("openslide.objective-power"))
    if mpp and power and not 1 / _POWER_FACTOR <= mpp * power / 10 <= _POWER_FACTOR:
        remarks.append(f"the file says {mpp:g} um/px and objective power {power:g}, which has about {10 / power:.3g}")
    unit = MICRONS_PER_UNIT.get(properties.get("tiff.ResolutionUnit", ""))
    resolution = number(properties.get("tiff.XResolution"))
    if mpp and unit and resolution and properties.get("openslide.vendor") != "generic-tiff":
        tagged = unit / resolution
        if PLAUSIBLE[0] <= tagged <= PLAUSIBLE[1] and abs(tagged - mpp) > FAR_OFF * mpp:
            remarks.append(f"the file says {mpp:g} um/px, and {tagged:.3g} in its resolution tags")
    if (profile := properties.get(ICC_PROFILE)) is not None and "srgb" not in profile.lower():
        remarks.append(f"its ICC profile ({profile}) is not applied: colours are as stored")
    return "; ".join(remarks)


def icc_properties(profile: ImageCms.ImageCmsProfile | None) -> dict[str, str]:
    """The property of an ICC profile; none without a profile."""
    if profile is None:
        return {}
    try:
        name = ImageCms.getProfileDescription(profile)
    except (ImageCms.PyCMSError, OSError):
        name = ""
    return {ICC_PROFILE: " ".join(name.split()) or "without a description"}

"""What a rerun finds: results that exist and fit, or were made otherwise."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ...data.slides.slide_table import SlideEntry
from ...errors import LongslideError

REMEDY = "choose another --output, or --overwrite"
"""What to do about results that were made otherwise, in the folder of the results."""


class MadeOtherwiseError(LongslideError):
    """A result exists that was made otherwise than is asked for now.

    Args:
        path: The result.
        ways: In which ways, the same text for every slide they hold for.
        remedy: What to do about it.

    Attributes:
        ways: As given.
        remedy: As given.
    """

    def __init__(self, path: Path, ways: Sequence[str], remedy: str = REMEDY) -> None:
        super().__init__(f"{path}: made otherwise ({'; '.join(ways)}); {remedy}")
        self.ways = tuple(ways)
        self.remedy = remedy


def with_results(entries: Sequence[SlideEntry], folder: Path) -> list[SlideEntry]:
    """The slides of which a folder has a file: found by listing it once, as asking for each of a million takes minutes."""
    try:
        names = {Path(name).stem for name in os.listdir(folder)}
    except OSError:
        return []
    return [entry for entry in entries if entry.slide_id in names]


def refuse_mistaken_rerun(entries: Sequence[SlideEntry], check: Callable[[SlideEntry], object], folder: Path) -> None:
    """Refuse a command whose options differ in one way from all that exists, before it fails slide by slide.

    Args:
        entries: The slides of the job.
        check: Gives what exists of a slide, or None; raises `MadeOtherwiseError` where that was made otherwise.
        folder: Where the results are.

    Raises:
        MadeOtherwiseError: All results that exist, and can be read, were made otherwise in the same way.
    """
    differing: list[MadeOtherwiseError] = []
    for entry in with_results(entries, folder):
        try:
            if check(entry) is not None:
                return
        except MadeOtherwiseError as error:
            differing.append(error)
            if error.ways != differing[0].ways:
                return
        except (LongslideError, OSError):  # broken: that is no sign of other options
            continue
    if len(differing) == 1:
        raise differing[0]
    if differing:
        raise LongslideError(
            f"{folder}: all {len(differing)} existing results of these slides were made otherwise "
            f"({'; '.join(differing[0].ways)}); {differing[0].remedy}"
        )

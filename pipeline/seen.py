"""Whether what a classifier is asked about was in its training: compared with what its checkpoint recorded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.table import listed
from ..errors import LongslideError
from ..models.classifier.cases import CaseRecord, Cases

WORDS = {"patients": "patients", "slides": "slides", "images": "images", "features": "feature files"}


@dataclass(frozen=True)
class Seen:
    """Slides that were in the training or validation part of a classifier.

    Attributes:
        checked: Whether every checkpoint says what it was trained on.
        by: Kind -> ids by which they were found; see `Cases`.
        slides: The slides that any kind found.
        patients: Their patients.
    """

    checked: bool
    by: dict[str, list[str]]
    slides: frozenset[str]
    patients: frozenset[str]

    @classmethod
    def of(cls, records: Sequence[CaseRecord | None], cases: Cases) -> "Seen":
        """Compare slides with the records of one or several classifiers."""
        by: dict[str, dict[str, None]] = {}
        rows: set[int] = set()
        for record in records:
            for kind, found in ({} if record is None else record.seen(cases)).items():
                by.setdefault(kind, {}).update(dict.fromkeys(found))
                rows.update(number for number, one in enumerate(cases[kind]) if one in found)
        return cls(
            bool(records) and None not in records,
            {kind: list(ids) for kind, ids in by.items()},
            frozenset(cases["slides"][number] for number in rows),
            frozenset(cases["patients"][number] for number in rows) - {""},
        )

    def refuse(self, what: str | Path) -> None:
        """Refuse slides that were seen.

        Args:
            what: What holds them, for the message.

        Raises:
            LongslideError: Some were seen.
        """
        if not self.by:
            return
        named = {kind: ids for kind, ids in self.by.items() if kind in ("patients", "slides")} or self.by
        text = " and ".join(f"{len(ids)} {WORDS[kind]} ({listed(ids)})" for kind, ids in named.items())
        by_content = {"images", "features"} & self.by.keys()
        others = "" if by_content else "; if they are others of the same names, rename them"
        raise LongslideError(
            f"{what}: {text} were in the training or validation part of the classifier; leave them out, or mark all results "
            f"by --allow-seen{others}"
        )

    def mark(self, patient_id: str, slide_id: str) -> bool | None:
        """Whether a slide, or a patient without a slide, was seen; None where no checkpoint says."""
        found = slide_id in self.slides if slide_id else patient_id in self.patients
        return True if found else (False if self.checked else None)

    def to_dict(self) -> dict[str, Any]:
        """How many were found by what, for `run.json`."""
        return {"checked": self.checked, "slides": len(self.slides), "patients": len(self.patients)}


def seen_word(seen: bool | None) -> str:
    """The mark in tables: `yes`, `no`, or nothing where it is not known."""
    return {True: "yes", False: "no", None: ""}[seen]

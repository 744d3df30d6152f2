"""Which patients and slides a classifier was trained, selected and tested on: kept in its checkpoint as digests."""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Cases = Mapping[str, Sequence[str]]
"""Of each slide its `patients`, `slides`, `images` (quickhash) and `features` (digest of the embeddings): lists of one
length, with an empty text for what is not known."""

KINDS = ("patients", "slides", "images", "features")

SEEN_PARTS = ("train", "val")
"""Parts that a model has learnt from: val selected, calibrated and stopped it."""


@dataclass(frozen=True)
class CaseRecord:
    """The cases of each part.

    Ids are kept as the first 64 bits of SHA-256 over a salt of the checkpoint's own and the id: a checkpoint that is shared
    names no patient. It is no anonymisation: who knows an id can ask whether it is there, which is what the record is for.

    Attributes:
        salt: The salt, hexadecimal.
        parts: Part (`train`, `val`, `test`) -> kind (see `KINDS`) -> digests.
    """

    salt: str
    parts: dict[str, dict[str, frozenset[str]]]

    @classmethod
    def of(cls, parts: Mapping[str, Cases]) -> "CaseRecord":
        """The record of the cases of each part."""
        salt = secrets.token_hex(8)
        return cls(
            salt,
            {
                part: {kind: frozenset(_digest(salt, one) for one in ids if one) for kind, ids in cases.items()}
                for part, cases in parts.items()
            },
        )

    def seen(self, cases: Cases) -> dict[str, list[str]]:
        """Those of the cases that were in the training or validation part, by kind; kinds without any are left out."""
        known = {
            kind: frozenset().union(*(self.parts.get(part, {}).get(kind, frozenset()) for part in SEEN_PARTS))
            for kind in KINDS
        }
        found = {
            kind: [one for one in dict.fromkeys(ids) if one and _digest(self.salt, one) in known[kind]]
            for kind, ids in cases.items()
        }
        return {kind: ids for kind, ids in found.items() if ids}

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint."""
        parts = {part: {kind: sorted(ids) for kind, ids in kinds.items()} for part, kinds in self.parts.items()}
        return {"salt": self.salt, "parts": parts}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "CaseRecord":
        """What `to_dict` gave."""
        parts = {
            part: {kind: frozenset(ids) for kind, ids in kinds.items()} for part, kinds in content["parts"].items()
        }
        return cls(content["salt"], parts)


def _digest(salt: str, one: str) -> str:
    return hashlib.sha256(f"{salt}:{one}".encode()).hexdigest()[:16]

"""Shards of a job, such as those of a job array: each has its own slides and its own summary, and shares no lock."""

import hashlib
import heapq
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ...data.slides.parts import files_of
from ...data.slides.slide_table import SlideEntry
from ...data.whole_file import write_whole
from ...errors import LongslideError

SHARDS = "shards"
"""Folder of the shards' summaries, in the output folder."""


@dataclass(frozen=True)
class Shard:
    """One of the shards of a job.

    Attributes:
        number: Which one, from 1.
        of: How many there are.
        entries: Its slides.
        listed: Digest of the list that was divided, ids and sizes: shards of one list have each slide once.
    """

    number: int
    of: int
    entries: tuple[SlideEntry, ...]
    listed: str

    @classmethod
    def of_slides(cls, text: str, entries: Sequence[SlideEntry]) -> Self:
        """A shard of a list of slides: the same for every process that has the same list.

        The largest slides are dealt out first, each to the shard that has least.

        Args:
            text: `3/16` for the third of sixteen.
            entries: The list.

        Raises:
            LongslideError: There is no such shard.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        number, of = map(int, match.groups()) if match else (0, 0)
        if not 1 <= number <= of:
            raise LongslideError(f"--shard {text}: must look like 3/16, from 1/16 to 16/16")
        sizes = dict(zip((entry.slide_id for entry in entries), sizes_of(entries), strict=True))
        listed = hashlib.sha256(json.dumps(sorted(sizes.items())).encode()).hexdigest()
        loads = [(0, shard) for shard in range(1, of + 1)]
        own = set()
        for slide_id in sorted(sizes, key=lambda slide_id: (-sizes[slide_id], slide_id)):
            load, shard = loads[0]
            heapq.heapreplace(loads, (load + max(1, sizes[slide_id]), shard))
            if shard == number:
                own.add(slide_id)
        return cls(number, of, tuple(entry for entry in entries if entry.slide_id in own), listed)

    @property
    def summary(self) -> str:
        """Path of its summary in the output folder."""
        return summary_of(self.number, self.of)

    def begin(self, output: Path, made_with: Mapping[str, Any]) -> None:
        """Write what it is to do, for `longslide merge`."""
        content = {
            "shard": self.number,
            "of": self.of,
            "listed": self.listed,
            "made_with": made_with,
            "slides": [entry.slide_id for entry in self.entries],
        }
        write_whole((output / self.summary).with_suffix(".json"), json.dumps(content, indent=1).encode())


def summary_of(number: int, of: int) -> str:
    """Path of a shard's summary in the output folder; beside it, as JSON, is what the shard is to do."""
    return f"{SHARDS}/{number}-of-{of}.csv"


def sizes_of(entries: Sequence[SlideEntry]) -> list[int]:
    """Bytes of each slide with all its files, 0 where that cannot be said: about how long it takes."""
    with ThreadPoolExecutor(
        16, thread_name_prefix="sizes"
    ) as executor:  # a file system far away takes its time for each
        return list(executor.map(_size, entries))


def _size(entry: SlideEntry) -> int:
    try:
        several = entry.path.is_dir() or entry.path.suffix.lower() in (".mrxs", ".vsi", ".vms", ".vmu")
        files = files_of(entry.path) if several else [entry.path]  # of others it would be read to know
        return sum(path.stat().st_size for path in files)
    except OSError:
        return 0

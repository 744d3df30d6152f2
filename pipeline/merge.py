"""Joins the summaries of a job's shards."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import LongslideError
from ..plurals import count
from .batch.ledger import SUMMARY, read_summary, record
from .batch.result import BUSY, SlideResult, counted
from .batch.shards import SHARDS, summary_of
from .embed.contact_sheet import write_contact_sheet

_KEYS = {"shard", "of", "listed", "made_with", "slides"}  # of `Shard.begin`

NAMED = 5
"""Slides that a message names; of more it says how many."""


def merge(output: str | Path) -> list[SlideResult]:
    """Join the summaries of all shards of a job into `summary.csv`, once they are complete.

    Of `embed` the contact sheet is written too. Of `predict` the same command without `--shard` then adds the patients and
    `predictions.csv`: all slides are done.

    Args:
        output: Output folder of the shards.

    Returns:
        One result per slide.

    Raises:
        LongslideError: A shard is missing or not complete, a slide is in two of them, or they were made otherwise.
    """
    output = Path(output)
    shards = _read_shards(output)
    results: list[SlideResult] = []
    missing: dict[str, int] = {}
    for shard in shards:
        rows = read_summary(output / summary_of(shard["shard"], shard["of"]))
        for slide_id in shard["slides"]:
            if slide_id in rows and not rows[slide_id]["reason"].startswith(BUSY):
                results.append(SlideResult.of_row(rows[slide_id]))
            else:
                missing[slide_id] = shard["shard"]
    if missing:
        which = ", ".join(map(str, sorted(set(missing.values()))))
        raise LongslideError(
            f"{output}: {count(len(missing), 'slide is', 'slides are')} not done: {_named(list(missing))}; "
            f"run shard {which} again"
        )
    record(output, *results)
    if (output / "qc").is_dir():
        write_contact_sheet(output)
    print(f"{counted(results)}; see {output / SUMMARY}")
    return results


def _read_shards(output: Path) -> list[dict[str, Any]]:
    """What each shard was to do, in order; they are all there and of one job."""
    folder = output / SHARDS
    shards: list[dict[str, Any]] = []
    for path in folder.glob("*-of-*.json"):
        try:
            shard = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LongslideError(f"{path}: not readable; run this shard again") from error
        if not (isinstance(shard, dict) and shard.keys() >= _KEYS):
            raise LongslideError(f"{path}: not what a shard is to do; run this shard again, or delete the file")
        shards.append(shard)
    shards.sort(key=lambda shard: shard["shard"])
    if not shards:
        raise LongslideError(f"{output}: no shards there; give the --output of commands with --shard")
    counts = sorted({shard["of"] for shard in shards})
    if len(counts) > 1:
        raise LongslideError(
            f"{folder}: shards of jobs that were divided into {' and '.join(map(str, counts))}; delete those of one"
        )
    if absent := sorted(set(range(1, counts[0] + 1)) - {shard["shard"] for shard in shards}):
        raise LongslideError(f"{output}: shard {', '.join(map(str, absent))} of {counts[0]} is missing: run it")
    first, *others = shards
    for other in others:
        names = first["made_with"].keys() | other["made_with"].keys()
        ways = [
            f"{name} {other['made_with'].get(name)} instead of {first['made_with'].get(name)}"
            for name in sorted(names)
            if other["made_with"].get(name) != first["made_with"].get(name)
        ]
        if ways:
            raise LongslideError(
                f"{output}: shard {other['shard']} was made otherwise than shard {first['shard']} ({'; '.join(ways)}); "
                "run it again with --overwrite"
            )
    again = "run all shards again, over one list: what is done is skipped"
    shard_of: dict[str, int] = {}
    for shard in shards:
        twice = [slide_id for slide_id in shard["slides"] if slide_id in shard_of]
        if twice:
            also = shard_of[twice[0]]
            raise LongslideError(
                f"{output}: {_named(twice)} in shard {also} and in shard {shard['shard']}: the list of slides was "
                f"another one; {again}"
            )
        shard_of |= dict.fromkeys(shard["slides"], shard["shard"])
    for other in others:
        if other["listed"] != first["listed"]:
            raise LongslideError(
                f"{output}: the list of slides of shard {other['shard']} was not that of shard {first['shard']}: slides "
                f"came, went or changed in size in between; {again}"
            )
    return shards


def _named(slides: Sequence[str]) -> str:
    more = len(slides) - NAMED
    return ", ".join(slides[:NAMED]) + (f" and {more} more" if more > 0 else "")

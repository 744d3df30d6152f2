"""The JSON of a predicted slide: what was predicted, of which file, by which checkpoints, from which features."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...data.features.features import Features
from ...data.slides.identity import SlideIdentity
from ...data.slides.slide_table import SlideEntry
from ...data.whole_file import write_whole
from ...errors import LongslideError, refuse_newer
from ...task import Task
from ...version import SOFTWARE
from ..batch.result import SlideResult
from .prediction import Prediction

SCHEMA = 1
"""Version of the JSON of a slide, in its key `schema`."""


def slide_json(
    entry: SlideEntry,
    identity: SlideIdentity,
    task: Task,
    checkpoints: Sequence[tuple[str, str]],
    features: Features,
    prediction: Prediction,
    result: SlideResult,
    explanation: dict[str, Any] | None,
) -> dict[str, Any]:
    """What is written of a slide that has been predicted, in plain types.

    Args:
        entry: The slide.
        identity: Its file.
        task: What is predicted.
        checkpoints: Path and digest of each.
        features: Its features; their embeddings are not asked for.
        prediction: What was predicted.
        result: How it ended.
        explanation: What `write_explanation` wrote, if it was explained.
    """
    return prediction.to_dict() | {
        "slide": entry.shown,
        "slide_file": asdict(identity),
        "task": task.to_dict(),
        "checkpoints": [{"path": source, "digest": digest} for source, digest in checkpoints],
        "quality": {
            "tiles": result.tiles,
            "bad_tiles": result.bad_tiles,
            "blurred_tiles": result.blurred_tiles,
            "tissue_mm2": result.tissue_mm2,
            "slide_mpp": result.slide_mpp,
            "mpp_source": result.mpp_source,
            "tile_px": features.tile_px,
            "tile_mpp": features.tile_mpp,
            "overlap": features.overlap,
            "tile_encoder": features.encoder,
            "tile_weights": features.weights,
        },
        "features": result.features,
        "explanation": explanation,
        "schema": SCHEMA,
        "software": SOFTWARE,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def ways_unlike(content: dict[str, Any], entry: SlideEntry, method: str | None) -> list[str]:
    """In which ways a slide's JSON is not of this slide, explained by this method; without an explanation it may get one."""
    explained = explained_by(content)
    # Earlier versions recorded the path of the slide alone.
    of_slide = SlideIdentity(**content.get("slide_file", {"path": content["slide"]}))
    ways = [] if (mismatch := of_slide.mismatch(entry.path)) is None else [mismatch]
    if None not in (explained, method) and explained != method:
        ways.append(f"explain {explained} instead of {method}")
    return ways


def explained_by(content: dict[str, Any]) -> str | None:
    """The method by which the prediction of a slide's JSON is explained, if it is."""
    method: str | None = (content.get("explanation") or {}).get("method")
    return method


def result_of(entry: SlideEntry, content: dict[str, Any]) -> SlideResult:
    """How a slide ended of which an earlier run wrote this JSON."""
    quality = content["quality"]
    return SlideResult(
        entry.slide_id,
        entry.shown,
        "done",
        "already complete",
        tiles=quality["tiles"],
        bad_tiles=quality["bad_tiles"],
        blurred_tiles=quality.get("blurred_tiles"),  # not in the files of earlier versions
        slide_mpp=quality["slide_mpp"],
        mpp_source=quality["mpp_source"],
        tile_mpp=quality["tile_mpp"],
        tissue_mm2=quality["tissue_mm2"],
        features=content["features"],
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON; it appears under its name only when complete.

    Raises:
        LongslideError: It cannot be written.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON of a slide.

    Raises:
        LongslideError: It is not one, or of a newer Longslide.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LongslideError(
            f"{path}: cannot be read as JSON ({error}); delete it and predict the slide again"
        ) from error
    if not isinstance(content, dict) or "schema" not in content:
        raise LongslideError(f"{path}: not the prediction of a slide; delete it, or choose another --output")
    refuse_newer(path, content["schema"], SCHEMA)
    if "level0_mpp" in content.get("quality", {}):  # its name in earlier versions
        content["quality"]["slide_mpp"] = content["quality"].pop("level0_mpp")
    return content

"""The contact sheet of a cohort, `qc/index.html`: the quality-control pictures of all slides, oddest first."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ...data.table import decimal_point, read_rows
from ...plurals import count
from ..batch.ledger import SUMMARY

MAX_PICTURES = 400
"""Pictures on the sheet; of a larger cohort the oddest slides are shown."""

THUMBNAIL_PX = 420

REMARKED = 3.0
"""Oddness of a slide with a remark or unreadable tiles: that of one which is three deviations from the others."""

# Deviations are taken for at least this large: in an even cohort every little difference would be odd.
_LEAST_DEVIATION = {"tissue": 0.3, "blur": 0.02, "left out": 0.03, "too blurred": 0.03}


@dataclass(frozen=True)
class Oddity:
    """How unlike the others a slide is.

    Attributes:
        score: 0 is as most are; infinite where there is no feature file.
        why: What is odd about it, worst first; empty when nothing is.
    """

    score: float
    why: tuple[str, ...]


def oddities(rows: Sequence[dict[str, str]]) -> list[Oddity]:
    """How odd each slide of a cohort is: the largest of its deviations from the cohort's median.

    Compared are the logarithm of the tissue's area, the median blur of the tiles, the share that was left out as ink or
    artefact, and the share of tiles that was too blurred; in robust standard deviations (1.4826 times the median absolute
    deviation).

    Args:
        rows: The rows of `summary.csv`.
    """
    tissue, left_out = _numbers(rows, "tissue_mm2"), np.nan_to_num(_numbers(rows, "left_out_mm2"))
    tiles, blurred = _numbers(rows, "tiles"), np.nan_to_num(_numbers(rows, "blurred_tiles"))
    with np.errstate(divide="ignore", invalid="ignore"):
        measures = {
            "tissue": np.where(tissue > 0, np.log(tissue), np.nan),
            "blur": _numbers(rows, "blur"),
            "left out": left_out / (tissue + left_out),
            "too blurred": blurred / (tiles + blurred),
        }
    said = {
        "tissue": lambda i: f"{tissue[i]:.3g} mm² of tissue, median {np.nanmedian(tissue):.3g}",
        "blur": lambda i: f"blur {measures['blur'][i]:.2f}, median {np.nanmedian(measures['blur']):.2f}",
        "left out": lambda i: f"{measures['left out'][i]:.0%} left out as ink or artefact",
        "too blurred": lambda i: f"{measures['too blurred'][i]:.0%} of tiles too blurred",
    }
    deviations = {name: _deviations(values, _LEAST_DEVIATION[name]) for name, values in measures.items()}
    for name in ("left out", "too blurred"):
        deviations[name] = np.maximum(deviations[name], 0)  # less than others is nothing to look at
    found = []
    for i, row in enumerate(rows):
        reasons = [(abs(values[i]), said[name](i)) for name, values in deviations.items() if abs(values[i]) >= REMARKED]
        if bad := int(row.get("bad_tiles") or 0):
            reasons.append((REMARKED, count(bad, "unreadable tile")))
        if row["status"] != "done":
            reasons.append((math.inf, f"{row['status']}: {row['reason']}"))
        elif remark := row["reason"].removeprefix("already complete").strip("; "):
            reasons.append((REMARKED, remark))
        reasons.sort(key=lambda reason: -reason[0])
        score = max([*(abs(values[i]) for values in deviations.values()), *(score for score, _ in reasons)])
        found.append(Oddity(float(score), tuple(text for _, text in reasons)))
    return found


def write_contact_sheet(output: Path) -> Path | None:
    """Write `qc/index.html` of an output folder from its `summary.csv` and the pictures in `qc/`.

    Args:
        output: The output folder of `embed`.

    Returns:
        The page; None when no slide has a row.

    Raises:
        LongslideError: It cannot be written.
    """
    from ..report.page import Page, Table

    rows = read_rows(output / SUMMARY)
    if not rows:
        return None
    found = oddities(rows)
    order = sorted(range(len(rows)), key=lambda i: (-found[i].score, rows[i]["slide_id"]))
    slides = [
        {
            "id": rows[i]["slide_id"],
            "uri": _thumbnail(output / "qc" / f"{rows[i]['slide_id']}.jpg"),
            "why": found[i].why,
            "facts": _facts(rows[i]),
        }
        for i in order[:MAX_PICTURES]
    ]
    done = sum(row["status"] == "done" for row in rows)
    odd = sum(bool(one.why) for one in found)
    tissue, blur = (_numbers(rows, name) for name in ("tissue_mm2", "blur"))
    page = Page("Quality control", "The oddest slides come first; a click shows the large picture")
    page.facts(
        [
            ("Embedded", f"{done:,}", f"of {len(rows):,}"),
            ("To look at", f"{odd:,}", "slides that are odd"),
            ("Tissue", _median(tissue, "{:.3g} mm²"), "median of a slide"),
            ("Blur", _median(blur, "{:.2f}"), "median; 0 sharp, 1 blurred"),
        ]
    )
    page.note(
        "Odd is what lies three robust standard deviations or more from the cohort's median in tissue area (its logarithm),",
        "in median blur, or in the share left out as ink or artefact or as too blurred; what has a remark or unreadable",
        "tiles; and, first of all, what was not embedded. The pictures are in figures/ too, as SVG and PDF, and what they",
        "show as CSV and GeoJSON.",
        "" if len(rows) <= MAX_PICTURES else f"The {MAX_PICTURES} oddest are shown; all are in {SUMMARY}.",
    )
    page.style("contact_sheet.css")
    page.template("contact_sheet.html", slides=slides)
    if len(rows) > MAX_PICTURES:
        rest = [[rows[i]["slide_id"], "; ".join(found[i].why)] for i in order[MAX_PICTURES:] if found[i].why]
        page.table(Table(["slide", "why"], [list(row) for row in rest], []) if rest else None)
    return page.write(output / "qc" / "index.html")


def _numbers(rows: Sequence[dict[str, str]], column: str) -> np.ndarray:
    return np.array([float(decimal_point(row.get(column) or "nan")) for row in rows])


def _deviations(values: np.ndarray, least: float) -> np.ndarray:
    """Robust deviations from the median; 0 where there is no value."""
    known = values[np.isfinite(values)]
    if not len(known):
        return np.zeros(len(values))
    median = np.median(known)
    scale = max(1.4826 * float(np.median(np.abs(known - median))), least)
    return np.asarray(np.nan_to_num((values - median) / scale, nan=0.0, posinf=0.0, neginf=0.0))


def _median(values: np.ndarray, text: str) -> str:
    known = values[np.isfinite(values)]
    return text.format(np.median(known)) if len(known) else "not known"


def _facts(row: dict[str, str]) -> str:
    texts = (("tissue_mm2", "{:.3g} mm²"), ("tiles", "{:,.0f} tiles"), ("blur", "blur {:.2f}"))
    return ", ".join(text.format(float(decimal_point(row[name]))) for name, text in texts if row.get(name))


def _thumbnail(path: Path) -> str:
    """A small copy of a picture as a data URI; empty where there is none."""
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (THUMBNAIL_PX, THUMBNAIL_PX))  # decoded at a fraction of its size
            picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
            content = io.BytesIO()
            picture.convert("RGB").save(content, format="JPEG", quality=75)
    except OSError:
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()

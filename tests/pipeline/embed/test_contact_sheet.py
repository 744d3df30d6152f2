"""The contact sheet shows every slide of a cohort, the oddest first, on one page that needs nothing else."""

import csv
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from classifier_files import ENCODER
from longslide import embed, read_features
from longslide.pipeline.batch.result import SlideResult
from longslide.pipeline.embed.contact_sheet import MAX_PICTURES, oddities, write_contact_sheet
from PIL import Image


def row(slide_id: str, **content: Any) -> dict[str, str]:
    plain = {"status": "done", "reason": "", "tiles": 1000, "tissue_mm2": 100, "left_out_mm2": 0, "blur": 0.3}
    return {"slide_id": slide_id} | {name: str(value) for name, value in (plain | content).items()}


COHORT = [row(f"plain{i}", tissue_mm2=80 + 3 * i, blur=0.28 + 0.004 * i) for i in range(12)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"tissue_mm2": 1.5}, "1.5 mm² of tissue, median 95"),
        ({"blur": 0.52}, "blur 0.52, median 0.30"),
        ({"left_out_mm2": 60}, "38% left out as ink or artefact"),
        ({"blurred_tiles": 400}, "29% of tiles too blurred"),
        ({"bad_tiles": 3}, "3 unreadable tiles"),
        ({"reason": "level 1 is unreadable"}, "level 1 is unreadable"),
        ({"status": "failed", "reason": "a.svs: truncated"}, "failed: a.svs: truncated"),
        (
            {"status": "skipped", "reason": "no tissue found", "tiles": 0, "tissue_mm2": 0, "blur": ""},
            "no tissue found",
        ),
    ],
    ids=["tissue", "blur", "ink", "blurred tiles", "unreadable", "remark", "failed", "no tissue"],
)
def test_what_is_unlike_the_cohort_is_odd_and_says_why(content: dict[str, Any], said: str) -> None:
    found = oddities([*COHORT, row("odd", **content)])
    assert said in "; ".join(found[-1].why)
    assert all(other.why == () and other.score < found[-1].score for other in found[:-1])


def test_slides_that_were_not_embedded_come_before_all_others() -> None:
    found = oddities([*COHORT, row("small", tissue_mm2=0.001), row("failed", status="failed", reason="broken")])
    assert found[-1].score > found[-2].score > 3


def test_an_even_cohort_and_one_slide_alone_have_nothing_odd() -> None:
    assert not any(one.why for one in oddities(COHORT))
    assert oddities([row("alone", reason="already complete")])[0].why == ()


def summary(folder: Path, rows: list[dict[str, str]]) -> None:
    with (folder / "summary.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({name for one in rows for name in one}))
        writer.writeheader()
        writer.writerows(rows)


def test_the_oddest_slides_come_first_and_those_beyond_the_most_are_named(tmp_path: Path) -> None:
    many = [row(f"s{i:04}", tissue_mm2=90 + i % 20) for i in range(MAX_PICTURES + 20)]
    odd = [row("tiny", tissue_mm2=0.1), row("smudged", left_out_mm2=80), row("gone", status="failed", reason="gone")]
    summary(tmp_path, [*many, *odd])
    page = write_contact_sheet(tmp_path)
    assert page is not None
    text = page.read_text()
    places = [text.index(f"<b>{name}</b>") for name in ("gone", "tiny", "smudged", "s0000")]
    assert places == sorted(places)
    assert text.count("<figure") == MAX_PICTURES
    assert f"The {MAX_PICTURES} oddest are shown" in text


def test_ids_and_reasons_cannot_write_into_the_page(tmp_path: Path) -> None:
    summary(tmp_path, [row("<script>alert(1)</script>", reason="<img src=x onerror=alert(1)>")])
    text = (write_contact_sheet(tmp_path) or tmp_path).read_text()
    assert "<script>alert" not in text
    assert "<img src=x" not in text


def test_embed_leaves_a_sheet_and_what_ink_covers_is_drawn_and_recorded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    picture = np.full((900, 1200, 3), (243, 241, 244), float)
    noise = cv2.GaussianBlur(rng.normal(size=(900, 1200)), (0, 0), 2)
    tissue = np.zeros((900, 1200), np.uint8)
    cv2.ellipse(tissue, (600, 450), (330, 240), 10, 0, 360, 1, -1)
    nuclei = np.clip(0.35 + 0.2 * noise / noise.std(), 0.05, 1)[..., None]
    stained = 243 * 10 ** -(nuclei * [0.65, 0.7, 0.29] + (1 - nuclei) * 0.3 * np.array([0.07, 0.99, 0.35]))
    picture = np.where(tissue[..., None] > 0, stained, picture)
    cv2.ellipse(picture, (600, 450), (520, 390), 0, 0, 300, (30, 130, 80), 26)
    picture = cv2.GaussianBlur(picture + rng.normal(0, 1, picture.shape), (0, 0), 0.6).clip(0, 255).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "inked.png")
    (tmp_path / "tiny.yaml").write_text(ENCODER)
    [result] = embed(
        tmp_path / "inked.png",
        tmp_path / "out",
        tile_encoder=str(tmp_path / "tiny.yaml"),
        tile_checkpoint="random",
        slide_mpp=8.0,
        tile_mpp=8.0,
        device="cpu",
    )
    assert isinstance(result, SlideResult)
    ring = np.pi * 2 * np.sqrt((520**2 + 390**2) / 2) * 26 * 300 / 360 * 0.008**2
    assert result.left_out_mm2 == pytest.approx(ring, rel=0.35)  # with its soft rim
    assert "ink" in read_features(result.features or "").settings["left_out_mm2"]
    drawn = np.asarray(Image.open(tmp_path / "out" / "qc" / "inked.jpg").convert("RGB")).astype(int)[:900]
    yellow = (drawn[..., 0] > 180) & (drawn[..., 2] < 110) & (drawn[..., 1] > 140)
    on_ink = cv2.dilate((picture[..., 0] < 120).astype(np.uint8), np.ones((15, 15))) > 0
    assert yellow[on_ink & (tissue == 0)].mean() > 0.015
    assert yellow[~on_ink].mean() < 0.002
    sheet = (tmp_path / "out" / "qc" / "index.html").read_text()
    assert 'href="inked.jpg"' in sheet
    assert "data:image/jpeg;base64," in sheet

"""Every message of docs/troubleshooting.md is what the software says when it fails in that way."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import huggingface_hub
import pandas as pd
import pytest
import tifffile
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from longslide import (
    DataOptions,
    LongslideError,
    create_tile_encoder,
    fit,
    open_slide,
    read_features,
    write_features,
    write_synthetic_slide,
)
from longslide.data.slides.slide_table import find_slides
from longslide.models.slide_encoder.encoder import SlideEncoder
from longslide.models.slide_encoder.spec import load_longnet_spec
from longslide.pipeline.batch.one_job import one_job
from longslide.pipeline.seen import Seen
from PIL import Image
from training_cohort import write_cohort

PAGE = (Path(__file__).parent.parent / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)
"""`…` stands for what differs from one time to the next."""


def without_mpp(_: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (64, 64)).save("a.png")
    with open_slide("a.png") as slide:
        _ = slide.mpp


def gated(patch: pytest.MonkeyPatch) -> None:
    refused = GatedRepoError("403 Client Error", response=MagicMock(status_code=403, headers={}))
    patch.setattr(huggingface_hub, "hf_hub_download", MagicMock(side_effect=refused))
    create_tile_encoder("uni")


def without_internet(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(huggingface_hub, "hf_hub_download", MagicMock(side_effect=LocalEntryNotFoundError("offline")))
    create_tile_encoder("uni")


def no_slide(_: pytest.MonkeyPatch) -> None:
    Path("a.svs").write_text("<html>404</html>")
    open_slide("a.svs")


def damaged(_: pytest.MonkeyPatch) -> None:
    path = write_synthetic_slide("a.svs", size=(1024, 1024))
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    with path.open("r+b") as file:
        for offset, count in places[len(places) // 3 : len(places) // 2]:
            file.seek(offset)
            file.write(bytes(count))
    with open_slide(path) as slide:
        list(slide.tiles(mpp=0.5, px=128))


def equal_names(_: pytest.MonkeyPatch) -> None:
    for folder in "ab":
        Path(folder).mkdir()
        write_synthetic_slide(f"{folder}/1.svs", size=(256, 256))
    find_slides(["a", "b"])


def mixed(_: pytest.MonkeyPatch) -> None:
    train(lambda features: replace(features, tile_px=512))


def one_class(_: pytest.MonkeyPatch) -> None:
    train(label="negative")


def too_little_memory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("lightning.Trainer.fit", MagicMock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    train()


def train(change: Callable = lambda features: features, label: str | None = None) -> None:
    """Train on a cohort in which the first slide's features, or all labels, were changed."""
    write_cohort(Path(), 12)
    first = Path("features/s0.h5")
    changed = change(read_features(first))
    first.unlink()
    write_features(first, changed)
    table = pd.read_csv("cohort.csv")
    table.assign(label=label or table["label"]).to_csv("cohort.csv", index=False)
    fit(DataOptions("features", "cohort.csv", task="binary", workers=0), trainer={"accelerator": "cpu"})


def leak(_: pytest.MonkeyPatch) -> None:
    Seen(True, {"patients": ["P1"]}, frozenset(), frozenset({"P1"})).refuse("runs/abmil/best.ckpt")


def one_cell(_: pytest.MonkeyPatch) -> None:
    spec = replace(load_longnet_spec("gigapath"), layers=1, width=16, heads=2, ffn_width=16, tile_dim=8)
    SlideEncoder(spec)(torch.randn(1, 3, 8), torch.zeros(1, 3, 2, dtype=torch.int64))


def another_job(_: pytest.MonkeyPatch) -> None:
    with one_job(Path(), {"tile_px": 256}), one_job(Path(), {"tile_px": 224}):
        pass


FAILURES = [
    without_mpp,
    gated,
    without_internet,
    no_slide,
    damaged,
    equal_names,
    mixed,
    too_little_memory,
    one_class,
    leak,
    one_cell,
    another_job,
]
"""In the order of the page."""


@pytest.mark.parametrize(
    ("message", "failure"), zip(MESSAGES, FAILURES, strict=True), ids=lambda one: getattr(one, "__name__", "")
)
def test_a_failure_says_what_the_page_says(
    message: str, failure: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pattern = ".+".join(map(re.escape, message.split("…")))
    with pytest.raises(LongslideError) as said:
        failure(monkeypatch)
    assert re.fullmatch(pattern + (".*" if message.endswith("…") else ""), str(said.value), re.DOTALL), said.value

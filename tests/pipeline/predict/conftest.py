"""Slides, their features and a classifier of them, for all tests of predictions."""

from pathlib import Path
from typing import Any

import pytest
from classifier_files import ENCODER, write_classifier
from longslide import embed, write_synthetic_slide


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`slides/` a, b, c; their `features/`; the tile encoder `tiny.yaml`; a classifier `best.ckpt`."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "tiny.yaml").write_text(ENCODER)
    (folder / "slides").mkdir()
    for seed, name in enumerate(("a.svs", "b.svs", "c.tif")):
        write_synthetic_slide(folder / "slides" / name, size=(1024, 768), seed=seed)
    embed([folder / "slides"], folder / "features", str(folder / "tiny.yaml"), tile_checkpoint="random", device="cpu")
    write_classifier(folder / "best.ckpt", folder / "features")
    return folder


@pytest.fixture
def job(home: Path, tmp_path: Path) -> dict[str, Any]:
    """Arguments of a prediction from existing features."""
    return {
        "slides": [home / "slides"],
        "checkpoint": str(home / "best.ckpt"),
        "output": tmp_path / "results",
        "features": home / "features",
        "device": "cpu",
        "threads": 2,
    }

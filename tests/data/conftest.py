"""Small cohorts on the disk."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from longslide.data.features.feature_file import write_features
from longslide.data.features.features import Features


def write_slide(folder: Path, slide_id: str, tiles: int = 12, dim: int = 6, seed: int = 0, **more: Any) -> Path:
    """A feature file whose tiles lie row by row in a block five wide."""
    folder.mkdir(exist_ok=True)
    number = np.arange(tiles)
    content: dict[str, Any] = {
        "features": np.random.default_rng(seed).normal(size=(tiles, dim)).astype(np.float16),
        "coords": np.stack([number % 5, number // 5], axis=1) * 512,
        "step_level0": 512,
        "encoder": "uni2-h",
        "weights": "sha256:1",
        "tile_mpp": 0.5,
        "tile_px": 256,
        "overlap": 0,
        "slide_mpp": 0.25,
        "settings": {"min_tissue": 0.1},
    } | more
    path = folder / f"{slide_id}.h5"
    write_features(path, Features(slide_id=slide_id, **content))
    return path


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    frame = pd.DataFrame(rows)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False)
    return path


@pytest.fixture
def slide(tmp_path: Path) -> Callable[..., Path]:
    """Writes one feature file into `tmp_path/features`."""
    return lambda slide_id, **options: write_slide(tmp_path / "features", slide_id, **options)


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes a table into `tmp_path`."""

    def write(rows: Iterable[dict[str, Any]], name: str = "cohort.csv") -> Path:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        return write_rows(tmp_path / name, rows)

    return write


@pytest.fixture
def cohort(tmp_path: Path, slide: Callable[..., Path], rows: Callable[..., Path]) -> Callable[..., tuple[Path, Path]]:
    """Writes patients with two slides each, and a table with one column a keyword: a function of the patient's number."""

    def write(patients: int, slides: int = 2, **columns: Callable[[int], Any]) -> tuple[Path, Path]:
        table = []
        for patient in range(patients):
            for number in range(slides):
                name = f"p{patient}-{number}"
                slide(name, tiles=6 + (7 * patient + 5 * number) % 23, seed=2 * patient + number)
                table.append(
                    {"slide_id": name, "patient_id": f"p{patient}"} | {key: f(patient) for key, f in columns.items()}
                )
        return rows(table), tmp_path / "features"

    return write

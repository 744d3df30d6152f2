"""A cohort of small feature files whose class a tile or two give away."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from longslide.data.features.feature_file import write_features
from longslide.data.features.features import Features

BINARY = ["--config", "abmil", "--data.task", "binary", "--trainer.max_epochs", "3", "--model.aggregator.width", "32"]
"""Words of a short training."""


def write_cohort(
    folder: Path,
    slides: int = 40,
    *,
    seed: int = 0,
    encoder: str = "toy",
    dim: int = 6,
    slides_a_patient: int = 1,
    site: str = "",
) -> list[str]:
    """`features/` and `cohort.csv` with binary, ordinal, multilabel, regression and survival targets; `site` begins all ids.

    Returns the options that train on them.
    """
    rng = np.random.default_rng(seed)
    (folder / "features").mkdir(parents=True)
    rows = []
    for i in range(slides):
        patient = i // slides_a_patient
        grade = patient % 3
        draws = np.random.default_rng([seed, patient])  # what a patient has, all its slides have
        tiles = int(rng.integers(5, 20))
        features = rng.normal(size=(tiles, dim)).astype(np.float32)
        features[: 1 + tiles // 4, 0] += 3 * grade
        coords = 512 * np.stack([np.arange(tiles) % 5, np.arange(tiles) // 5], 1)
        write_features(
            folder / "features" / f"{site}s{i}.h5",
            Features(
                slide_id=f"{site}s{i}",
                features=features,
                coords=coords,
                step_level0=512,
                tile_size_level0=512,
                tile_px=256,
                overlap=0,
                tile_mpp=0.5,
                slide_mpp=0.25,
                level0_size=(9000, 9000),
                encoder=encoder,
                weights=f"{encoder} weights",
                precision="float32",
                tissue='{"type": "FeatureCollection", "features": []}',
                tissue_method="otsu",
                slide_embedding=features.mean(0),
                slide_encoder="toy slide encoder",
                slide_weights="toy",
                pool="mean",
                settings={"min_tissue": 0.1},
            ),
        )
        rows.append(
            {
                "slide_id": f"{site}s{i}",
                "patient_id": f"{site}p{patient}",
                "label": ["negative", "positive"][grade > 0],
                "grade": ["low", "middle", "high"][grade],
                "mutated": "" if patient % 5 == 0 else int(grade > 0),
                "metastatic": int(draws.random() < 0.5),
                "score": round(grade + 0.1 * float(draws.normal()), 3),
                "months": round(float(draws.exponential(20 / (1 + grade))) + 0.1, 1),
                "died": int(draws.random() < 0.8),
            }
        )
    pd.DataFrame(rows).to_csv(folder / "cohort.csv", index=False)
    return ["--data.table", f"{folder}/cohort.csv", "--data.features", f"{folder}/features", "--data.workers", "0"]


def quick(folder: Path, *words: str) -> Sequence[str]:
    """Options of a run of a second or two in `folder`."""
    return [
        *("--run", str(folder)),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        *words,
    ]

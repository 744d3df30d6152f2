"""Predictions with a known truth."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest


@pytest.fixture
def binary_predictions() -> Callable[..., pd.DataFrame]:
    """Normal scores, `separation` standard deviations apart: the true AUROC is Phi(separation / sqrt(2))."""

    def make(
        n: int, separation: float, *, seed: int = 0, folds: int = 1, slides: int = 0, noise_seed: int | None = None
    ) -> pd.DataFrame:
        random = np.random.default_rng(seed)
        target = random.random(n) < 0.4
        if noise_seed is not None:  # other scores of the same patients
            random = np.random.default_rng([seed, noise_seed])
        score = separation * (target - 0.5) + random.normal(size=n)
        probability = 1 / (1 + np.exp(-separation * score - np.log(0.4 / 0.6)))
        patients = pd.DataFrame(
            {
                "level": "patient",
                "fold": np.arange(n) % folds,
                "part": "test",
                "patient_id": [f"p{i:04d}" for i in range(n)],
                "slide_id": "",
                "target": np.where(target, "tumour", "healthy"),
                "prediction": np.where(probability >= 0.5, "tumour", "healthy"),
                "probability_healthy": 1 - probability,
                "probability_tumour": probability,
            }
        )
        parts = [patients.assign(level="slide", slide_id=patients["patient_id"] + f"-{s}") for s in range(slides)]
        return pd.concat([patients, *parts], ignore_index=True)

    return make

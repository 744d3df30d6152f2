"""Run folders written by hand, in the format that training leaves; figures whose letters are cut out once."""

import io
import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from longslide.task import Task

TASKS = {
    "binary": Task("binary", ("status",), ("healthy", "tumour")),
    "multiclass": Task("multiclass", ("subtype",), ("LUAD", "LUSC", "SCLC", "carcinoid")),
    "ordinal": Task("ordinal", ("grade",), ("1", "2", "3")),
    "multilabel": Task("multilabel", ("EGFR", "KRAS", "ALK"), ("EGFR", "KRAS", "ALK")),
    "regression": Task("regression", ("purity",)),
    "survival": Task("survival", ("months", "death"), times=(12, 24, 36)),
}


@pytest.fixture(scope="session", autouse=True)
def fonts_cut_once() -> None:
    """For each PDF matplotlib cuts the letters it holds out of their font: a third of the time of a short training.

    Here they are cut once for all, with the letters of the figures before.
    """
    from matplotlib.backends import _backend_pdf_ps as backend

    cut, as_file, fonts, letters = backend.get_glyphs_subset, backend.font_as_file, {}, {}

    def cut_once(font: Any, glyphs: Iterable[Any]) -> Any:
        if isinstance(glyphs, str):  # matplotlib before 3.11
            return cut(font, glyphs)
        known = letters.setdefault(str(font), set())
        known |= set(glyphs)
        key = (str(font), frozenset(known))
        if key not in fonts:
            with cut(font, set(known)) as made:
                fonts[key] = SimpleNamespace(font=as_file(made.font).getvalue(), glyph_index_map=made.glyph_index_map)
        return nullcontext(fonts[key])

    backend.get_glyphs_subset = cut_once
    backend.font_as_file = lambda font: io.BytesIO(font) if isinstance(font, bytes) else as_file(font)


@pytest.fixture(scope="session")
def write_run() -> Callable[..., Path]:
    """A function that writes a run: `skill` is how much the scores know, 0 for nothing; patients and targets are the same
    for every `model_seed`."""
    return _write_run


def _write_run(
    folder: Path, kind: str = "binary", *, patients: int = 120, folds: int = 4, skill: float = 1.5, model_seed: int = 1
) -> Path:
    task = TASKS[kind]
    random, model = np.random.default_rng(0), np.random.default_rng([1, model_seed])
    slide_of = np.repeat(np.arange(patients), random.integers(1, 3, patients))
    patient_ids = np.array([f"patient-{i:03d}" for i in range(patients)])
    slide_ids = np.array([f"slide-{i:04d}" for i in range(len(slide_of))])
    truth = random.normal(size=patients)
    labels, frames = _labels(task, truth, random), []
    fold_of = np.arange(patients) % folds
    splits = pd.DataFrame({"slide_id": slide_ids, "patient_id": patient_ids[slide_of]})
    for fold in range(folds):
        own = fold_of[slide_of]
        validation = (own == (fold + 1) % folds) if folds > 1 else slide_of % 5 == 1
        splits[f"fold_{fold}"] = np.where(
            own == fold if folds > 1 else slide_of % 5 == 0, "test", np.where(validation, "val", "train")
        )
        part = splits[f"fold_{fold}"].to_numpy()
        score = skill * truth + model.normal(size=patients)
        for name in ("test", "val"):
            members = np.unique(slide_of[part == name])
            base = {"fold": fold, "part": name}
            predictions = _predictions(task, labels, score)
            ids = pd.DataFrame({"level": "patient", **base, "patient_id": patient_ids[members], "slide_id": ""})
            frames.append(pd.concat([ids, predictions.iloc[members].reset_index(drop=True)], axis=1))
            slides = np.flatnonzero(part == name)
            ids = pd.DataFrame(
                {"level": "slide", **base, "patient_id": patient_ids[slide_of[slides]], "slide_id": slide_ids[slides]}
            )
            frames.append(pd.concat([ids, predictions.iloc[slide_of[slides]].reset_index(drop=True)], axis=1))
    folder.mkdir(parents=True, exist_ok=True)
    pd.concat(frames).to_csv(folder / "predictions.csv", index=False)
    splits.to_csv(folder / "splits.csv", index=False)
    cohort = splits[["slide_id", "patient_id"]].copy()
    for column, values in labels.items():
        cohort[column] = values[slide_of]
    cohort["site"] = np.array(["Bergen", "Turin", "Wien & Graz <1>"])[slide_of % 3]
    cohort.to_csv(folder / "cohort.csv", index=False)
    epochs = np.arange(12)
    history = [
        pd.DataFrame(
            {
                "fold": fold,
                "epoch": epochs,
                "step": epochs * 30,
                "train_loss": np.exp(-epochs / 4) + 0.02 * model.normal(size=12),
                "val_loss": 0.3 + np.exp(-epochs / 3) + 0.02 * epochs + 0.03 * model.normal(size=12),
                "val_metric": 0.9 - 0.4 * np.exp(-epochs / 3),
                "learning_rate": 1e-4,
            }
        )
        for fold in range(folds)
    ]
    pd.concat(history).to_csv(folder / "history.csv", index=False)
    facts = {
        "task": task.to_dict(),
        "aggregator": {"name": "abmil", "options": {"width": 512}, "parameters": 525827},
        "seed": 0,
        "preprocessing": {"tile_encoder": "gigapath", "mpp": 0.5, "tile_px": 256, "overlap": 0},
        "without_features": ["slide-9001", "slide-9002"],
        "without_label": [],
        "notes": ["3 rows of the table have no label and are left out"],
        "versions": {"longslide": "0.1.0", "torch": "2.11.0"},
        "started": "2026-05-04T10:11:12+00:00",
        "seconds": 431.5,
    }
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "config.yaml").write_text("model:\n  aggregator: abmil\n  note: <script>alert('x')</script>\n")
    return folder


def _labels(task: Task, truth: np.ndarray, random: np.random.Generator) -> dict[str, np.ndarray]:
    n = len(truth)
    noisy = truth + 0.5 * random.normal(size=n)
    if task.kind == "multilabel":
        return {
            name: np.where(random.random(n) < 0.2, np.nan, (noisy + random.normal(size=n) > 0.5).astype(float))
            for name in task.classes
        }
    if task.kind == "regression":
        return {"purity": 0.5 + 0.2 * noisy}
    if task.kind == "survival":
        time, censored = random.exponential(30 * np.exp(-noisy)), random.uniform(10, 60, n)
        return {"months": np.minimum(time, censored).round(1) + 0.1, "death": (time <= censored).astype(int)}
    index = np.digitize(noisy, np.quantile(noisy, np.linspace(0, 1, len(task.classes) + 1)[1:-1]))
    return {task.label[0]: np.array(task.classes)[index]}


def _predictions(task: Task, labels: dict[str, np.ndarray], score: np.ndarray) -> pd.DataFrame:
    if task.kind == "multilabel":
        columns = {}
        for name in task.classes:
            probability = 1 / (1 + np.exp(-(score - 0.5)))
            columns |= {f"target_{name}": labels[name], f"prediction_{name}": (probability > 0.5).astype(int)}
            columns[f"probability_{name}"] = probability
        return pd.DataFrame(columns)
    if task.kind == "regression":
        return pd.DataFrame({"target": labels["purity"], "prediction": 0.5 + 0.12 * score})
    if task.kind == "survival":
        survival = {f"survival_{t:g}": np.exp(-t / 30 * np.exp(0.7 * score)) for t in task.times}
        return pd.DataFrame({"time": labels["months"], "event": labels["death"], "risk": score, **survival})
    target = labels[task.label[0]]
    centres = np.linspace(-1.5, 1.5, len(task.classes))
    logits = -((score[:, None] - centres) ** 2) * 1.2
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    predicted = np.array(task.classes)[probability.argmax(1)]
    named = {f"probability_{name}": probability[:, c] for c, name in enumerate(task.classes)}
    return pd.DataFrame({"target": target, "prediction": predicted, **named})

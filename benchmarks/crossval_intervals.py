"""How often intervals of a cross-validated AUROC cover what models so trained are worth, with and without signal.

    python benchmarks/crossval_intervals.py [--runs 1000] [--processes 16] [--quick]

Logistic regression on 20 features, 5 folds, 15% of each training part set aside as for validation. The truth is the mean
AUROC of the models on 4,000 other patients; without signal it is 0.5. Beside the mean over folds as in `metrics.csv` (the
jackknife over patients, times Nadeau and Bengio's factor) are that without the factor, Nadeau and Bengio's own t interval of
the fold values, and the AUROC of all folds pooled. Last, how often `compare` finds a difference (p < 0.05) between two
equally good models, in the mean and pooled.
"""

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")  # the processes are the threads

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from longslide.evaluation import compare_predictions  # noqa: E402
from longslide.evaluation.intervals import interval_of_auroc  # noqa: E402
from longslide.evaluation.scopes import score_scopes, select  # noqa: E402
from longslide.task import Task  # noqa: E402
from scipy.stats import t as student  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import roc_auc_score  # noqa: E402
from sklearn.model_selection import StratifiedKFold  # noqa: E402

TASK = Task("binary", ("y",), ("no", "yes"))
FEATURES, FOLDS, CHUNK = 20, 5, 25
CELLS = [(n, signal) for n in (60, 200) for signal in (0.0, 1.0, 2.5, 4.0)]
METHODS = ("mean, with training", "mean, patients only", "mean, t of folds", "pooled")


def draw(n: int, signal: float, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Features of two independent halves that are worth the same, `(n, 2 * FEATURES)`, and the class."""
    target = random.random(n) < 0.4
    features = random.normal(size=(n, 2 * FEATURES))
    for first in (0, FEATURES):
        features[:, first : first + 5] += signal * target[:, None] / np.sqrt(5)
    return features, target


def cross_validate(n: int, signal: float, random: np.random.Generator) -> tuple[list[pd.DataFrame], float]:
    """Predictions of a model of each half of the features, and the AUROC of the first ones elsewhere."""
    features, target = draw(n, signal, random)
    elsewhere, its_target = draw(4000, signal, random)
    tables: list[list[pd.DataFrame]] = [[], []]
    worth = []
    for fold, (rest, test) in enumerate(StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(features, target)):
        train = random.permutation(rest)[: int(0.85 * len(rest))]
        for half in range(2):
            columns = slice(half * FEATURES, (half + 1) * FEATURES)
            model = LogisticRegression(max_iter=100).fit(features[train, columns], target[train])
            probability = model.predict_proba(features[test, columns])[:, 1]
            name = np.array(TASK.classes)
            frame = {"level": "patient", "part": "test", "fold": fold, "patient_id": [f"{i:05d}" for i in test]}
            frame |= {"slide_id": "", "target": name[target[test].astype(int)]}
            frame |= {"prediction": name[(probability >= 0.5).astype(int)]}
            frame |= {"probability_no": 1 - probability, "probability_yes": probability}
            tables[half].append(pd.DataFrame(frame))
            if half == 0:
                worth.append(roc_auc_score(its_target, model.decision_function(elsewhere[:, columns])))
    return [pd.concat(parts, ignore_index=True) for parts in tables], float(np.mean(worth))


def simulate(
    n: int, signal: float, runs: int, seed: int
) -> tuple[list[dict[str, tuple[float, float]]], list[float], np.ndarray]:
    """The intervals of each run, what its models are worth, and how many differences were found in the mean and pooled."""
    intervals, worths, found = [], [], np.zeros(2)
    for run in range(runs):
        (first, second), worth = cross_validate(n, signal, np.random.default_rng([seed, run, n, int(10 * signal)]))
        scored = score_scopes(select(first, "patient"), TASK)
        mean, pooled = scored["mean"]["auroc"], scored["pooled"]["auroc"]
        positives = int((first["target"] == "yes").sum())
        alone = interval_of_auroc(mean.replicates, positives, n - positives)
        values = np.array([scored[f"fold_{fold}"]["auroc"].score.value for fold in range(FOLDS)])
        half = student.ppf(0.975, FOLDS - 1) * values.std(ddof=1) * np.sqrt(1 / FOLDS + 1 / (FOLDS - 1))
        ends = [mean.interval[:2], alone[:2], (values.mean() - half, values.mean() + half), pooled.interval[:2]]
        intervals.append(dict(zip(METHODS, ends, strict=True)))
        worths.append(worth)
        table = compare_predictions({"a": first, "b": second}, TASK)
        p = table[table["metric"] == "auroc"].set_index("scope")["p"]
        found += p["mean"] < 0.05, p["pooled"] < 0.05
    return intervals, worths, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="simulated cohorts a cell")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="100 cohorts a cell")
    arguments = parser.parse_args()
    runs, began = (100 if arguments.quick else arguments.runs), time.monotonic()
    jobs = [(n, s, min(CHUNK, runs - start), start) for n, s in CELLS for start in range(0, runs, CHUNK)]
    with ProcessPoolExecutor(arguments.processes) as pool:
        results = list(pool.map(simulate, *zip(*jobs, strict=True)))
    rows = []
    for n, signal in CELLS:
        of_cell = [result for job, result in zip(jobs, results, strict=True) if job[:2] == (n, signal)]
        truth = 0.5 if signal == 0 else float(np.mean([worth for _, worths, _ in of_cell for worth in worths]))
        row: dict[str, float] = {"patients": n, "signal": signal, "AUROC": truth}
        for method in METHODS:
            ends = np.array([one[method] for intervals, _, _ in of_cell for one in intervals])
            row[method] = float(((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean())
            row[f"width {method}"] = float((ends[:, 1] - ends[:, 0]).mean())
        row["differs, mean"], row["differs, pooled"] = np.sum([found for _, _, found in of_cell], 0) / runs
        rows.append(row)
    print(pd.DataFrame(rows).T.to_string(header=False, float_format=lambda value: f"{value:.3f}"))
    print(f"{runs} cohorts a cell, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()

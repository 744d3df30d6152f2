"""Is a calibration honest that is pooled over the folds of a cross-validation, and what does it bring?

    python benchmarks/crossval_calibration.py [--runs 60]

Logistic regression with balanced class weights on 20 features, prevalence 0.3, 5 folds, 15% of each training part set aside
for validation. Log-loss of the tested patients (`cv`) and of 4,000 others by the same models (`true`): not calibrated,
calibrated on the fold's own validation patients (none below 50), on those of all folds, and on those of all folds
without the patients that the fold tests, as `longslide crossval` does. A calibration is honest if its `cv` is no further
below `true` than without one.
"""

import argparse

import numpy as np
from longslide.evaluation.calibration import Calibration, fit_calibration
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

FEATURES, FOLDS = 20, 5
WAYS = ("none", "own", "all", "all untested")


def draw(n: int, signal: float, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Features `(n, FEATURES)` and the class."""
    target = random.random(n) < 0.3
    features = random.normal(size=(n, FEATURES))
    features[:, :5] += signal * target[:, None] / np.sqrt(5)
    return features, target


def log_loss(log_odds: np.ndarray, target: np.ndarray, by: Calibration) -> float:
    """Mean log-loss of calibrated log-odds."""
    probability = np.clip(expit(log_odds / by.temperature + by.intercept), 1e-12, 1 - 1e-12)
    return float(-np.where(target, np.log(probability), np.log1p(-probability)).mean())


def calibration(log_odds: np.ndarray, target: np.ndarray) -> Calibration:
    """What `longslide` fits."""

    def probability(by: Calibration) -> np.ndarray:
        positive = expit(log_odds / by.temperature + by.intercept)
        return np.stack([1 - positive, positive], 1)

    return fit_calibration(probability, target.astype(np.int64), len(target), intercept=True) or Calibration(1.0)


def cross_validate(n: int, signal: float, random: np.random.Generator) -> np.ndarray:
    """`(ways, 2)` log-loss in the cross-validation, and elsewhere."""
    (features, target), (others, their_target) = draw(n, signal, random), draw(4000, signal, random)
    folds = []
    for rest, test in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(features, target):
        val, train = np.split(random.permutation(rest), [int(0.15 * len(rest))])
        model = LogisticRegression(C=100, max_iter=200, class_weight="balanced").fit(features[train], target[train])
        folds.append((val, test, model.decision_function(features), model.decision_function(others)))
    losses = np.zeros((len(WAYS), 2))
    for own, test, log_odds, elsewhere in folds:
        parts = {
            "own": [(own, log_odds)],
            "all": [(val, given) for val, _, given, _ in folds],
            "all untested": [(np.setdiff1d(val, test), given) for val, _, given, _ in folds],
        }
        for way, name in enumerate(WAYS):
            by = Calibration(1.0)
            if name in parts:
                rows = np.concatenate([val for val, _ in parts[name]])
                by = calibration(np.concatenate([given[val] for val, given in parts[name]]), target[rows])
            losses[way] += log_loss(log_odds[test], target[test], by), log_loss(elsewhere, their_target, by)
    return losses / FOLDS


def main() -> None:
    """Print a row for each size and signal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60, help="simulated cohorts a cell")
    runs = parser.parse_args().runs
    print(f"{'patients':>8} {'signal':>6}" + "".join(f"  {name + ': cv':>16} {'true':>6} {'bias':>6}" for name in WAYS))
    for n in (60, 100, 200, 400):
        for signal in (0.0, 1.0, 2.5):
            each = np.mean([cross_validate(n, signal, np.random.default_rng([run, n])) for run in range(runs)], 0)
            cells = "".join(f"  {cv:16.3f} {true:6.3f} {cv - true:+6.3f}" for cv, true in each)
            print(f"{n:8} {signal:6}{cells}", flush=True)


if __name__ == "__main__":
    main()

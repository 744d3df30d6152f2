"""From how many validation patients on is a threshold better chosen on them (Youden) than taken from the loss?

    python benchmarks/thresholds.py [--runs 200]

Logistic regression, weakly regularised, on 20 features; a fifth of the patients outside the test part validates. Balanced
accuracy of 4,000 other patients at the threshold of the highest sensitivity + specificity in validation, at the share of
positives that the loss has seen (0.5 with balanced class weights), and at 0.5; mean and standard deviation over the runs.
"""

import argparse

import numpy as np
from longslide.evaluation.calibration import best_threshold
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

FEATURES = 20
WAYS = ("validation", "loss", "0.5")


def draw(n: int, prevalence: float, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Features `(n, FEATURES)` and the class, two of each at least."""
    target = np.arange(n) < max(2, round(prevalence * n))
    features = random.normal(size=(n, FEATURES))
    features[:, :5] += 1.5 * target[:, None] / np.sqrt(5)
    return features, target


def accuracies(n: int, prevalence: float, weights: str | None, random: np.random.Generator) -> list[float]:
    """Balanced accuracy by each way, of a model with `n` validation patients and four times as many to train on."""
    (features, target), (own, truth) = draw(4 * n, prevalence, random), draw(n, prevalence, random)
    others, their_truth = draw(4000, prevalence, random)
    model = LogisticRegression(C=1, max_iter=500, class_weight=weights).fit(features, target)
    validation, elsewhere = (expit(model.decision_function(each)) for each in (own, others))
    ways = best_threshold(truth, validation), 0.5 if weights else target.mean(), 0.5
    return [((elsewhere[their_truth] >= cut).mean() + (elsewhere[~their_truth] < cut).mean()) / 2 for cut in ways]


def main() -> None:
    """Print a row for each number of validation patients."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    runs = parser.parse_args().runs
    for weights in ("balanced", None):
        for prevalence in (0.5, 0.2, 0.1):
            for n in (6, 10, 20, 30, 50, 100, 200):
                random = np.random.default_rng([n, round(10 * prevalence)])
                found = np.array([accuracies(n, prevalence, weights, random) for _ in range(runs)])
                means = zip(WAYS, found.mean(0), found.std(0), strict=True)
                cells = ", ".join(f"{way} {mean:.3f} ({spread:.3f})" for way, mean, spread in means)
                print(f"class weights {weights}, prevalence {prevalence}, {n} validation patients: {cells}", flush=True)


if __name__ == "__main__":
    main()

"""How often the 95% intervals of every metric cover the truth, in cohorts of 20, 50 and 200 patients.

    python benchmarks/coverage.py [--runs 2000] [--processes 16] [--output coverage.csv] [--quick]

Simulated predictions with a known truth go through `Outcomes.interval`, the code behind `metrics.csv`. A cell should be
between 0.93 and 0.98; those outside are marked and listed at the end.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")  # the processes are the threads

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from longslide.evaluation.classification import Classes  # noqa: E402
from longslide.evaluation.intervals import Jackknife, Replicates  # noqa: E402
from longslide.evaluation.outcomes import Outcomes  # noqa: E402
from longslide.evaluation.regression import Values  # noqa: E402
from longslide.evaluation.survival import Survival  # noqa: E402
from scipy.special import expit, softmax  # noqa: E402
from scipy.stats import norm  # noqa: E402

LOW, HIGH = 0.93, 0.98
SIZES = (20, 50, 200)
CHUNK = 100

Make = Callable[[int, np.random.Generator], Outcomes]


class Scenario(NamedTuple):
    """A way to draw predictions: what is varied, the kind, and its parameters."""

    kind: str
    parameters: tuple[float, ...]

    @property
    def text(self) -> str:
        names = {
            "binary": "prevalence {:g}, AUROC {:g}",
            "spread": "prevalence {:g}, AUROC {:g}, positives 2.5 times as spread",
            "slides": "prevalence {:g}, AUROC {:g}, 3 slides per patient",
            "ordinal": "4 grades, noise {:g}",
            "regression": "R2 {:g}",
            "survival": "log hazard ratio {:g}, censoring at {:g} lives",
        }
        return names[self.kind].format(*self.parameters)


def scenarios() -> list[Scenario]:
    aurocs, prevalences = (0.5, 0.8, 0.95, 0.999), (0.1, 0.3, 0.5)
    return [
        *(Scenario("binary", (p, a)) for p in prevalences for a in aurocs),
        *(Scenario("spread", (p, a)) for p in (0.1, 0.5) for a in (0.8, 0.95)),
        *(Scenario("slides", (0.3, a)) for a in (0.8, 0.95)),
        *(Scenario("ordinal", (noise,)) for noise in (0.3, 1.0, 3.0)),
        *(Scenario("regression", (r2,)) for r2 in (0.05, 0.5, 0.9)),
        *(Scenario("survival", (b, c)) for b in (0.0, 0.7, 1.5, 3.0) for c in (0.5, 3.0)),
    ]


def draw(scenario: Scenario, n: int, random: np.random.Generator) -> tuple[Outcomes, np.ndarray]:
    """Predictions of n patients, and the patient of each row."""
    patients = np.arange(n)
    if scenario.kind in ("binary", "spread", "slides"):
        prevalence, auroc = scenario.parameters
        spread = 2.5 if scenario.kind == "spread" else 1.0
        distance = norm.ppf(auroc) * np.sqrt(1 + spread**2)
        of_patient = random.random(n) < prevalence
        own = random.normal(size=n)
        if scenario.kind == "slides":  # scores of a patient's slides correlate by a half
            patients = np.repeat(patients, 3)
            of_patient, own = of_patient[patients], np.sqrt(0.5) * (own[patients] + random.normal(size=3 * n))
        score = np.where(of_patient, spread, 1.0) * own + distance * of_patient
        # The true probability, if the spreads are equal and there is a signal; decided at the prevalence.
        probability = expit((distance or 1) * (score - distance / 2) + np.log(prevalence / (1 - prevalence)))
        if scenario.kind == "spread":
            probability = expit(score - distance / 2)
        decided = (score >= distance / 2).astype(np.int64)
        both = np.stack([1 - probability, probability], 1)
        return Classes(of_patient.astype(np.int64), decided, both, ("no", "yes")), patients
    if scenario.kind == "ordinal":
        latent, edges = random.normal(size=n), np.array([-0.8, 0.0, 0.8])
        seen = latent + scenario.parameters[0] * random.normal(size=n)
        probability = softmax(-4 * np.abs(seen[:, None] - np.array([-1.3, -0.4, 0.4, 1.3])), 1)
        target, decided = np.digitize(latent, edges), np.digitize(seen, edges)
        return Classes(target, decided, probability, ("1", "2", "3", "4"), ordinal=True), patients
    if scenario.kind == "regression":
        share = scenario.parameters[0]
        prediction = random.normal(size=n) * np.sqrt(share)
        return Values(prediction + random.normal(size=n) * np.sqrt(1 - share), prediction), patients
    ratio, follow_up = scenario.parameters
    risk = random.normal(size=n)
    life, loss = random.exponential(np.exp(-ratio * risk)), random.exponential(follow_up, n)
    times = np.array([0.1, 0.3])
    survival = np.exp(-times * np.exp(ratio * risk)[:, None])
    return Survival(np.minimum(life, loss), life <= loss, risk, survival, times), patients


def truth(scenario: Scenario) -> dict[str, float]:
    """The metrics of many patients (AUROC by its formula)."""
    random = np.random.default_rng(12345)
    size, times = (4000, 50) if scenario.kind == "survival" else (400_000, 1)
    found = [draw(scenario, size, random)[0].scores() for _ in range(times)]
    values = {metric: float(np.mean([one[metric].value for one in found])) for metric in found[0]}
    if scenario.kind in ("binary", "spread", "slides"):
        values["auroc"] = scenario.parameters[1]
    return values


def simulate(
    scenario: Scenario, n: int, runs: int, seed: int, known: dict[str, float]
) -> tuple[Scenario, int, dict[str, np.ndarray]]:
    """Of each metric: runs in which it is defined, with an interval, covered, of no width; the sum of the widths."""
    counts = {metric: np.zeros(5) for metric in known}
    for run in range(runs):
        outcomes, patients = draw(scenario, n, np.random.default_rng([seed, run]))
        scores = outcomes.scores()
        values = [outcomes.resampled(weights) for weights in Jackknife(patients).weights()]
        replicates = {
            metric: Replicates(np.concatenate([chunk[metric] for chunk in values]), score.value)
            for metric, score in scores.items()
        }
        for metric in counts:
            low, high, _ = outcomes.interval(metric, replicates, patients)
            there = bool(np.isfinite(low))
            counts[metric] += (
                np.isfinite(scores[metric].value),
                there,
                low - 1e-9 <= known[metric] <= high + 1e-9,
                there and high - low <= 1e-9,
                high - low if there else 0,
            )
    return scenario, n, counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000, help="simulated cohorts a cell")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--output", default="coverage.csv")
    parser.add_argument("--quick", action="store_true", help="200 cohorts a cell")
    parser.add_argument("--minutes", type=float, default=1e6, help="after these no more cohorts are simulated")
    parser.add_argument("--only", default="", help="kinds of scenario, separated by commas")
    arguments = parser.parse_args()
    runs = 200 if arguments.quick else arguments.runs
    began = time.monotonic()
    chosen = [one for one in scenarios() if not arguments.only or one.kind in arguments.only.split(",")]
    totals: dict[tuple[Scenario, int, str], np.ndarray] = {}
    with ProcessPoolExecutor(arguments.processes) as pool:
        truths = dict(zip(chosen, pool.map(truth, chosen), strict=True))
        jobs = [
            pool.submit(simulate, scenario, n, min(CHUNK, runs - start), start + 1, truths[scenario])
            for start in range(0, runs, CHUNK)  # every cell has as many cohorts as the others when the time is over
            for n in sorted(SIZES, reverse=True)
            for scenario in chosen
        ]
        try:
            for job in as_completed(jobs, max(1.0, 60 * arguments.minutes - (time.monotonic() - began))):
                scenario, n, counts = job.result()
                for metric, one in counts.items():
                    key = scenario, n, metric
                    totals[key] = totals.get(key, np.zeros(5)) + one
        except TimeoutError:
            done = sum(job.done() for job in jobs)
            print(f"the time is over after {done} of {len(jobs)} chunks of {CHUNK} cohorts")
            pool.shutdown(cancel_futures=True)
    rows = []
    for (scenario, n, metric), (defined, there, covered, empty, width) in totals.items():
        if there:
            rows.append(
                {
                    "metric": metric,
                    "patients": n,
                    "scenario": scenario.text,
                    "truth": truths[scenario][metric],
                    "coverage": covered / there,
                    "width": width / there,
                    "without": 1 - there / max(defined, 1),
                    "empty": int(empty),
                }
            )
    table = pd.DataFrame(rows).sort_values(["metric", "scenario", "patients"], kind="stable", ignore_index=True)
    table.to_csv(arguments.output, index=False)
    table["outside"] = np.where(table["coverage"] < LOW, "low", np.where(table["coverage"] > HIGH, "high", ""))
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    print(
        f"\n{len(table)} cells of {runs} cohorts at most in {time.monotonic() - began:.0f} s: "
        f"{(table['outside'] == '').sum()} from {LOW} to {HIGH}, {(table['outside'] == 'low').sum()} below, "
        f"{(table['outside'] == 'high').sum()} above; {table['empty'].sum()} intervals of no width"
    )
    low = table[table["outside"] == "low"]
    print(low.to_string(index=False, float_format=lambda value: f"{value:.3f}") if len(low) else "", file=sys.stderr)


if __name__ == "__main__":
    main()

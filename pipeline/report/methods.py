"""The methods paragraph of a paper, from what a run recorded: a sentence is written only of what is on record."""

from typing import TYPE_CHECKING, Any

import yaml

from ...evaluation.calibration import FEWEST_CALIBRATED
from ...plurals import count
from ...prediction_columns import survival_times, time_text
from ...task import CLASSIFICATION
from .run_folder import Run
from .wording import held_out, intervals_text, metric_name, task_text

if TYPE_CHECKING:
    import pandas as pd

METHODS = "methods.txt"
"""The paragraph as a file of the run folder."""

_PARTS = {"train": "training", "val": "validation", "test": "test"}


def methods_paragraph(run: Run, metrics: "pd.DataFrame") -> str:
    """What was done, for the methods section of a paper, with the items of TRIPOD+AI (Collins et al. 2024) that it answers.

    Args:
        run: The run.
        metrics: Its metrics, of the level that is reported.

    Returns:
        Sentences in about the order of the checklist, each group followed by the items that it answers in brackets.
    """
    content = yaml.safe_load(run.configuration) if run.configuration else None
    options = _without_grid(content) if isinstance(content, dict) else {}
    imbalance, calibration = _imbalance(options), _calibration(run)
    seen = [held_out(run.facts.get("seen"), run.noun("patient"))] if "seen" in run.facts else []
    groups = [
        ("11, 20a", _cohort(run)),
        ("7, 9b", _preprocessing(run.facts.get("preprocessing") or {})),
        ("8a", _outcome(run)),
        ("12a, 21", [*_splits(run, options.get("data") or {}), *seen]),
        ("12c", [*_selection(run), *_model(run, options), *([] if imbalance else calibration)]),
        ("13", [*imbalance, *calibration] if imbalance else []),
        ("15", _output(run)),
        ("12e", _performance(metrics)),
        ("12g", _software(run.facts)),
    ]
    written = [(item, " ".join(filter(None, sentences))) for item, sentences in groups]
    return " ".join(f"{text} [{item}]" for item, text in written if text)


def _without_grid(options: dict[str, Any]) -> dict[str, Any]:
    """The options without those that a sweep has chosen."""
    for name in options.get("grid") or {}:
        *groups, last = name.split(".")
        inner = options
        for group in groups:
            inner = inner.get(group) if isinstance(inner.get(group), dict) else {}  # type: ignore[assignment]
        inner.pop(last, None)
    return options


def _trained(run: Run) -> bool:
    return run.facts.get("command") in ("fit", "crossval", "sweep")


def _cohort(run: Run) -> list[str]:
    if run.cohort is None:
        return []
    of = f" of {count(run.cohort['patient_id'].nunique(), 'patient')}" if run.noun("patient") == "patient" else ""
    used = f"{count(len(run.cohort), 'slide')}{of} with features and a label were used"
    left = [
        f"{count(len(run.facts[key]), 'slide')} {what}"
        for key, what in (("without_features", "without features"), ("without_label", "without a label"))
        if run.facts.get(key)
    ]
    return [used + (f"; {' and '.join(left)} were left out" if left else "") + "."]


def _preprocessing(made: dict[str, Any]) -> list[str]:
    size = [
        text
        for text in (
            f"of {made['tile_px']} px" if "tile_px" in made else "",
            f"at {made['tile_mpp']:g} µm/px" if "tile_mpp" in made else "",
            f"with {made['overlap']} px of overlap" if "overlap" in made else "",
        )
        if text
    ]
    sentences = [f"Tiles were {' '.join(size)}."] if size else []
    if "min_tissue" in made:
        method = f" (tissue by {made['tissue_method']})" if "tissue_method" in made else ""
        sentences.append(f"Tiles with at least {made['min_tissue']:.0%} of tissue were kept{method}.")
    if made.get("max_blur", 1.0) < 1:
        sentences.append(f"Tiles with a blur effect (Crete et al., 2007) above {made['max_blur']:g} were left out.")
    for encoder, weights, what in (
        ("tile_encoder", "tile_weights", "Tiles"),
        ("slide_encoder", "slide_weights", "Slides"),
    ):
        if encoder in made:
            by = f" (weights: {made[weights]})" if weights in made else ""
            sentences.append(f"{what} were embedded by {made[encoder]}{by}.")
    if "precision" in made:
        sentences.append(f"The encoders ran in {made['precision']}.")
    return sentences


def _outcome(run: Run) -> list[str]:
    sentences = [f"Task: {task_text(run.task)}."]
    times = sorted(survival_times(run.predictions.columns).values())
    if times:
        sentences.append(f"Survival was predicted at the times {', '.join(map(time_text, times))}.")
    return sentences


def _splits(run: Run, data: dict[str, Any]) -> list[str]:
    if run.splits is None or not _trained(run):
        return []
    folds = [name for name in map(str, run.splits) if name.startswith("fold_")]
    used = [f"fold_{row['fold']}" for row in run.facts.get("counts") or []]
    folds = [fold for fold in folds if fold in used]
    sentences = []
    if run.facts["command"] != "fit":
        sentences.append(f"Performance was estimated by {len(folds)}-fold cross-validation.")
    for fold in folds:
        parts = []
        for part, name in _PARTS.items():
            rows = run.splits[run.splits[fold] == part]
            patients = f"{count(rows['patient_id'].nunique(), 'patient')}, " if run.noun("patient") == "patient" else ""
            parts.append(f"{name} ({patients}{count(len(rows), 'slide')})")
        sentences.append(f"{'Fold ' + fold.removeprefix('fold_') if len(folds) > 1 else 'Parts'}: {', '.join(parts)}.")
    if data.get("splits") is not None:
        sentences.append("The splits were given.")
    if run.cohort is not None and "site" in run.cohort:
        site = run.splits["slide_id"].map(run.cohort.set_index("slide_id")["site"])
        apart = all((run.splits[fold].groupby(site).nunique() <= 1).all() for fold in folds)
        sentences.append("No site was in two parts of a fold." if apart else "Sites were not kept apart.")
    return sentences


def _selection(run: Run) -> list[str]:
    """How a sweep has chosen."""
    chosen = run.facts.get("chosen") or []
    if not chosen:
        return []
    names = [name for name in chosen[0] if name not in ("fold", "trial")]
    by = f"the validation {run.validation_metric}"
    if run.facts["inner_folds"] > 1:
        by = f"the mean {by.removeprefix('the ')} over {run.facts['inner_folds']} inner folds"
    each = "; ".join(f"fold {one['fold']}, {', '.join(f'{name} {one[name]}' for name in names)}" for one in chosen)
    return [
        f"Of {count(run.facts['trials'], 'combination')} of {', '.join(names)}, each fold chose one by {by} of its training "
        "and validation patients, before its test patients were predicted (nested cross-validation, Varma & Simon 2006): "
        f"{each}."
    ]


def _model(run: Run, options: dict[str, Any]) -> list[str]:
    sentences = []
    model = run.facts.get("aggregator") or {}
    if model:
        chosen = ", ".join(f"{name} {value}" for name, value in (model.get("options") or {}).items())
        size = f" and {model['parameters']:,} parameters" if "parameters" in model else ""
        sentences.append(f"The model was {model['name']}{f' with {chosen}' if chosen else ''}{size}.")
    if not _trained(run):
        return sentences
    optimiser = (options.get("model") or {}).get("optimiser") or {}
    if run.facts.get("learning_rate") is not None and "weight_decay" in optimiser:
        sentences.append(
            f"The highest learning rate was {run.facts['learning_rate']:g}, for steps of 8 bags, scaled by the square root "
            f"of their number; the weight decay was {optimiser['weight_decay']:g}."
        )
    several = len(run.facts.get("steps") or []) > 1
    for course in run.facts.get("steps") or []:
        text = (
            f"An epoch had {count(course['steps_per_epoch'], 'optimiser step')} over "
            f"{count(course['bags'], 'training bag')}"
        )
        if run.history is not None and len(run.history):
            passed = run.history.loc[run.history["fold"] == course["fold"], "epoch"].nunique()
            text += f"; training ended after {count(passed, 'epoch')}"
        sentences.append(text + (f" (fold {course['fold']})." if several else "."))
    if "seed" in run.facts:
        sentences.append(f"The seed was {run.facts['seed']}.")
    has_validation = run.splits is not None and run.splits.isin(["val"]).any(axis=None)
    if has_validation and "monitor" in options:
        best = (
            f"best validation {run.validation_metric}"
            if options["monitor"] == "val_metric"
            else "lowest validation loss"
        )
        sentences.append(f"The checkpoint with the {best} was used.")
    return sentences


def _imbalance(options: dict[str, Any]) -> list[str]:
    sentences = []
    weights = (options.get("model") or {}).get("class_weights")
    if weights not in (None, "none"):
        sentences.append(f"Class weights: {weights}.")
    if (options.get("data") or {}).get("balance"):
        sentences.append("Training bags were drawn so that each class came equally often.")
    return sentences


def _calibration(run: Run) -> list[str]:
    calibration = run.facts.get("calibration") or {}
    done = "; ".join(f"{fold}, {what}" if len(calibration) > 1 else str(what) for fold, what in calibration.items())
    return [f"Calibration of the probabilities: {done}."] if done else []


def _output(run: Run) -> list[str]:
    if not _trained(run):
        return []
    sentences = []
    if run.task.kind in ("binary", "multilabel"):
        validation = run.predictions[run.predictions["part"] == "val"]
        of_folds = validation.groupby("fold")["patient_id"].nunique()
        of_label = " of each label" if run.task.kind == "multilabel" else ""
        chosen = f"The decision threshold{of_label} maximised sensitivity + specificity in the validation part"
        settled = f"the decision threshold{of_label} was the share of positives in the training loss"
        if not len(of_folds) or of_folds.max() < FEWEST_CALIBRATED:
            sentences.append(f"{settled[0].upper()}{settled[1:]}.")
        elif run.task.kind == "binary" and of_folds.min() >= FEWEST_CALIBRATED:
            sentences.append(f"{chosen}.")
        else:
            sentences.append(f"{chosen}; of fewer than {FEWEST_CALIBRATED} validation patients, {settled}.")
    elif run.task.kind in CLASSIFICATION:
        sentences.append(
            "The highest class reached with a probability above one half was predicted."
            if run.task.kind == "ordinal"
            else "The most probable class was predicted."
        )
    return sentences


def _performance(metrics: "pd.DataFrame") -> list[str]:
    names = [name for name in dict.fromkeys(metrics["metric"]) if ":" not in name]
    over_folds = (
        "Metrics are means over the folds, whose intervals also hold what training on other patients would change (Nadeau & "
        "Bengio 2003)."
    )
    return [
        f"Performance was measured by {', '.join(map(metric_name, names))}.",
        intervals_text(metrics),
        over_folds if (metrics["scope"] == "mean").any() else "",
    ]


def _software(facts: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in (facts.get("versions") or {}).items())
    device = f" on {facts['device']}" if "device" in facts else ""
    return [f"Software: {versions}{device}."] if versions else []

"""Classifiers of one task as one: those of the folds of a cross-validation, or a single one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import LongslideError
from ...task import Task
from ..checkpoint_file import digest
from .checkpoint import load_classifier
from .classifier import SlideClassifier
from .objective import survival_at
from .selection import class_of


@dataclass(frozen=True)
class EnsemblePrediction:
    """What an ensemble says of one slide or patient.

    Attributes:
        mean: Mean over the classifiers of `probability` `(C,)`, `value` `()`, `risk` `()`, `survival` `(n_times,)`: those
            that the task has, each calibrated by its own classifier.
        spread: Standard deviation over the classifiers, of the same keys; empty with one classifier.
        predicted: The class `()`, or for multilabel 0 or 1 `(C,)`, by the mean probability; None for other tasks.
    """

    mean: dict[str, Tensor]
    spread: dict[str, Tensor]
    predicted: Tensor | None


class ClassifierEnsemble(nn.Module):
    """Classifiers whose predictions are averaged. In evaluation mode, without gradients of the weights.

    Args:
        classifiers: The classifiers, all of one task and for one kind of features.
        sources: Name of each, for messages: the path of its checkpoint.

    Raises:
        LongslideError: They differ in what they predict or read; the difference is named.
    """

    def __init__(self, classifiers: Sequence[SlideClassifier], sources: Sequence[str]) -> None:
        super().__init__()
        first = _facts(classifiers[0])
        for classifier, source in zip(classifiers[1:], sources[1:], strict=True):
            for name, value in _facts(classifier).items():
                if value != first[name]:
                    raise LongslideError(
                        f"{source}: {name} {value}, but {first[name]} in {sources[0]}; predict with checkpoints of one "
                        "cross-validation"
                    )
        self.classifiers: Any = nn.ModuleList(classifiers)
        self.sources = tuple(sources)
        self.eval().requires_grad_(False)

    def __len__(self) -> int:
        """Number of classifiers."""
        return len(self.classifiers)

    @property
    def task(self) -> Task:
        """The task."""
        return self.classifiers[0].task  # type: ignore[no-any-return]

    @property
    def bag_unit(self) -> str:
        """Whether a bag is a `slide`, or all slides of a `patient`."""
        return str(self.classifiers[0].bag_unit)

    @property
    def reads_slide_embedding(self) -> bool:
        """Whether slide embeddings are read in place of tile embeddings."""
        return bool(self.classifiers[0].aggregator.reads_slide_embedding)

    @property
    def thresholds(self) -> dict[str, float] | None:
        """Mean of the classifiers' thresholds, by class or label; None if they have none."""
        all_of_them = [classifier.thresholds or {} for classifier in self.classifiers]
        names = {name for thresholds in all_of_them for name in thresholds}
        return {
            name: sum(thresholds.get(name, 0.5) for thresholds in all_of_them) / len(self) for name in sorted(names)
        } or None

    @torch.no_grad()
    def predict(self, bags: Sequence[dict[str, Tensor]]) -> EnsemblePrediction:
        """Predict one bag, or a patient from several.

        Args:
            bags: Batches as the data module makes them, of one bag each, on the device of the classifiers. What a
                classifier says of several is the mean.

        Returns:
            The prediction, on the CPU.
        """
        # (classifiers, bags, ...) of each kind of number.
        found: dict[str, list[Tensor]] = {}
        for classifier in self.classifiers:
            of_bags = [classifier.predict(classifier.outputs_of(bag)) for bag in bags]
            for name in of_bags[0]:
                if name == "survival":  # folds may have times of their own
                    for one in of_bags:
                        one[name] = survival_at(one[name].double(), classifier.task.times, self.task.times)
                if name != "prediction":
                    found.setdefault(name, []).append(torch.stack([one[name][0].float().cpu() for one in of_bags]))
        means = {name: torch.stack(values).mean(1) for name, values in found.items()}
        mean = {name: values.mean(0) for name, values in means.items()}
        spread = {name: values.std(0) for name, values in means.items()} if len(self) > 1 else {}
        predicted = None
        if "probability" in mean:
            predicted = class_of(self.task, mean["probability"][None], self.thresholds)[0]
        return EnsemblePrediction(mean, spread, predicted)


def find_checkpoints(path: Path) -> list[Path]:
    """The checkpoints that a path stands for: a file itself, the best one of a run, or the best one of each of its folds.

    Raises:
        LongslideError: There are none, or a fold has none yet.
    """
    if not path.is_dir():
        return [path]
    folds = {int(fold.name[5:]): fold / "best.ckpt" for fold in path.glob("fold_*") if fold.name[5:].isdecimal()}
    unfinished = [str(file) for _, file in sorted(folds.items()) if not file.is_file()]
    if unfinished:
        raise LongslideError(
            f"{', '.join(unfinished)}: not there; finish the cross-validation, or give the folds to use"
        )
    if folds:
        return [file for _, file in sorted(folds.items())]
    if (path / "best.ckpt").is_file():
        return [path / "best.ckpt"]
    raise LongslideError(f"{path}: neither best.ckpt nor fold_0/best.ckpt in this folder; give a .ckpt file or a run")


def load_ensemble(paths: Sequence[Path]) -> ClassifierEnsemble:
    """Load checkpoints, and those of run folders.

    Returns:
        The ensemble, on the CPU.

    Raises:
        LongslideError: A checkpoint cannot be used, or they do not belong together.
    """
    files = [file for path in paths for file in find_checkpoints(path)]
    return ClassifierEnsemble([load_classifier(file) for file in files], [str(file) for file in files])


def checkpoint_digests(ensemble: ClassifierEnsemble) -> list[str]:
    """Digest of each checkpoint file, by which later runs recognise predictions of the same ones."""
    return [digest(Path(source)) for source in ensemble.sources]


def _facts(classifier: SlideClassifier) -> dict[str, Any]:
    """What classifiers must agree on, under names for a message."""
    facts: dict[str, Any] = {
        "task": classifier.task.kind,
        "classes": classifier.task.classes,
        "label": classifier.task.label,
    }
    facts |= {"embedding length": classifier.facts.feature_dim}
    facts["reads slide embeddings"] = classifier.aggregator.reads_slide_embedding
    facts["trained on bags of a"] = classifier.bag_unit
    return facts

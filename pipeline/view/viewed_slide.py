"""One slide of a viewer: what is known of it, what was predicted, by which model, and whether that is true."""

from dataclasses import dataclass, field
from pathlib import Path

from ..predict.prediction import Prediction

UNCERTAIN_BELOW = 0.75
"""A prediction is uncertain when what was decided has a lower probability."""


@dataclass(frozen=True)
class Model:
    """A trained model.

    Attributes:
        name: What the page calls it.
        checkpoint: Its checkpoint.
        digest: The checkpoint's digest when it made the predictions that are shown; empty where nobody says.
    """

    name: str
    checkpoint: Path
    digest: str = ""


@dataclass
class ViewedSlide:
    """One slide of a collection.

    Attributes:
        slide_id: Its id.
        paths: Where its file may be, the likeliest first; its feature file knows another place.
        slide_mpp: Microns per pixel at level 0 by the user's word.
        features: Its feature files.
        results: Output folders of `predict` that have a prediction of it.
        patient_id: The patient, where one is named.
        status: `done`, `failed`, `skipped`, or empty where no job says.
        reason: Why it failed or was skipped.
        tiles: Its tiles, where a job says.
        tissue_mm2: Area of its tissue, where a job says.
        odd: What a person should look at, as the contact sheet of `embed` says it, worst first.
        prediction: What was predicted of it.
        models: Those of the run folders that have a prediction of it; the results of `predict` name theirs themselves.
        target: What is true of it by the table of labels, in the words of the prediction; empty where nobody says.
    """

    slide_id: str
    paths: list[Path] = field(default_factory=list)
    slide_mpp: float | None = None
    features: list[Path] = field(default_factory=list)
    results: list[Path] = field(default_factory=list)
    patient_id: str = ""
    status: str = ""
    reason: str = ""
    tiles: int | None = None
    tissue_mm2: float | None = None
    odd: tuple[str, ...] = ()
    prediction: Prediction | None = None
    models: list[Model] = field(default_factory=list)
    target: str = ""

    @property
    def decided(self) -> str:
        """What was predicted, in the words of `target`; empty for values and risks."""
        if self.prediction is None:
            return ""
        return self.prediction.predicted or ", ".join(self.prediction.labels)

    @property
    def wrong(self) -> bool | None:
        """Whether the class or a label is predicted wrongly; None where nobody says what is true."""
        one = self.prediction
        if one is None or one.probability is None or not self.target:
            return None
        return self.decided != ("" if self.target == NO_LABEL else self.target)

    @property
    def error(self) -> float | None:
        """How far a value is from what is true; None for other tasks, and where nobody says."""
        one = self.prediction
        if one is None or one.value is None or not self.target:
            return None
        try:
            return abs(one.value - float(self.target))
        except ValueError:
            return None

    @property
    def event(self) -> bool | None:
        """Whether what a risk is of has happened; None for other tasks, and where nobody says."""
        if self.prediction is None or self.prediction.risk is None or not self.target:
            return None
        return self.target.endswith(EVENT)

    @property
    def certainty(self) -> float | None:
        """Probability of what was decided, for several labels the lowest; None for values and risks."""
        probability = self.prediction.probability if self.prediction else None
        if not probability:
            return None
        if self.prediction is not None and self.prediction.predicted is not None:
            return probability[self.prediction.predicted]
        return min(max(value, 1 - value) for value in probability.values())


EVENT = ", event"
"""How the target of a survival task ends where it is no time of censoring."""

NO_LABEL = "no label"
"""The target of a slide that has none of several labels."""


def model_name(checkpoint: Path) -> str:
    """What the page calls a model: the folder of its run, and the fold."""
    fold = fold_of(checkpoint)
    run = checkpoint.absolute().parent if fold is None else checkpoint.absolute().parent.parent
    name = run.name if checkpoint.name == "best.ckpt" else f"{run.name}/{checkpoint.name}"
    return name if fold is None else f"{name}, fold {fold}"


def fold_of(checkpoint: Path) -> int | None:
    """The fold whose checkpoint it is by its folder; None of a single model."""
    kind, _, number = checkpoint.parent.name.partition("_")
    return int(number) if kind == "fold" and number.isdecimal() else None

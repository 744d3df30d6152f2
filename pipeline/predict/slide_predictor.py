"""The prediction of one slide from its feature file: numbers, warnings, explanation, pictures, and its JSON."""

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ...data.features.feature_file import read_features
from ...data.features.features import Features
from ...data.slides.base import recorded_reader
from ...data.slides.slide import open_slide
from ...data.slides.slide_table import SlideEntry
from ...data.whole_file import write_picture
from ...errors import LongslideError, printable
from ..batch.result import SlideResult, remarks_on
from ..batch.watched import WatchedProcesses
from ..embed.layout import look_at
from ..seen import Seen
from .checkpoint_features import distribution_warnings
from .explain import explain_features, write_explanation
from .prediction import Prediction, with_numbers
from .slide_json import slide_json, write_json

if TYPE_CHECKING:
    import torch

    from ...data.features.cache import FeatureCache
    from ...models.classifier.cases import CaseRecord
    from ...models.classifier.ensemble import ClassifierEnsemble, EnsemblePrediction
    from ...models.explain.methods import Method

THUMBNAIL_PX = 1024
OVERLAY_PX = 2048


class Laps:
    """What the time of a slide goes into."""

    def __init__(self, began: float) -> None:
        self._began = self._last = began
        self._seconds: dict[str, float] = {}

    def lap(self, what: str) -> None:
        """Count the time since the last call for this."""
        now = time.monotonic()
        self._seconds[what] = self._seconds.get(what, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    def __str__(self) -> str:
        parts = sorted(self._seconds.items(), key=lambda part: -part[1])
        return ", ".join(f"{what} {seconds:.1f} s" for what, seconds in parts if seconds >= 0.05)


@dataclass
class SlidePredictor:
    """Predicts slides from their feature files, into one folder.

    Attributes:
        output: The folder.
        ensemble: The classifiers, on `device`.
        digests: Digest of each one's checkpoint.
        device: Where they run.
        method: How predictions are explained, if they are.
        allow_seen: Whether slides that were seen in training are predicted too.
        watched: The processes in which slides are opened.
    """

    output: Path
    ensemble: "ClassifierEnsemble"
    digests: list[str]
    device: "torch.device"
    method: "Method | None"
    allow_seen: bool
    watched: WatchedProcesses

    @property
    def records(self) -> "list[CaseRecord | None]":
        """What each classifier's checkpoint says of who was in training."""
        return [classifier.cases for classifier in self.ensemble.classifiers]

    @property
    def description(self) -> str:
        """What is predicted, in a line."""
        task, many = self.ensemble.task, len(self.ensemble)
        what = ", ".join(task.classes) or " and ".join(task.label)
        text = f"{task.kind} ({what}), {f'mean of {many} classifiers' if many > 1 else self.ensemble.sources[0]}"
        return text if self.method is None else f"{text}, explained by {self.method}"

    def json_path(self, entry: SlideEntry) -> Path:
        """The prediction of a slide."""
        return self.output / f"{entry.slide_id}.json"

    def predict(self, entry: SlideEntry, path: Path, remarks: list[str], laps: Laps) -> SlideResult:
        """Predict a slide, and write its pictures and last its JSON.

        Args:
            entry: The slide, with its patient.
            path: Its feature file.
            remarks: What is to be said of that.
            laps: What its time has gone into until now.

        Raises:
            LongslideError: The features cannot be used, or the slide was in training.
        """
        bag = self._bag([path])
        mean = bag["tile_features"].float().mean(0).cpu().numpy()
        laps.lap("reading features")
        features = read_features(path, embeddings=self.method is not None)
        far_off = distribution_warnings(list(self.ensemble.classifiers), features.slide_mpp, mean)
        found = self._classify([bag])
        laps.lap("classifying")
        prediction = Prediction(
            "slide",
            entry.slide_id,
            entry.patient_id or "",
            seen=self._seen(entry, path, features),
            warnings=(*remarks, *remarks_on(features), *far_off),
        )
        prediction = with_numbers(prediction, self.ensemble.task, found, len(self.ensemble))
        folder = self.output / "slides" / entry.slide_id
        folder.mkdir(parents=True, exist_ok=True)
        explanation = None
        identity = replace(features.slide, path=printable(str(entry.path.absolute())))
        with ExitStack() as resources:
            slide = thumbnail = None
            try:
                reader = recorded_reader(features.settings.get("reader"))
                identity, thumbnail = self.watched.call(entry.path, look_at, entry.path, reader, OVERLAY_PX)
                slide = resources.enter_context(
                    open_slide(entry.path, slide_mpp=entry.slide_mpp or features.slide_mpp, reader=reader)
                )
            except LongslideError as error:  # the features are there, and enough for a prediction
                prediction = replace(prediction, warnings=(*prediction.warnings, f"no pictures: {error}"))
                slide = thumbnail = None
            if thumbnail is not None:
                picture = Image.fromarray(thumbnail)
                picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
                write_picture(folder / "thumbnail.jpg", picture, quality=85)
            laps.lap("opening the slide")
            if self.method is not None:
                scores = explain_features(self.ensemble, features, self.method, self.device)
                laps.lap("explaining")
                explanation = write_explanation(folder, scores, prediction, slide, thumbnail, features.tissue)
                laps.lap("drawing")
        result = replace(
            SlideResult.done(entry, features, path, seconds=laps.total),
            reason="; ".join(prediction.warnings),
            took=str(laps) or None,
        )
        checkpoints = list(zip(self.ensemble.sources, self.digests, strict=True))
        content = slide_json(
            entry, identity, self.ensemble.task, checkpoints, features, prediction, result, explanation
        )
        write_json(self.json_path(entry), content)
        return result

    def classify(self, groups: list[list[Path]]) -> "EnsemblePrediction":
        """Predict from groups of feature files, each one bag: what is said of several groups is the mean.

        Raises:
            LongslideError: They do not fit in the device's memory.
        """
        return self._classify([self._bag(files) for files in groups])

    def _classify(self, bags: "list[dict[str, torch.Tensor]]") -> "EnsemblePrediction":
        import torch

        try:
            return self.ensemble.predict(bags)
        except torch.OutOfMemoryError as error:
            tiles = max(len(bag["tile_features"]) for bag in bags)
            raise LongslideError(
                f"{tiles:,} tiles do not fit in the memory of {self.device}; predict this slide with --device cpu"
            ) from error

    @cached_property
    def _cache(self) -> "FeatureCache":
        from ...data.features.cache import FeatureCache

        return FeatureCache(0, slide_embeddings=self.ensemble.reads_slide_embedding)

    def _bag(self, files: list[Path]) -> "dict[str, torch.Tensor]":
        """One bag of these feature files, as in training, on the device."""
        from ...data.cohort.bags import Bag, BagDataset

        bag = Bag("", tuple(path.stem for path in files), tuple(files), (0,) * len(files), None)
        batch = BagDataset([bag], self._cache)[0]
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _seen(self, entry: SlideEntry, path: Path, features: Features) -> bool | None:
        """Whether a slide was in training; None where no checkpoint says.

        Raises:
            LongslideError: It was, and that is not allowed.
        """
        from ...data.features.statistics import feature_digest

        cases: dict[str, list[str]] = {
            "patients": [entry.patient_id or ""],
            "slides": [entry.slide_id],
            "images": [features.quickhash or ""],
            "features": [feature_digest(self._cache.read(path).features)],
        }
        seen = Seen.of(self.records, cases)
        if not self.allow_seen:
            seen.refuse(entry.path)
        return seen.mark(entry.patient_id or "", entry.slide_id)

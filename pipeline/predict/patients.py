"""Patients of a prediction job: each is predicted from all slides that the output folder has, whichever run they are of."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import LongslideError
from ...plurals import count
from ...version import SOFTWARE
from .prediction import Prediction, with_numbers
from .slide_json import SCHEMA, read_json, write_json

if TYPE_CHECKING:
    from ...models.classifier.ensemble import ClassifierEnsemble, EnsemblePrediction

PATIENTS = ".patients"
"""Which slides each patient has, and what was predicted from them; not `*.json`, as the predictions of slides are."""


@dataclass(frozen=True)
class PatientJob:
    """Predicts the patients of an output folder.

    Attributes:
        output: The folder.
        features: Where feature files are, if they are not where the prediction of a slide says.
        ensemble: The classifiers.
        digests: Digest of each one's checkpoint.
        classify: Predicts from groups of feature files: what is said of several groups is the mean.
    """

    output: Path
    features: Path
    ensemble: "ClassifierEnsemble"
    digests: list[str]
    classify: Callable[[list[list[Path]]], "EnsemblePrediction"]

    def known(self, slides: Mapping[str, dict[str, Any]]) -> dict[str, str]:
        """The patient of each slide of earlier runs, those without a prediction among them.

        Args:
            slides: JSON of each slide of the folder, whatever it was predicted by.
        """
        patients = self._record()["patients"]
        recorded = {slide_id: patient_id for patient_id, one in patients.items() for slide_id in one["slides"]}
        return recorded | {slide_id: one["patient_id"] for slide_id, one in slides.items() if one["patient_id"]}

    def predict(
        self, slides: Mapping[str, dict[str, Any]], given: Mapping[str, str], ended: Mapping[str, str]
    ) -> dict[str, Prediction]:
        """Predict each patient from all its slides that these checkpoints have predicted, unless it was from the same ones.

        It is the mean of what the classifier says of the slides, or what it says of all of them as one bag, as in training.

        Args:
            slides: JSON of each slide of the folder, whatever it was predicted by.
            given: The patient of each slide of this run, as far as known, in the order of the input.
            ended: The status of each slide of this run.

        Returns:
            The patients, by id.
        """
        position = {slide_id: number for number, slide_id in enumerate(given)}
        members: dict[str, list[str]] = {}
        for slide_id, patient_id in (self.known(slides) | dict(given)).items():
            members.setdefault(patient_id, []).append(slide_id)
        before = self._record()
        patients, record = {}, {}
        for patient_id, slide_ids in members.items():
            if position.keys() >= set(slide_ids):  # all are in the input: in its order, as a bag has it in training
                slide_ids.sort(key=position.__getitem__)
            done = {
                slide_id: slides[slide_id]
                for slide_id in slide_ids
                if self.is_of_these(slides.get(slide_id))
                and ended.get(slide_id) != "failed"  # perhaps of another slide
            }
            sources = {slide_id: _digest(done[slide_id]) if slide_id in done else None for slide_id in slide_ids}
            there = before["patients"].get(patient_id, {"status": "", "slides": {}})
            # In the same order too: as one bag, slides in another order are another sequence.
            if done and there["status"] == "done" and [*there["slides"].items()] == [*sources.items()]:
                patients[patient_id] = Prediction.from_dict(there)
            elif done:
                patients[patient_id] = self._predict(patient_id, done, len(slide_ids))
            else:
                failed = "failed" in [ended.get(slide_id) for slide_id in slide_ids]
                patients[patient_id] = Prediction(
                    "patient", "", patient_id, "failed" if failed else "skipped", "no slide has a prediction"
                )
            record[patient_id] = patients[patient_id].to_dict() | {"slides": sources}
        if record:
            facts = {"schema": SCHEMA, "software": SOFTWARE}
            write_json(self.output / PATIENTS, facts | {"patients": record})
        return patients

    def is_of_these(self, content: Mapping[str, Any] | None) -> bool:
        """Whether the JSON of a slide is a prediction by these checkpoints."""
        return content is not None and [one["digest"] for one in content["checkpoints"]] == self.digests

    def _predict(self, patient_id: str, done: Mapping[str, dict[str, Any]], slides: int) -> Prediction:
        predictions = {slide_id: Prediction.from_dict(content) for slide_id, content in done.items()}
        warnings = [f"{slide_id}: {warning}" for slide_id, one in predictions.items() for warning in one.warnings]
        if len(done) < slides:
            warnings.append(
                f"{slides - len(done)} of {count(slides, 'slide')} "
                f"{'has' if slides - len(done) == 1 else 'have'} no prediction"
            )
        if len(done) == 1:
            [alone] = predictions.values()
            return replace(alone, level="patient", slide_id="", patient_id=patient_id, warnings=tuple(warnings))
        marks = {one.seen for one in predictions.values()}
        seen = True if True in marks else (None if None in marks else False)
        prediction = Prediction("patient", "", patient_id, seen=seen, warnings=tuple(warnings))
        files = [self._features_of(slide_id, content) for slide_id, content in done.items()]
        try:
            found = self.classify([files] if self.ensemble.bag_unit == "patient" else [[file] for file in files])
        except LongslideError as error:
            return replace(prediction, status="failed", reason=str(error))
        return with_numbers(prediction, self.ensemble.task, found, len(self.ensemble))

    def _features_of(self, slide_id: str, content: Mapping[str, Any]) -> Path:
        there = Path(content["features"])
        return there if there.exists() else self.features / f"{slide_id}.h5"  # the folder has been moved

    def _record(self) -> dict[str, Any]:
        path = self.output / PATIENTS
        return read_json(path) if path.exists() else {"patients": {}}


def _digest(content: Mapping[str, Any]) -> str:
    """Tells a prediction of a slide, and what it was made of, from any other: checkpoints and time are in it too."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

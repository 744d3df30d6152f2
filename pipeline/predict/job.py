"""The work on the slides of a prediction: features of each, its prediction, then the patients and the tables."""

import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...data.slides.slide_table import SlideEntry
from ...data.whole_file import remove_leftovers
from ...errors import LongslideError
from ...plurals import count
from ..batch.batch import run_batch
from ..batch.claims import claim
from ..batch.devices import Feed
from ..batch.memory import Turn
from ..batch.progress import Progress
from ..batch.rerun import REMEDY, MadeOtherwiseError, refuse_mistaken_rerun
from ..batch.result import SlideResult
from ..batch.shards import Shard
from ..embed.job import PreparedSlide
from ..embed.layout import take_memory
from .checkpoint_features import FeatureMaker
from .patients import PatientJob
from .prediction import PREDICTIONS, Prediction, write_predictions
from .slide_json import explained_by, read_json, result_of, ways_unlike, write_json
from .slide_predictor import Laps, SlidePredictor


@dataclass
class ClaimedSlide:
    """A slide that waits for the classifiers: with features, or prepared for the tile encoder; `resources` frees it."""

    entry: SlideEntry
    prepared: PreparedSlide | None
    remarks: list[str]
    resources: ExitStack


@dataclass
class PredictJob:
    """Predicts slides into one folder, and their patients.

    Attributes:
        entries: The slides; none where a feed gives them.
        shard: The shard that they are, if they are one.
        maker: Makes their features.
        predictor: Predicts each of them.
        overwrite: Whether predictions that were made otherwise are replaced.
    """

    entries: list[SlideEntry]
    shard: Shard | None
    maker: FeatureMaker
    predictor: SlidePredictor
    overwrite: bool
    _known: dict[str, str] | None = field(default=None, init=False)

    @property
    def output(self) -> Path:
        """The folder."""
        return self.predictor.output

    @property
    def description(self) -> str:
        """What the job does, in a line or two, for the user to check."""
        return f"{self.predictor.description}\n{self.maker.description}; {self.predictor.device}"

    @property
    def made_with(self) -> dict[str, Any]:
        """What predictions depend on."""
        return {"checkpoints": self.predictor.digests, "explain": self.predictor.method}

    def run(self) -> list[SlideResult]:
        """Predict the slides of the job.

        Raises:
            LongslideError: See `checked`; or what is wrong with the encoders, and so for every slide that has no features.
        """
        entries, makes_features, notes = self.checked()
        return self._run(entries, makes_features, notes)

    def run_feed(self, feed: Feed, makes_features: bool) -> list[SlideResult]:
        """Predict the slides that a feed gives, by whom they have been `checked`.

        Raises:
            LongslideError: What is wrong with the encoders, and so for every slide that has no features.
        """
        self._known = {}
        return self._run(feed, makes_features, [])

    def _run(self, slides: Sequence[SlideEntry] | Feed, makes_features: bool, notes: list[str]) -> list[SlideResult]:
        if makes_features:
            self.maker.load_encoders()
        results = run_batch(self, slides, self.output, notes, self.shard)
        self.maker.say_what_took_the_time(slides if isinstance(slides, Feed) else None)
        return results

    def checked(self) -> tuple[list[SlideEntry], bool, list[str]]:
        """The slides of the job with their patients, whether one lacks features, and what is to be said first.

        Raises:
            LongslideError: Predictions of other checkpoints are in the folder, whose tables are of one set of them; or the
                slides were predicted otherwise.
        """
        entries = self.entries
        there = self.slides()
        other = [slide_id for slide_id, content in there.items() if not self.patients.is_of_these(content)]
        if other and not self.overwrite:
            path = self.output / f"{other[0]}.json"
            raise LongslideError(f"{path}: a prediction of other checkpoints; {REMEDY}")
        if not self.overwrite:
            refuse_mistaken_rerun(entries, self.done_before, self.output)
        missing = [entry for entry in entries if self.overwrite or entry.slide_id not in there]
        refuse_mistaken_rerun(missing, self.maker.existing, self.maker.folder)
        makes_features = any(not self.maker.path(entry).exists() for entry in missing)
        notes = []
        if left := set(other) - {entry.slide_id for entry in entries}:
            notes.append(
                f"{count(len(left), 'slide there was', 'slides there were')} predicted by other "
                f"checkpoints: {PREDICTIONS} leaves them out until "
                "they are predicted again"
            )
        self._known = self.patients.known(there)
        return [self._of_patient(entry) for entry in entries], makes_features, notes

    def predictions(self, results: Sequence[SlideResult]) -> list[Prediction]:
        """What became of the slides of the job; of all but shards then the patients, and the tables."""
        entries = [self._of_patient(entry) for entry in self.entries]
        predictions = [self.prediction(entry, result) for entry, result in zip(entries, results, strict=True)]
        if self.shard is not None:
            return predictions
        given = {entry.slide_id: entry.patient_id for entry in entries if entry.patient_id is not None}
        slides = self.slides()
        ended = {one.slide_id: one.status for one in predictions}
        patients = self.patients.predict(slides, given, ended)
        slides = self.slides()  # once more: other processes may have ended slides meanwhile
        rows = [
            Prediction.from_dict(content)
            for slide_id, content in slides.items()
            if self.patients.is_of_these(content) and ended.get(slide_id) != "failed"  # perhaps of another slide
        ]
        rows += [one for one in patients.values() if one.status == "done"]
        write_predictions(self.output, self.predictor.ensemble.task, rows)
        failed = [patient_id for patient_id, one in patients.items() if not one.ok]  # of earlier slides too
        return predictions + [patients[patient_id] for patient_id in dict.fromkeys([*given.values(), *failed])]

    def prediction(self, entry: SlideEntry, result: SlideResult) -> Prediction:
        """The prediction of a slide whose result is known."""
        there = self.predictor.json_path(entry)
        # What another process was at work on may be done by now.
        by_now = result.status == "skipped" and there.exists() and self.patients.is_of_these(read_json(there))
        if result.status != "done" and not by_now:
            return Prediction("slide", entry.slide_id, entry.patient_id or "", result.status, result.reason)
        return Prediction.from_dict(read_json(there))

    def _of_patient(self, entry: SlideEntry) -> SlideEntry:
        """A slide with its patient, whom the table or an earlier run names."""
        if self._known is None:
            self._known = self.patients.known(self.slides())
        return replace(entry, patient_id=entry.patient_id or self._known.get(entry.slide_id))

    @cached_property
    def patients(self) -> PatientJob:
        """The patients of the folder."""
        predictor = self.predictor
        return PatientJob(self.output, self.maker.folder, predictor.ensemble, predictor.digests, predictor.classify)

    def slides(self) -> dict[str, dict[str, Any]]:
        """JSON of each slide that the folder has a prediction of, by these checkpoints or others; of a shard its own."""
        paths = sorted(self.output.glob("*.json"))
        if self.shard is not None:
            own = {entry.slide_id for entry in self.entries}
            paths = [path for path in paths if path.stem in own]
        return {path.stem: read_json(path) for path in paths}

    def done_before(self, entry: SlideEntry) -> dict[str, Any] | None:
        """What an earlier run wrote of a slide, if that is all that is asked for now.

        Raises:
            MadeOtherwiseError: It is of another slide, or explained otherwise, and may not be replaced.
            LongslideError: It is broken.
        """
        path, method = self.predictor.json_path(entry), self.predictor.method
        if not path.exists():
            return None
        content = read_json(path)
        if ways := ways_unlike(content, entry, method):
            raise MadeOtherwiseError(path, ways)
        if method is not None and explained_by(content) is None:
            return None  # an explanation may be added
        return content

    def prepare(self, entry: SlideEntry, turn: Turn) -> ClaimedSlide | SlideResult:
        """All that comes before the encoders and classifiers."""
        entry = self._of_patient(entry)
        with ExitStack() as resources:
            resources.callback(claim(self.output, f"{entry.slide_id} prediction").release)
            done = None if self.overwrite else self.done_before(entry)
            if done is not None:
                return self._keep_patient(entry, done)
            prepared = None
            remarks = self.maker.existing(entry)
            if remarks is None:
                remarks = []
                made = self.maker.prepare(entry, turn)
                if isinstance(made, PreparedSlide):
                    prepared = made
                    resources.callback(made.resources.close)
                elif made.status != "done":
                    return made
            else:
                with suppress(LongslideError):  # of its pictures, without which there is a prediction too
                    take_memory(self.maker.watched, turn, entry.path, replace(entry, tissue_mask=None), None)
            return ClaimedSlide(entry, prepared, remarks, resources.pop_all())

    def encode(
        self, slides: Generator[ClaimedSlide | SlideResult], progress: Progress
    ) -> Generator[ClaimedSlide | SlideResult]:
        """Embed the tiles of the slides that have no features."""
        return self.maker.encode_within(
            slides, lambda one: one.prepared if isinstance(one, ClaimedSlide) else None, progress
        )

    def finish(self, claimed: ClaimedSlide, progress: Progress) -> SlideResult:
        """All that needs the slide encoder and the classifiers, and the files."""
        from ..embed.tile_embedding import on_device

        entry = claimed.entry
        # Before that, earlier slides have kept it waiting.
        laps = Laps(time.monotonic() if claimed.prepared is None else claimed.prepared.started)
        if claimed.prepared is not None:
            with claimed.prepared.resources:
                made = self.maker.finish(claimed.prepared, progress)
            laps.lap("embedding tiles")
            if made.status != "done":
                return made
        try:
            remove_leftovers(self.predictor.json_path(entry))
            with on_device(self.predictor.device):
                return self.predictor.predict(entry, self.maker.path(entry), claimed.remarks, laps)
        except OSError as error:
            raise LongslideError(
                f"{self.output}: cannot write the results ({error.strerror}); make room or choose another --output"
            ) from error

    def stop(self) -> None:
        """End what `prepare` is at work on."""
        self.maker.watched.stop()

    def _keep_patient(self, entry: SlideEntry, content: dict[str, Any]) -> SlideResult:
        """The result of a slide that an earlier run finished; its patient is the one that the table names now."""
        if entry.patient_id is not None and entry.patient_id != content["patient_id"]:
            write_json(self.predictor.json_path(entry), content | {"patient_id": entry.patient_id})
        return result_of(entry, content)

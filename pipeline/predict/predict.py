"""The prediction job: slide files and a classifier in; predictions, explanations and pictures out."""

import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from ...data.features.feature_file import Features, read_features
from ...data.slides.base import recorded_reader
from ...data.slides.identity import SlideIdentity
from ...data.slides.slide import Slide, open_slide
from ...data.slides.slide_table import IdFrom, SlideEntry, find_slides
from ...data.whole_file import remove_leftovers
from ...errors import LongslideError, printable
from ...ranges import checked
from ...registry import import_plugins
from ...version import __version__
from ..batch.batch import PREPARED_AHEAD, run_batch
from ..batch.claims import ClaimedError, claim
from ..batch.devices import DeviceRun, Feed
from ..batch.ledger import SUMMARY, make_output_folder
from ..batch.memory import Turn
from ..batch.places import check_places, workers_on
from ..batch.progress import Progress
from ..batch.rerun import MadeOtherwiseError, refuse_mistaken_rerun
from ..batch.result import SlideResult, counted, remarks_on
from ..batch.shards import SHARDS, Shard
from ..batch.watched import WatchedProcesses
from ..embed.choices import SlideEncoderChoice, TileEncoderChoice
from ..embed.job import PreparedSlide
from ..embed.layout import look_at, take_memory
from ..log_file import logged
from ..seen import Seen
from .checkpoint_features import FeatureMaker, check_exist, distribution_warnings, trained_on
from .explain import explain_features, write_explanation
from .patients import PatientJob
from .prediction import PREDICTIONS, SCHEMA, Prediction, read_json, with_numbers, write_json, write_predictions

if TYPE_CHECKING:
    import torch

    from ...data.features.cache import FeatureCache
    from ...models.classifier.cases import CaseRecord
    from ...models.classifier.ensemble import ClassifierEnsemble, EnsemblePrediction
    from ...models.explain.methods import Method

THUMBNAIL_PX = 1024
OVERLAY_PX = 2048

ExplainMethod = Literal["integrated-gradients", "gradient-x-input", "occlusion", "attention"]


@checked
@logged
def predict(
    slides: str | Path | Slide | Sequence[str | Path],
    checkpoint: list[str | Path] | str | Path,
    output: str | Path | None = None,
    features: str | Path | None = None,
    explain: ExplainMethod | None = None,
    tile_encoder: TileEncoderChoice | None = None,
    slide_encoder: SlideEncoderChoice | None = None,
    tile_checkpoint: str | Path | None = None,
    slide_checkpoint: str | Path | None = None,
    plugins: list[str] | str | None = None,
    slide_mpp: float | None = None,
    patient_column: str | None = None,
    id_from: IdFrom = "name",
    max_bad_tiles: int = 0,
    slide_timeout: float = 600.0,
    batch_size: int | None = None,
    threads: int | None = None,
    device: str = "auto",
    devices: str | None = None,
    ray: str | None = None,
    shard: str | None = None,
    precision: Literal["auto", "float32", "float16", "bfloat16", "float8"] = "auto",
    overwrite: bool = False,
    allow_seen: bool = False,
    log_file: str | Path | None = None,
    trust_remote_code: bool = False,
) -> list[Prediction]:
    """Predict new slides: embed them as the training slides were, classify them, and show why.

    Running it again does only what is missing; with other slides, the results of both are in the output folder, and a
    patient's are of all slides there. Several processes may share one output folder. One bad slide never ends the job.

    Args:
        slides: Slide files, folders of slides, or tables (CSV, TSV, Parquet, Excel) with a column `slide`; with a column
            `patient_id` (or `pat_id`, `case_id`) patients are predicted too. In Python also one path, or an open slide.
        checkpoint: Checkpoint of a classifier; or a run folder, whose folds are averaged; or several, as `[a.ckpt, b.ckpt]`.
        output: Folder for `predictions.csv`, `summary.csv`, `<slide_id>.json` and pictures. Without one the predictions are
            only printed and returned.
        features: Folder of feature files: those there are used, new ones are written there. Default: `features` in the
            output folder.
        explain: Also show which tiles raise or lower the prediction: `integrated-gradients`, `gradient-x-input`,
            `occlusion`, or `attention` of models that have it.
        tile_encoder: The tile encoder, if it is one of your own: a YAML file, or `package.module:factory`. Default: by its
            name in the checkpoint.
        slide_encoder: Likewise the slide encoder, for classifiers of slide embeddings.
        tile_checkpoint: Weights of the tile encoder: a file or a folder. Default: those of training, or the published ones.
        slide_checkpoint: Weights of the slide encoder, for classifiers of slide embeddings. Default: likewise.
        plugins: Modules to import first: those of your own classes that the checkpoint or its feature files name.
        slide_mpp: Microns per pixel at level 0, for all slides that have no `slide_mpp` in the table; overrides the file's.
        patient_column: Column of the tables that names the patient, if it has another name; `none` for no patients.
        id_from: What ids are made of, as `embed` takes it.
        max_bad_tiles: Unreadable tiles that a slide may have; with more of them it fails.
        slide_timeout: Seconds that opening a slide and finding its tissue may take, and each batch of its tiles; then it
            fails, and the next one begins.
        batch_size: Tiles a batch. Default: what is fastest on the device. Halved when the GPU runs out of memory.
        threads: Threads or processes that read tiles. Default: one on each core, at most 16.
        device: `auto`, or a torch device such as `cuda:1` or `cpu`.
        devices: Several devices, with a process on each, as `embed` takes them.
        ray: Work on the GPUs of a Ray cluster, as `embed` takes it.
        shard: Predict this shard of the slides alone, such as `3/16`. `longslide merge` joins the shards; then the same
            command without this option adds the patients and `predictions.csv`.
        precision: Precision of the tile encoder. `auto`: its own on a GPU, float32 on a CPU.
        allow_seen: Also predict slides that were in the training or validation part of a classifier; they are marked.
        overwrite: Replace predictions that were made with other checkpoints or explained otherwise.
        log_file: Append what happens to this file as JSON lines: one for each slide, minute and note.
        trust_remote_code: Let a slide encoder that is named by `slide_encoder` and brings code of its own run it.

    Returns:
        A prediction a slide, in the order of the input; then one for each patient of these slides, and for a patient of
        earlier slides alone only if that failed.

    Raises:
        LongslideError: Wrong usage, found before any slide is touched.
    """
    import_plugins(plugins)
    if isinstance(slides, Slide):
        given = slides.mpp.value if slides.mpp.source == "option" else slide_mpp
        entries = [SlideEntry(slides.path, slides.slide_id, given)]
    else:
        entries = find_slides(
            [slides] if isinstance(slides, str | Path) else slides, slide_mpp, patient_column, id_from=id_from
        )
    check_places(device, devices, ray)
    if output is None and (shard, ray) != (None, None):
        raise LongslideError(f"{'--ray' if shard is None else '--shard'} needs --output: the folder that all write to")
    paths = [Path(path) for path in ([checkpoint] if isinstance(checkpoint, str | Path) else checkpoint)]
    check_exist(paths)
    with ExitStack() as resources:
        kept = output is not None
        output = Path(output or resources.enter_context(tempfile.TemporaryDirectory(prefix="longslide-")))
        make_output_folder(output)
        part = None if shard is None else Shard.of_slides(shard, entries)
        predicting = _Predicting(
            entries=entries if part is None else list(part.entries),
            shard=part,
            checkpoints=paths,
            output=output,
            features=output / "features" if features is None else Path(features),
            explain=explain,
            tile_encoder=tile_encoder,
            slide_encoder=slide_encoder,
            tile_checkpoint=tile_checkpoint,
            slide_checkpoint=slide_checkpoint,
            plugins=plugins,
            max_bad_tiles=max_bad_tiles,
            slide_timeout=slide_timeout,
            batch_size=batch_size,
            threads=threads,
            precision=precision,
            overwrite=overwrite,
            allow_seen=allow_seen,
            trust_remote_code=trust_remote_code,
        )
        with workers_on(devices, ray, output) as workers:
            results = None
            if workers:
                with predicting.job("cpu") as job:
                    entries, makes_features, notes = job.checked()
                for note in notes:
                    print(note)
                work = replace(predicting, entries=[], makes_features=makes_features)  # slides come one by one
                results = DeviceRun(workers, work, entries, output, part).run()
        with predicting.job(device) as job:
            predictions = job.predictions(job.run(predicting.entries) if results is None else results)
    if kept:
        counts = counted(one for one in predictions if one.level == "slide")
        for one in predictions:
            if one.level == "patient" and not one.ok:  # of slides there is a line already
                print(f"failed patient {one.patient_id}: {one.reason}")
        where = f"{output / PREDICTIONS} and {output / SUMMARY}" if part is None else output / SHARDS
        print(f"{counts}; see {where}")
    else:
        for one in predictions:
            what = one.text if one.status == "done" else f"{one.status}: {one.reason}"
            print(f"{one.slide_id or one.patient_id}  {what}")
    return predictions


@dataclass(frozen=True)
class _Predicting:
    """What `predict` does once its options are understood, on one device; the fields are its arguments."""

    entries: list[SlideEntry]
    shard: Shard | None
    checkpoints: list[Path]
    output: Path
    features: Path
    explain: "Method | None"
    tile_encoder: TileEncoderChoice | None
    slide_encoder: SlideEncoderChoice | None
    tile_checkpoint: str | Path | None
    slide_checkpoint: str | Path | None
    plugins: list[str] | str | None
    max_bad_tiles: int
    slide_timeout: float
    batch_size: int | None
    threads: int | None
    precision: str
    overwrite: bool
    allow_seen: bool
    trust_remote_code: bool
    makes_features: bool = False

    def __call__(self, device: str, feed: Feed) -> list[SlideResult]:
        """Predict the slides that a feed gives.

        Raises:
            LongslideError: Wrong usage, found before any slide is touched.
        """
        import_plugins(self.plugins)
        with self.job(device) as job:
            return job.run(feed)

    @contextmanager
    def job(self, device: str) -> "Iterator[_Job]":
        """The job, with its models on a device.

        Raises:
            LongslideError: Wrong usage, found before any slide is touched.
        """
        from ...models.aggregators.slide_encoder import use_cuda_graphs
        from ...models.classifier.ensemble import checkpoint_digests, load_ensemble
        from ...models.explain.classifier import check_method
        from ..embed.tile_embedding import resolve_device

        with WatchedProcesses(self.slide_timeout, PREPARED_AHEAD) as watched:
            torch_device = resolve_device(device)
            ensemble = load_ensemble(self.checkpoints).to(torch_device)
            use_cuda_graphs(ensemble)
            records = [classifier.cases for classifier in ensemble.classifiers]
            if not self.allow_seen:
                ids = {
                    "patients": [one.patient_id or "" for one in self.entries],
                    "slides": [one.slide_id for one in self.entries],
                }
                who = ", ".join(ensemble.sources[:1]) if len(ensemble) == 1 else str(self.checkpoints[0])
                Seen.of(records, ids).refuse(who)
            if self.explain is not None:
                check_method(ensemble, self.explain)
            maker = FeatureMaker(
                trained_on(ensemble),
                self.features,
                reads_slide_embedding=ensemble.reads_slide_embedding,
                tile_encoder=self.tile_encoder,
                slide_encoder=self.slide_encoder,
                tile_checkpoint=self.tile_checkpoint,
                slide_checkpoint=self.slide_checkpoint,
                max_bad_tiles=self.max_bad_tiles,
                batch_size=self.batch_size,
                threads=self.threads,
                device=torch_device,
                precision=self.precision,
                watched=watched,
                trust_remote_code=self.trust_remote_code,
            )
            digests = checkpoint_digests(ensemble)
            yield _Job(self, ensemble, digests, maker, torch_device, records)


@dataclass
class _Claimed:
    """A slide that waits for the classifiers: with features, or prepared for the tile encoder; `resources` frees it."""

    entry: SlideEntry
    prepared: PreparedSlide | None
    remarks: list[str]
    resources: ExitStack


class _Laps:
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
class _Job:
    asked: _Predicting
    ensemble: "ClassifierEnsemble"
    digests: list[str]
    maker: FeatureMaker
    device: "torch.device"
    records: "list[CaseRecord | None]"
    _known: dict[str, str] | None = field(default=None, init=False)

    @property
    def output(self) -> Path:
        """The output folder."""
        return self.asked.output

    @property
    def method(self) -> "Method | None":
        """How predictions are explained."""
        return self.asked.explain

    @property
    def description(self) -> str:
        """What the job does, in a line or two, for the user to check."""
        task, many = self.ensemble.task, len(self.ensemble)
        what = ", ".join(task.classes) or " and ".join(task.label)
        text = f"{task.kind} ({what}), {f'mean of {many} classifiers' if many > 1 else self.ensemble.sources[0]}"
        if self.method:
            text += f", explained by {self.method}"
        return f"{text}\n{self.maker.description}; {self.device}"

    @property
    def made_with(self) -> dict[str, Any]:
        """What predictions depend on."""
        return {"checkpoints": self.digests, "explain": self.method}

    def run(self, slides: Sequence[SlideEntry] | Feed) -> list[SlideResult]:
        """Predict the slides of the job; or those that a feed gives, by whom they have been `checked`.

        Raises:
            LongslideError: See `checked`; or what is wrong with the encoders, and so for every slide that has no features.
        """
        makes_features, notes = self.asked.makes_features, list[str]()
        if isinstance(slides, Feed):
            self._known = {}
        else:
            slides, makes_features, notes = self.checked()
        if makes_features:
            self.maker.load_encoders()
        results = run_batch(self, slides, self.output, notes, self.asked.shard)
        self.maker.say_what_took_the_time(slides if isinstance(slides, Feed) else None)
        return results

    def checked(self) -> tuple[list[SlideEntry], bool, list[str]]:
        """The slides of the job with their patients, whether one lacks features, and what is to be said first.

        Raises:
            LongslideError: Predictions of other checkpoints are in the folder, whose tables are of one set of them; or the
                slides were predicted otherwise.
        """
        entries, overwrite = self.asked.entries, self.asked.overwrite
        there = self.slides()
        other = [slide_id for slide_id, content in there.items() if not self.patients.is_of_these(content)]
        if other and not overwrite:
            path = self.output / f"{other[0]}.json"
            raise LongslideError(f"{path}: a prediction of other checkpoints; choose another --output, or --overwrite")
        if not overwrite:
            refuse_mistaken_rerun(entries, self.done_before, self.output)
        missing = [entry for entry in entries if overwrite or entry.slide_id not in there]
        refuse_mistaken_rerun(missing, self.maker.existing, self.maker.folder)
        makes_features = any(not self.maker.path(entry).exists() for entry in missing)
        notes = []
        if left := set(other) - {entry.slide_id for entry in entries}:
            notes.append(
                f"{len(left)} slides there were predicted by other checkpoints: {PREDICTIONS} leaves them out until "
                "they are predicted again"
            )
        self._known = self.patients.known(there)
        return [self._of_patient(entry) for entry in entries], makes_features, notes

    def predictions(self, results: Sequence[SlideResult]) -> list[Prediction]:
        """What became of the slides of the job; of all but shards then the patients, and the tables."""
        entries = [self._of_patient(entry) for entry in self.asked.entries]
        predictions = [self.prediction(entry, result) for entry, result in zip(entries, results, strict=True)]
        if self.asked.shard is not None:
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
        write_predictions(self.output, self.ensemble.task, rows)
        failed = [patient_id for patient_id, one in patients.items() if not one.ok]  # of earlier slides too
        return predictions + [patients[patient_id] for patient_id in dict.fromkeys([*given.values(), *failed])]

    def _of_patient(self, entry: SlideEntry) -> SlideEntry:
        """A slide with its patient, whom the table or an earlier run names."""
        if self._known is None:
            self._known = self.patients.known(self.slides())
        return replace(entry, patient_id=entry.patient_id or self._known.get(entry.slide_id))

    @cached_property
    def patients(self) -> PatientJob:
        """The patients of the folder."""

        def classify(groups: list[list[Path]]) -> "EnsemblePrediction":
            return self._classify([self._bag(files) for files in groups])

        return PatientJob(self.output, self.maker.folder, self.ensemble, self.digests, classify)

    def slides(self) -> dict[str, dict[str, Any]]:
        """JSON of each slide that the folder has a prediction of, by these checkpoints or others; of a shard its own."""
        paths = sorted(self.output.glob("*.json"))
        if self.asked.shard is not None:
            own = {entry.slide_id for entry in self.asked.entries}
            paths = [path for path in paths if path.stem in own]
        return {path.stem: read_json(path) for path in paths}

    def json_path(self, entry: SlideEntry) -> Path:
        """The prediction of a slide."""
        return self.output / f"{entry.slide_id}.json"

    def prepare(self, entry: SlideEntry, turn: Turn) -> _Claimed | SlideResult:
        """All that comes before the encoders and classifiers."""
        entry = self._of_patient(entry)
        with ExitStack() as resources:
            try:
                resources.callback(claim(self.output, f"{entry.slide_id} prediction").release)
                done = None if self.asked.overwrite else self.done_before(entry)
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
                return _Claimed(entry, prepared, remarks, resources.pop_all())
            except ClaimedError as busy:
                return SlideResult.skipped(entry, str(busy))
            except Exception as error:
                return SlideResult.failed(entry, error)

    def encode(
        self, slides: Generator[_Claimed | SlideResult], progress: Progress
    ) -> Generator[_Claimed | SlideResult]:
        """Embed the tiles of the slides that have no features."""
        return self.maker.encode_within(
            slides, lambda one: one.prepared if isinstance(one, _Claimed) else None, progress
        )

    def finish(self, claimed: _Claimed, progress: Progress) -> SlideResult:
        """All that needs the slide encoder and the classifiers, and the files."""
        from ..embed.tile_embedding import on_device

        entry = claimed.entry
        # Before that, earlier slides have kept it waiting.
        laps = _Laps(time.monotonic() if claimed.prepared is None else claimed.prepared.started)
        with claimed.resources:
            try:
                if claimed.prepared is not None:
                    made = self.maker.finish(claimed.prepared, progress)
                    laps.lap("embedding tiles")
                    if made.status != "done":
                        return made
                remove_leftovers(self.json_path(entry))
                with on_device(self.device):
                    return self._predict(entry, claimed.remarks, laps)
            except OSError as error:
                what = (
                    f"{self.output}: cannot write the results ({error.strerror}); make room or choose another --output"
                )
                return SlideResult.failed(entry, LongslideError(what))
            except Exception as error:
                return SlideResult.failed(entry, error)

    def stop(self) -> None:
        """End what `prepare` is at work on."""
        self.maker.watched.stop()

    def _predict(self, entry: SlideEntry, remarks: list[str], laps: _Laps) -> SlideResult:
        from ...data.features.statistics import feature_digest

        path = self.maker.path(entry)
        bag = self._bag([path])
        mean = bag["tile_features"].float().mean(0).cpu().numpy()
        laps.lap("reading features")
        features = read_features(path, embeddings=self.method is not None)
        far_off = distribution_warnings(list(self.ensemble.classifiers), features.slide_mpp, mean)
        warnings = (*remarks, *remarks_on(features), *far_off)
        found = self._classify([bag])
        laps.lap("classifying")
        cases = {
            "patients": [entry.patient_id or ""],
            "slides": [entry.slide_id],
            "images": [features.quickhash or ""],
            "features": [feature_digest(self._cache.read(path).features)],
        }
        seen = Seen.of(self.records, cases)
        if not self.asked.allow_seen:
            seen.refuse(entry.path)
        mark = seen.mark(entry.patient_id or "", entry.slide_id)
        prediction = Prediction("slide", entry.slide_id, entry.patient_id or "", seen=mark, warnings=warnings)
        prediction = with_numbers(prediction, self.ensemble.task, found, len(self.ensemble))
        folder = self.output / "slides" / entry.slide_id
        folder.mkdir(parents=True, exist_ok=True)
        explanation = None
        identity = replace(features.slide, path=printable(str(entry.path.absolute())))
        with ExitStack() as resources:
            slide = thumbnail = None
            try:
                reader = recorded_reader(features.settings.get("reader"))
                identity, thumbnail = self.maker.watched.call(entry.path, look_at, entry.path, reader, OVERLAY_PX)
                slide = resources.enter_context(
                    open_slide(entry.path, slide_mpp=entry.slide_mpp or features.slide_mpp, reader=reader)
                )
                _save_thumbnail(folder / "thumbnail.jpg", thumbnail)
            except LongslideError as error:  # the features are there, and enough for a prediction
                prediction = replace(prediction, warnings=(*prediction.warnings, f"no pictures: {error}"))
                slide = thumbnail = None
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
        self._write_json(entry, prediction, features, result, explanation, identity)
        return result

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

    def _bag(self, files: list[Path]) -> dict[str, "torch.Tensor"]:
        """One bag of these feature files, as in training, on the device."""
        from ...data.cohort.bags import Bag, BagDataset

        bag = Bag("", tuple(path.stem for path in files), tuple(files), (0,) * len(files), None)
        batch = BagDataset([bag], self._cache)[0]
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _write_json(
        self,
        entry: SlideEntry,
        prediction: Prediction,
        features: Features,
        result: SlideResult,
        explanation: dict[str, Any] | None,
        identity: SlideIdentity,
    ) -> None:
        content = prediction.to_dict() | {
            "slide": entry.shown,
            "slide_file": asdict(identity),
            "task": self.ensemble.task.to_dict(),
            "checkpoints": [
                {"path": source, "digest": digest}
                for source, digest in zip(self.ensemble.sources, self.digests, strict=True)
            ],
            "quality": {
                "tiles": result.tiles,
                "bad_tiles": result.bad_tiles,
                "blurred_tiles": result.blurred_tiles,
                "tissue_mm2": result.tissue_mm2,
                "slide_mpp": result.slide_mpp,
                "mpp_source": result.mpp_source,
                "tile_px": features.tile_px,
                "tile_mpp": features.tile_mpp,
                "overlap": features.overlap,
                "tile_encoder": features.encoder,
                "tile_weights": features.weights,
            },
            "features": result.features,
            "explanation": explanation,
            "schema": SCHEMA,
            "software": f"longslide {__version__}",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(self.json_path(entry), content)

    def done_before(self, entry: SlideEntry) -> dict[str, Any] | None:
        """What an earlier run wrote of a slide, if that is all that is asked for now.

        Raises:
            MadeOtherwiseError: It is of another slide, or explained otherwise, and may not be replaced.
            LongslideError: It is broken.
        """
        path = self.json_path(entry)
        if not path.exists():
            return None
        content = read_json(path)
        method = (content.get("explanation") or {}).get("method")
        ways = []
        if (mismatch := _slide_of(content).mismatch(entry.path)) is not None:
            ways.append(mismatch)
        if None not in (method, self.method) and method != self.method:
            ways.append(f"explain {method} instead of {self.method}")
        if ways:
            raise MadeOtherwiseError(path, ways, "choose another --output, or --overwrite")
        if self.method is not None and method is None:
            return None  # an explanation may be added
        return content

    def _keep_patient(self, entry: SlideEntry, content: dict[str, Any]) -> SlideResult:
        """The result of a slide that an earlier run finished; its patient is the one that the table names now."""
        if entry.patient_id is not None and entry.patient_id != content["patient_id"]:
            write_json(self.json_path(entry), content | {"patient_id": entry.patient_id})
        quality = content["quality"]
        return SlideResult(
            entry.slide_id,
            entry.shown,
            "done",
            "already complete",
            tiles=quality["tiles"],
            bad_tiles=quality["bad_tiles"],
            blurred_tiles=quality.get("blurred_tiles"),  # not in the files of earlier versions
            slide_mpp=quality["slide_mpp"],
            mpp_source=quality["mpp_source"],
            tile_mpp=quality["tile_mpp"],
            tissue_mm2=quality["tissue_mm2"],
            features=content["features"],
        )

    def prediction(self, entry: SlideEntry, result: SlideResult) -> Prediction:
        """The prediction of a slide whose result is known."""
        there = self.json_path(entry)
        # What another process was at work on may be done by now.
        by_now = result.status == "skipped" and there.exists() and self.patients.is_of_these(read_json(there))
        if result.status != "done" and not by_now:
            return Prediction("slide", entry.slide_id, entry.patient_id or "", result.status, result.reason)
        return Prediction.from_dict(read_json(there))


def _slide_of(content: dict[str, Any]) -> SlideIdentity:
    """The slide that the JSON of a prediction is of; earlier versions recorded its path alone."""
    return SlideIdentity(**content.get("slide_file", {"path": content["slide"]}))


def _save_thumbnail(path: Path, thumbnail: np.ndarray) -> None:
    picture = Image.fromarray(thumbnail)
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    picture.save(path, quality=85)

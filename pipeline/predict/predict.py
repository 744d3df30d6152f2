"""The prediction job: slide files and a classifier in; predictions, explanations and pictures out."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ...data.slides.slide import Slide
from ...data.slides.slide_table import IdFrom, SlideEntry, find_slides
from ...errors import LongslideError
from ...ranges import checked
from ...registry import import_plugins
from ..batch.batch import PREPARED_AHEAD
from ..batch.devices import DeviceRun, Feed
from ..batch.ledger import SUMMARY, make_output_folder
from ..batch.places import check_places, workers_on
from ..batch.result import SlideResult, counted
from ..batch.shards import SHARDS, Shard
from ..batch.watched import WatchedProcesses
from ..embed.choices import SlideEncoderChoice, TileEncoderChoice
from ..log_file import logged
from ..seen import Seen
from .checkpoint_features import EmbeddingOptions, FeatureMaker, check_exist, trained_on
from .job import PredictJob
from .prediction import PREDICTIONS, Prediction
from .slide_predictor import SlidePredictor

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
        id_from: What ids are made from, as `embed` takes it.
        max_bad_tiles: Unreadable tiles that a slide may have; with more of them it fails.
        slide_timeout: Seconds that opening a slide and finding its tissue may take, and each batch of its tiles; then it
            fails, and the next one begins.
        batch_size: Tiles per batch. Default: what is fastest on the device. Halved when the GPU runs out of memory.
        threads: Threads or processes that read tiles. Default: one on each core, at most 16.
        device: `auto`, or a torch device such as `cuda:1` or `cpu`.
        devices: Several devices, with a process on each, as `embed` takes them.
        ray: Work on the GPUs of a Ray cluster, as `embed` takes it.
        shard: Predict only this shard of the slides, such as `3/16`. `longslide merge` joins the shards; then the same
            command without this option adds the patients and `predictions.csv`.
        precision: Precision of the tile encoder. `auto`: its own on a GPU, float32 on a CPU.
        allow_seen: Also predict slides that were in the training or validation part of a classifier; they are marked.
        overwrite: Replace predictions that were made with other checkpoints or explained otherwise.
        log_file: Append JSON lines to this file: one for each slide, minute and note.
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
        inputs = [slides] if isinstance(slides, str | Path) else slides
        try:
            entries = find_slides(inputs, slide_mpp, patient_column, id_from=id_from)
        except LongslideError as error:
            made = next((path for path in map(Path, inputs) if path.is_dir() and any(path.glob("*.h5"))), None)
            if made is None:
                raise
            raise LongslideError(f"{error}; name the slides, and their feature files with --features {made}") from error
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
            embedding=EmbeddingOptions(
                tile_encoder=tile_encoder,
                slide_encoder=slide_encoder,
                tile_checkpoint=tile_checkpoint,
                slide_checkpoint=slide_checkpoint,
                max_bad_tiles=max_bad_tiles,
                batch_size=batch_size,
                threads=threads,
                precision=precision,
                trust_remote_code=trust_remote_code,
            ),
            plugins=plugins,
            slide_timeout=slide_timeout,
            overwrite=overwrite,
            allow_seen=allow_seen,
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
            predictions = job.predictions(job.run() if results is None else results)
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
    explain: ExplainMethod | None
    embedding: EmbeddingOptions
    plugins: list[str] | str | None
    slide_timeout: float
    overwrite: bool
    allow_seen: bool
    makes_features: bool = False

    def __call__(self, device: str, feed: Feed) -> list[SlideResult]:
        """Predict the slides that a feed gives.

        Raises:
            LongslideError: Wrong usage, found before any slide is touched.
        """
        import_plugins(self.plugins)
        with self.job(device) as job:
            return job.run_feed(feed, self.makes_features)

    @contextmanager
    def job(self, device: str) -> Iterator[PredictJob]:
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
            predictor = SlidePredictor(
                output=self.output,
                ensemble=ensemble,
                digests=checkpoint_digests(ensemble),
                device=torch_device,
                method=self.explain,
                allow_seen=self.allow_seen,
                watched=watched,
            )
            if not self.allow_seen:
                ids = {
                    "patients": [one.patient_id or "" for one in self.entries],
                    "slides": [one.slide_id for one in self.entries],
                }
                who = ", ".join(ensemble.sources[:1]) if len(ensemble) == 1 else str(self.checkpoints[0])
                Seen.of(predictor.records, ids).refuse(who)
            if self.explain is not None:
                check_method(ensemble, self.explain)
            maker = FeatureMaker(
                preprocessing=trained_on(ensemble),
                folder=self.features,
                reads_slide_embedding=ensemble.reads_slide_embedding,
                options=self.embedding,
                device=torch_device,
                watched=watched,
            )
            yield PredictJob(self.entries, self.shard, maker, predictor, self.overwrite)

"""Features of new slides as a classifier was trained on them: existing files held against its checkpoint, others made."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from ...data.features.feature_file import read_features
from ...data.features.preprocessing import Preprocessing, agreed, same_weights
from ...data.slides.base import READERS, recorded_reader
from ...data.slides.slide_table import SlideEntry
from ...data.tiles.grid import MIN_TISSUE
from ...data.tissue.base import segmenter_of
from ...errors import LongslideError
from ...registry import import_object, is_factory
from ..batch.ledger import make_output_folder
from ..batch.memory import Turn
from ..batch.progress import Progress
from ..batch.rerun import MadeOtherwiseError
from ..batch.result import SlideResult
from ..batch.watched import WatchedProcesses
from ..embed.choices import SlideEncoderChoice, TileEncoderChoice, look_at_tile_encoder
from ..embed.job import EmbedJob, PreparedSlide
from ..embed.layout import Tiling

if TYPE_CHECKING:
    import torch

    from ...models.classifier.classifier import SlideClassifier
    from ...models.classifier.ensemble import ClassifierEnsemble
    from ..batch.devices import Feed

T = TypeVar("T")

OUTLIER_RATIO = 1.5
"""A slide is far from training when the distance of its mean embedding is so many times the training slides' 99th
percentile: of slides like those of training, few are beyond it, and none by as much."""

SCANNER_TOLERANCE = 0.02
"""Scanners of one kind differ by about a hundredth in their microns per pixel."""


REMEDY = "choose another --features folder to embed the slides again"


def trained_on(ensemble: "ClassifierEnsemble") -> Preprocessing:
    """What the training features of classifiers were made with.

    Raises:
        LongslideError: They differ between the classifiers.
    """
    settings = [Preprocessing.from_dict(classifier.facts.preprocessing) for classifier in ensemble.classifiers]
    return agreed(
        [Path(source) for source in ensemble.sources],
        settings,
        what="the classifiers were trained on features",
        remedy="predict with checkpoints of one cross-validation",
    )[0]


@dataclass(frozen=True)
class EmbeddingOptions:
    """What `predict` is asked for about making features; the fields are its arguments."""

    tile_encoder: TileEncoderChoice | None
    slide_encoder: SlideEncoderChoice | None
    tile_checkpoint: str | Path | None
    slide_checkpoint: str | Path | None
    max_bad_tiles: int
    batch_size: int | None
    threads: int | None
    precision: str
    trust_remote_code: bool


@dataclass
class FeatureMaker:
    """Makes the features of slides, with the settings of a checkpoint; the encoders are loaded when first needed.

    Attributes:
        preprocessing: How the training features were made, from the checkpoint.
        folder: Where feature files are looked for, and written.
        reads_slide_embedding: Whether the classifier reads slide embeddings.
        options: What the user asks for.
        device: Where the encoders run.
        watched: The processes in which slides are opened and tissue is found.
    """

    preprocessing: Preprocessing
    folder: Path
    reads_slide_embedding: bool
    options: EmbeddingOptions
    device: "torch.device"
    watched: WatchedProcesses
    _job: EmbedJob | None = field(default=None, init=False)

    @property
    def description(self) -> str:
        """What the features are, in a line."""
        made = self.preprocessing

        def known(value: object) -> object:
            return "?" if value is None else value

        return (
            f"tile encoder {known(made.tile_encoder)} ({known(made.tile_weights)}), tiles of {known(made.tile_px)} px at "
            f"{known(made.tile_mpp)} um/px, overlap {known(made.overlap)} px"
        )

    def path(self, entry: SlideEntry) -> Path:
        """The feature file of a slide."""
        return self.folder / f"{entry.slide_id}.h5"

    def existing(self, entry: SlideEntry) -> list[str] | None:
        """Hold the feature file of a slide against the checkpoint and the slide.

        Returns:
            Remarks on it; None if there is no such file.

        Raises:
            MadeOtherwiseError: It was made with other settings than the training features, or of another slide.
            LongslideError: It is broken.
        """
        path = self.path(entry)
        if not path.exists():
            return None
        features = read_features(path, embeddings=False)
        made_with = Preprocessing.of(features)
        if not self.reads_slide_embedding:
            made_with = made_with.of_tiles
        ways = made_with.unlike_training(self.preprocessing)
        if entry.slide_mpp is not None and features.slide_mpp is not None and features.slide_mpp != entry.slide_mpp:
            ways.append(f"slide_mpp {features.slide_mpp} instead of {entry.slide_mpp}")
        if (mismatch := features.slide.mismatch(entry.path)) is not None:
            ways.append(mismatch)
        if ways:
            raise MadeOtherwiseError(path, ways, REMEDY)
        return made_with.remarks(self.preprocessing)

    @property
    def _unknown_weights(self) -> bool:
        """Whether neither the training features nor the user say which weights are meant: a name alone is another tool's."""
        given = self.options.tile_encoder, self.options.tile_checkpoint
        return self.preprocessing.tile_weights is None and given == (None, None)

    def load_encoders(self) -> None:
        """Load what makes features.

        Raises:
            LongslideError: The checkpoint does not say enough, or encoders are unavailable or are not those of training.
        """
        self._job = self._make_job()

    def prepare(self, entry: SlideEntry, turn: Turn) -> PreparedSlide | SlideResult:
        """All that comes before the tile encoder.

        Raises:
            LongslideError: The encoders have not been loaded, since there was a feature file when the job began.
        """
        if self._job is None:
            raise LongslideError(
                f"{self.path(entry)}: the feature file was there before and is gone; run the command again"
            )
        return self._job.prepare(entry, turn)

    def encode_within(
        self, items: Generator[T], slide_of: Callable[[T], PreparedSlide | None], progress: Progress
    ) -> Generator[T]:
        """Embed the tiles of the slides that are within some of the items, which are given on in order."""
        return items if self._job is None else self._job.encode_within(items, slide_of, progress)

    def finish(self, prepared: PreparedSlide, progress: Progress) -> SlideResult:
        """Write the feature file."""
        assert self._job is not None
        return self._job.finish(prepared, progress)

    def say_what_took_the_time(self, feed: "Feed | None") -> None:
        """What the tile encoder has waited for, if there was something to embed."""
        if self._job is not None:
            self._job.embedder.waits.say(str(self.device), feed)

    def _make_job(self) -> EmbedJob:
        from ...models.tile_encoder.encoder import create_tile_encoder
        from ..embed.tile_embedding import TileEmbedder, resolve_precision, slide_encoder_on

        made, asked = self.preprocessing, self.options
        tile_mpp, tile_px, overlap, name = (
            made.tile_mpp,
            made.tile_px,
            made.overlap,
            asked.tile_encoder or made.tile_encoder,
        )
        if tile_mpp is None or tile_px is None or overlap is None or name is None or self._unknown_weights:
            wanted = {"tile_encoder": name, "tile_mpp": tile_mpp, "tile_px": tile_px, "overlap": overlap}
            unknown = [setting for setting, value in wanted.items() if value is None]
            unknown += ["tile_weights"] if self._unknown_weights else []
            raise LongslideError(
                f"the checkpoint does not say the {', '.join(unknown)} of its training features, which another tool made: "
                "make those of the new slides with it too, and give their folder with --features"
            )
        make_output_folder(self.folder, "--features")
        checkpoint, seed = _weights_to_load(asked.tile_checkpoint, made.tile_weights)
        recorded = made.tile_encoder
        try:
            if asked.tile_encoder is None and is_factory(recorded):
                import_object(str(recorded), f"tile encoder {recorded!r}", from_file=True)
            choice = str(recorded) if asked.tile_encoder is None else asked.tile_encoder
            _, choice, tile_weights = look_at_tile_encoder(choice, checkpoint, seed)
        except LongslideError as error:
            raise LongslideError(
                f"the classifier's tile encoder: {error} One of your own is given with --tile-encoder: a YAML file, or "
                "package.module:factory."
            ) from error
        encoder = create_tile_encoder(choice, checkpoint=tile_weights, seed=seed)
        _check_weights("tile", encoder.weights, made.tile_weights)
        slide_encoder = None
        if self.reads_slide_embedding:
            from ...models.slide_encoder.base import load_slide_encoder
            from ...models.slide_encoder.spec import is_remote

            if made.slide_encoder is None:
                raise LongslideError(
                    "the checkpoint does not say the slide encoder of its training features: embed the new slides with it, "
                    "and give their folder with --features"
                )
            if asked.slide_encoder is None and is_remote(made.slide_encoder):  # a file alone runs no code
                raise LongslideError(
                    f"the classifier's slide encoder {made.slide_encoder!r} is run by code of its own: if you trust it, "
                    f"give --slide-encoder {made.slide_encoder} --trust-remote-code"
                )
            checkpoint, seed = _weights_to_load(asked.slide_checkpoint, made.slide_weights)
            try:
                if asked.slide_encoder is None and is_factory(made.slide_encoder):
                    import_object(made.slide_encoder, f"slide encoder {made.slide_encoder!r}", from_file=True)
                slide_encoder = load_slide_encoder(
                    made.slide_encoder if asked.slide_encoder is None else asked.slide_encoder,
                    checkpoint=checkpoint,
                    pool=_pool(made.pool),
                    seed=seed,
                    tile_encoder=encoder.spec.name,
                    tile_dim=encoder.dim,
                    trust_remote_code=asked.trust_remote_code,
                )
            except LongslideError as error:
                raise LongslideError(
                    f"the classifier's slide encoder: {error} One of your own is given with --slide-encoder: a YAML file, "
                    "or package.module:factory."
                ) from error
            slide_encoder = slide_encoder_on(self.device, slide_encoder)
            _check_weights("slide", slide_encoder.weights, made.slide_weights)
        precision = resolve_precision(asked.precision, encoder.spec.precision, self.device)
        reader = recorded_reader(made.reader)
        tissue = segmenter_of(made.tissue_segmenter, made.tissue_settings)
        tissue.check()
        tiling = Tiling(
            tile_mpp,
            tile_px,
            overlap,
            min_tissue=MIN_TISSUE if made.min_tissue is None else made.min_tissue,
            tissue=tissue,
            reader=None if reader is None else READERS.name_of(reader),
        )
        return EmbedJob(
            output=self.folder,
            embedder=TileEmbedder(encoder, self.device, precision, asked.batch_size),
            slide_encoder=slide_encoder,
            tiling=tiling,
            max_blur=1.0 if made.max_blur is None else made.max_blur,
            max_bad_tiles=asked.max_bad_tiles,
            threads=asked.threads,
            overwrite=False,
            watched=self.watched,
        )


def distribution_warnings(classifiers: "list[SlideClassifier]", slide_mpp: float | None, mean: np.ndarray) -> list[str]:
    """What makes a slide unlike the training slides.

    Args:
        classifiers: The classifiers, with the statistics of their training features.
        slide_mpp: Microns per pixel of the slide's level 0, if known.
        mean: `(D,)` mean embedding of its tiles.

    Returns:
        A sentence for each reason; those that hold for every classifier.
    """
    from ...data.features.statistics import distance

    statistics = [classifier.training_features for classifier in classifiers if classifier.training_features]
    found = []
    ranges = [one["slide_mpp"] for one in statistics if one.get("slide_mpp")]
    if slide_mpp is not None and ranges:
        low, high = min(one[0] for one in ranges), max(one[1] for one in ranges)
        if not low * (1 - SCANNER_TOLERANCE) <= slide_mpp <= high * (1 + SCANNER_TOLERANCE):
            trained = f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g} to {high:.4g}"
            found.append(f"scanned at {slide_mpp:.4g} um/px, training slides at {trained}")
    ratios = [
        distance(mean, one["mean"].numpy(), one["std"].numpy()) / one["distance_quantiles"]["0.99"]
        for one in statistics
        if len(one["mean"]) == len(mean) and one["distance_quantiles"]["0.99"] > 0
    ]
    if ratios and min(ratios) > OUTLIER_RATIO:
        found.append(f"its embeddings are {min(ratios):.1f} times as far from training as its farthest slides")
    return found


def _pool(name: str | None) -> Literal["mean", "cls"]:
    return "cls" if name == "cls" else "mean"


def _weights_to_load(given: str | Path | None, trained: str | None) -> tuple[str | Path | None, int]:
    """The file or word to load weights from, and the seed of random ones: as given, else as in training."""
    if given is None and trained is not None:
        if trained.startswith("random seed="):
            return "random", int(trained.removeprefix("random seed="))
        source = trained.rpartition(" sha256:")[0]
        if source and Path(source).exists():
            return source, 0
    return given, 0


def _check_weights(kind: str, loaded: str, trained: str | None) -> None:
    if trained is not None and not same_weights(loaded, trained):
        raise LongslideError(
            f"the classifier was trained on features of {trained}, but the {kind} encoder's weights are {loaded}; give "
            f"those of training with --{kind}-checkpoint"
        )


def check_exist(checkpoints: Sequence[Path]) -> None:
    """Refuse checkpoints that are not there, before torch is imported to read the others.

    Raises:
        LongslideError: One is neither a file nor a folder.
    """
    for path in checkpoints:
        if not path.exists():
            raise LongslideError(f"{path}: no such checkpoint; give a .ckpt file or a run folder")

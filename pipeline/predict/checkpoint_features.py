"""Features of new slides as a classifier was trained on them: existing files held against its checkpoint, others made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.features.feature_file import MUST_AGREE, MUST_AGREE_SLIDE, Features
from ...data.slides.base import READERS, recorded_reader
from ...data.slides.slide_table import SlideEntry
from ...data.tissue.base import segmenter_of
from ...errors import LongslideError
from ...registry import import_object, is_factory
from ..batch.ledger import SlideResult, make_output_folder
from ..batch.progress import JobProgress
from ..embed.embed import (
    EmbedJob,
    PreparedSlide,
    SlideEncoderChoice,
    TileEncoderChoice,
    identity,
    look_at_tile_encoder,
)

if TYPE_CHECKING:
    import torch

    from ...models.classifier.classifier import SlideClassifier

OUTLIER_RATIO = 1.5
"""A slide is far from training when the distance of its mean embedding is so many times the training slides' 99th
percentile: of slides like those of training, few are beyond it, and none by as much."""

MPP_TOLERANCE = 0.02
"""Scanners of one kind differ by about a hundredth in their microns per pixel."""


@dataclass
class FeatureMaker:
    """Makes the features of slides, with the settings of a checkpoint; the encoders are loaded when first needed.

    Attributes:
        preprocessing: How the training features were made, from the checkpoint.
        folder: Where feature files are looked for, and written.
        reads_slide_embedding: Whether the classifier reads slide embeddings.
        tile_encoder: The user's own tile encoder, as `embed` takes it.
        slide_encoder: The user's own slide encoder, as `embed` takes it.
        tile_checkpoint: The user's weights of the tile encoder.
        slide_checkpoint: The user's weights of the slide encoder.
        max_bad_tiles: Unreadable tiles that a slide may have.
        batch_size: Tiles a batch; None for what is fastest on the device.
        threads: Threads that read tiles.
        device: Where the encoders run.
        precision: Precision of the encoders, or `auto`.
    """

    preprocessing: Mapping[str, Any]
    folder: Path
    reads_slide_embedding: bool
    tile_encoder: TileEncoderChoice | None
    slide_encoder: SlideEncoderChoice | None
    tile_checkpoint: str | Path | None
    slide_checkpoint: str | Path | None
    max_bad_tiles: int
    batch_size: int | None
    threads: int
    device: "torch.device"
    precision: str
    _job: EmbedJob | None = field(default=None, init=False)

    @property
    def description(self) -> str:
        """What the features are, in a line."""
        known = {name: "?" if value is None else value for name, value in self.preprocessing.items()}
        return (
            f"tile encoder {known.get('tile_encoder', '?')} ({known.get('tile_weights', '?')}), tiles of "
            f"{known.get('tile_px', '?')} px at {known.get('mpp', '?')} um/px, overlap {known.get('overlap', '?')} px"
        )

    def path(self, entry: SlideEntry) -> Path:
        """The feature file of a slide."""
        return self.folder / f"{entry.slide_id}.h5"

    def check(self, entry: SlideEntry, features: Features) -> list[str]:
        """Hold a feature file against the checkpoint.

        Returns:
            What the user should know about it.

        Raises:
            LongslideError: It was made with other settings than the training features, or of another slide.
        """
        must = MUST_AGREE | (MUST_AGREE_SLIDE if self.reads_slide_embedding else {})
        different, silent = [], []
        for name, attribute in must.items():
            wanted, there = self.preprocessing.get(name), getattr(features, attribute)
            if wanted is not None and there is None:
                silent.append(name)
            elif wanted is not None and not _same(name, there, wanted):
                different.append(f"{name} {there} there, {wanted} in training")
        if entry.slide_mpp is not None and features.slide_mpp is not None and features.slide_mpp != entry.slide_mpp:
            different.append(f"slide_mpp {features.slide_mpp} there, {entry.slide_mpp} now")
        if features.slide_path is not None and Path(features.slide_path).name != entry.path.name:
            different.append(f"slide {Path(features.slide_path).name} there, {entry.path.name} now")
        if different:
            raise LongslideError(
                f"{self.path(entry)}: the features are not like those of training ({'; '.join(different)}); choose "
                "another --features, and they are made anew"
            )
        remarks = [f"the feature file does not say its {', '.join(silent)}"] if silent else []
        for name in ("min_tissue", "tissue_method", "tissue_settings", "reader"):
            wanted, there = self.preprocessing.get(name), getattr(features, name, features.settings.get(name))
            masks = any(str(value).startswith("mask:") for value in (wanted, there))
            if None not in (wanted, there) and not masks and wanted != there:
                remarks.append(f"{name} {there}, {wanted} in training")
        return remarks

    def load_encoders(self) -> None:
        """Load what makes features.

        Raises:
            LongslideError: The checkpoint does not say enough, or encoders are unavailable or are not those of training.
        """
        self._embed_job()

    def prepare(self, entry: SlideEntry) -> PreparedSlide | SlideResult:
        """All that comes before the tile encoder."""
        return self._embed_job().prepare(entry)

    def finish(self, prepared: PreparedSlide, progress: JobProgress) -> SlideResult:
        """Write the feature file."""
        return self._embed_job().finish(prepared, progress)

    def _embed_job(self) -> EmbedJob:
        if self._job is None:
            self._job = self._make_job()
        return self._job

    def _make_job(self) -> EmbedJob:
        from ...models.tile_encoder.encoder import create_tile_encoder
        from ..embed.tile_embedding import TileEmbedder, resolve_precision, slide_encoder_on

        facts = self.preprocessing
        unknown = [name for name in ("mpp", "tile_px", "overlap") if facts.get(name) is None]
        if facts.get("tile_encoder") is None and self.tile_encoder is None:
            unknown.insert(0, "tile_encoder")
        if unknown:
            raise LongslideError(
                f"the checkpoint does not say the {', '.join(unknown)} of its training features, which another tool made: "
                "make those of the new slides with it too, and give their folder with --features"
            )
        make_output_folder(self.folder, "--features")
        checkpoint, seed = _weights_to_load(self.tile_checkpoint, facts.get("tile_weights"))
        recorded = facts.get("tile_encoder")
        try:
            if self.tile_encoder is None and is_factory(recorded):
                import_object(str(recorded), f"tile encoder {recorded!r}", by_stranger=True)
            choice = str(recorded) if self.tile_encoder is None else self.tile_encoder
            _, choice, tile_weights = look_at_tile_encoder(choice, checkpoint, seed)
        except LongslideError as error:
            raise LongslideError(
                f"the classifier's tile encoder: {error} One of your own is given with --tile-encoder: a YAML file, or "
                "package.module:factory."
            ) from error
        encoder = create_tile_encoder(choice, checkpoint=tile_weights, seed=seed)
        _check_weights("tile", encoder.weights, facts.get("tile_weights"))
        slide_encoder = None
        if self.reads_slide_embedding:
            from ...models.slide_encoder.base import load_slide_encoder

            if facts.get("slide_encoder") is None:
                raise LongslideError(
                    "the checkpoint does not say the slide encoder of its training features: embed the new slides with it, "
                    "and give their folder with --features"
                )
            checkpoint, seed = _weights_to_load(self.slide_checkpoint, facts.get("slide_weights"))
            try:
                slide_encoder = load_slide_encoder(
                    facts["slide_encoder"] if self.slide_encoder is None else self.slide_encoder,
                    checkpoint=checkpoint,
                    pool=facts.get("pool") or "mean",
                    seed=seed,
                    tile_encoder=encoder.spec.name,
                    tile_dim=encoder.dim,
                )
            except LongslideError as error:
                raise LongslideError(
                    f"the classifier's slide encoder: {error} One of your own is given with --slide-encoder: a YAML file, "
                    "or package.module:factory."
                ) from error
            slide_encoder = slide_encoder_on(self.device, slide_encoder)
            _check_weights("slide", slide_encoder.weights, facts.get("slide_weights"))
        precision = resolve_precision(self.precision, encoder.spec.precision, self.device)
        reader = recorded_reader(facts.get("reader"))
        return EmbedJob(
            output=self.folder,
            embedder=TileEmbedder(encoder, self.device, precision, self.batch_size),
            slide_encoder=slide_encoder,
            tile_mpp=facts["mpp"],
            tile_px=facts["tile_px"],
            overlap=facts["overlap"],
            min_tissue=0.1 if facts.get("min_tissue") is None else facts["min_tissue"],
            tissue=segmenter_of(facts.get("tissue_segmenter"), facts.get("tissue_settings")),
            reader=None if reader is None else READERS.name_of(reader),
            max_bad_tiles=self.max_bad_tiles,
            threads=self.threads,
            overwrite=False,
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
        if not low * (1 - MPP_TOLERANCE) <= slide_mpp <= high * (1 + MPP_TOLERANCE):
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


def _same(name: str, there: Any, wanted: Any) -> bool:
    return bool(np.isclose(there, wanted, rtol=0.01)) if name == "mpp" else identity(there) == identity(wanted)


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
    if trained is not None and identity(loaded) != identity(trained):
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

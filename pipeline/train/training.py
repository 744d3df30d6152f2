"""Training of one fold: model, data and trainer from the settings, the training itself, and what it predicts."""

import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning import Trainer, seed_everything
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint

from ...data.cohort.cohort import Cohort
from ...data.cohort.datamodule import BagDataModule
from ...data.cohort.options import DataOptions
from ...data.cohort.splits import PARTS, check_validation
from ...data.features.preprocessing import Preprocessing
from ...data.whole_file import remove_leftovers
from ...errors import LongslideError
from ...models.aggregators.slide_encoder import use_cuda_graphs
from ...models.checkpoint_file import read_checkpoint
from ...models.classifier.cases import CaseRecord
from ...models.classifier.checkpoint import load_classifier
from ...models.classifier.classifier import SlideClassifier, TrainingFacts
from ...models.classifier.options import ClassifierOptions
from ...models.classifier.selection import SELECTION_METRIC
from ...models.slide_encoder.mae import MaskedAutoencoder, UnlabelledFacts
from ..log_file import event
from ..parser import one_line
from ..seen import Seen
from .callbacks import BestCheckpoint, DefinedMetric, EpochLines, History, StepSeed
from .checkpoint_io import WholeFileCheckpoints
from .prediction_table import prediction_rows, run_classifier
from .run import HISTORY
from .settings import Settings, settle
from .steps import Steps, is_limited, plan_steps


@dataclass(frozen=True)
class Training:
    """What one fold is trained with.

    Attributes:
        model: The model.
        data: The data, of this fold.
        trainer: The trainer.
        folder: Where its checkpoints go.
        name: What it is called, for messages.
        steps: How long it is trained.
    """

    model: SlideClassifier | MaskedAutoencoder
    data: BagDataModule
    trainer: Trainer
    folder: Path
    name: str
    steps: Steps

    @property
    def counts(self) -> list[dict[str, Any]]:
        """What is in each part of the fold, for `run.json`."""
        return [row | {"fold": self.data.fold} for row in self.data.counts()]

    @property
    def course(self) -> list[dict[str, Any]]:
        """How long the fold is trained, for `run.json`."""
        return [self.steps.to_dict() | {"fold": self.data.fold}]

    @property
    def aggregator(self) -> dict[str, Any]:
        """The model that was built, for `run.json`."""
        return describe_model(self.model)


def describe_model(model: SlideClassifier | MaskedAutoencoder) -> dict[str, Any]:
    """Name, options, slide encoder and size of a model as it is, whatever the options asked for.

    Returns:
        `name`, `options` (of a classifier), `architecture` (spec and first weights of its slide encoder; None for none) and
        `parameters`, their number.
    """
    described = model.describe()
    built = described.get("aggregator") or {"name": "mae", "architecture": described["slide_encoder"]}
    return built | {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def quieten() -> None:
    """Leave out what Lightning says of itself and of what is meant to be so."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        "Checkpoint directory .* exists",
        ".*LeafSpec.*",
        ".*logging interval.*",
        ".*in eval mode at the start of training.*",
        ".*sync_dist=True.*",  # the validation metrics are of the bags of all processes already
    ):
        warnings.filterwarnings("ignore", message)


def open_data(settings: Settings, cohort: Cohort, inner_folds: int = 1) -> BagDataModule:
    """The data of all folds; feature files are not read yet.

    Args:
        settings: What is read.
        cohort: The cohort.
        inner_folds: Inner folds that each fold is divided into, for a selection.

    Raises:
        LongslideError: Splits that cannot be made, or a validation part by which no model can be selected.
    """
    quieten()
    trainer_options(settings.trainer)
    data = BagDataModule(settings.data, cohort, inner_folds=inner_folds)
    if settings.monitor != "val_loss":
        every_fold = settings.command != "fit"  # the last one too, before the first one is trained
        check_validation(data.splits, cohort, None if every_fold else data.fold)
    return data


def build(
    settings: Settings, data: BagDataModule, *, folder: Path | None = None, name: str = "", beside: bool = False
) -> Training:
    """Model and trainer for the fold of the data, from the seed.

    Args:
        settings: How to train.
        data: The data.
        folder: Where checkpoints and history go. Default: the run folder.
        name: What the training is called, for messages. Default: that of the fold.
        beside: Whether other processes write to the same terminal: a line for an epoch then, instead of a progress bar.

    Raises:
        LongslideError: Wrong input, or options that do not go together.
    """
    seed_everything(settings.seed, workers=True, verbose=False)
    model: SlideClassifier | MaskedAutoencoder
    try:
        if isinstance(settings.model, ClassifierOptions):
            model = SlideClassifier(facts_of(data), settings.model)
        else:
            model = MaskedAutoencoder(UnlabelledFacts(data.feature_dim, data.preprocessing), settings.model)
    except ValueError as error:  # options that do not go together
        raise LongslideError(" ".join(str(error).split())) from error
    data.setup()
    if isinstance(model, SlideClassifier):
        model.fold = data.fold
        model.bag_unit = data.options.bags
        model.slide_ids = {part: sum(len(bag.slide_ids) for bag in data.bags(part)) for part in ("train", "val")}
        model.cases = CaseRecord.of({part: data.cases(part) for part in PARTS})
        model.use_training_features(data.training_features.to_dict())
    folder, name = folder or settings.run, name or f"fold {data.fold}"
    options = {"default_root_dir": str(settings.run)} | trainer_options(settings.trainer)
    given = options.pop("callbacks", None) or []
    callbacks = [*_callbacks(settings, folder, name, data), *(given if isinstance(given, list) else [given])]
    plugins = options.pop("plugins", None) or []
    plugins = plugins if isinstance(plugins, list) else [plugins]
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins = [*plugins, WholeFileCheckpoints()]
    if (beside or not sys.stdout.isatty()) and options.get("enable_progress_bar") is None:
        options["enable_progress_bar"] = False
        metric = SELECTION_METRIC[model.task.kind] if isinstance(model, SlideClassifier) else ""
        callbacks.append(EpochLines(name, metric))
    limited = is_limited(options)
    try:
        trainer = Trainer(**options | ({} if limited else {"max_epochs": 1}), callbacks=callbacks, plugins=plugins)
    except (MisconfigurationException, ValueError) as error:
        raise LongslideError(f"--trainer: {' '.join(str(error).split())}") from error
    steps = plan_steps(data, trainer, None if limited else settings.epochs, settings.min_steps)
    return Training(model, data, trainer, folder, name, steps)


def trainer_options(given: dict[str, Any]) -> dict[str, Any]:
    """Options of Lightning's Trainer, checked and built again: objects, or what a YAML file says of them.

    Raises:
        LongslideError: An unknown option, or one of the wrong type.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)
    try:
        parsed = parser.parse_object({"trainer": given})
    except ArgumentError as error:
        raise LongslideError(one_line(str(error))) from error
    options = vars(parser.instantiate(parsed).trainer)
    return dict(options)


def _callbacks(settings: Settings, folder: Path, name: str, data: BagDataModule) -> list[Any]:
    callbacks: list[Any] = [StepSeed(settings.seed), History(folder / HISTORY, data.fold, name)]
    monitor = (settings.monitor or "val_loss") if data.bags("val") else None
    mode = "max" if monitor == "val_metric" else "min"
    if monitor is not None:
        callbacks.append(DefinedMetric(monitor))
        if settings.patience is not None:
            callbacks.append(EarlyStopping(monitor, patience=settings.patience, mode=mode))
    if settings.ema is not None:
        callbacks.append(EMAWeightAveraging(decay=settings.ema))
    options: dict[str, Any] = {"dirpath": folder, "enable_version_counter": False, "auto_insert_metric_name": False}
    callbacks.append(BestCheckpoint(monitor, mode=mode, **options))
    every = settings.checkpoint_every_n_steps
    if every is not None:
        callbacks.append(ModelCheckpoint(filename="last", every_n_train_steps=every, **options))
    callbacks.append(ModelCheckpoint(filename="last", every_n_epochs=1, save_on_train_epoch_end=True, **options))
    return callbacks


def facts_of(data: BagDataModule) -> TrainingFacts:
    """What a classifier must know of its training data.

    Raises:
        LongslideError: All targets of a regression are the same.
    """
    task, weights = data.task, data.class_weights
    mean, std = 0.0, 1.0
    if task.kind == "regression":
        targets = np.array([bag.target for bag in data.bags("train")], np.float64)
        mean, std = float(targets.mean()), float(targets.std())
        if not std > 0:
            raise LongslideError(f"all training slides have the {task.label[0]} {mean:g}; there is nothing to learn")
    return TrainingFacts(
        task=task,
        feature_dim=data.feature_dim,
        balanced_weights=() if weights is None else tuple(weights.tolist()),
        target_mean=mean,
        target_std=std,
        preprocessing=data.preprocessing,
    )


def train(training: Training) -> str:
    """Train, from the start or from `last.ckpt`.

    Returns:
        What is to be remarked of the training; mostly nothing.

    Raises:
        LongslideError: Wrong input.
        KeyboardInterrupt: Ctrl-C.
    """
    trainer, last, best = training.trainer, training.folder / "last.ckpt", training.folder / "best.ckpt"
    resume = last if last.is_file() else None
    if trainer.is_global_zero:
        for checkpoint in (last, best):
            remove_leftovers(checkpoint)
        print(f"{training.name}: {training.steps}", file=sys.stderr)
        event("fold", f"{training.name}: {training.steps}", {"fold": training.data.fold} | training.steps.to_dict())
        if training.steps.warning:
            print(training.steps.warning, file=sys.stderr)
        if resume is not None:
            print(f"going on from {last}", file=sys.stderr)
    use_cuda_graphs(training.model)
    try:
        trainer.fit(
            training.model, datamodule=training.data, ckpt_path=resume, weights_only=None if resume is None else True
        )
    except torch.OutOfMemoryError as error:
        raise LongslideError(
            "the GPU has too little memory: lower --data.max-tokens, or set "
            "--model.aggregator.checkpointing true, or --trainer.precision bf16-mixed"
        ) from error
    except SystemExit as end:  # Lightning's way to end after Ctrl-C
        if trainer.interrupted:
            raise KeyboardInterrupt from end
        raise
    if training.data.bags("val") and trainer.current_epoch > 1 and trainer.is_global_zero and best_epoch(best) == 0:
        return f"{training.name}: the best epoch is the first: training did not improve on the validation part"
    return ""


def best_epoch(checkpoint: Path) -> int:
    """The epoch that a checkpoint is of, from 0."""
    return int(read_checkpoint(checkpoint)["epoch"])


def open_test_data(
    checkpoint: Path, options: DataOptions, allow_seen: bool
) -> tuple[SlideClassifier, BagDataModule, Seen]:
    """A classifier, a whole cohort as a test part with labels as the classifier knows them, and what of it was seen before.

    Raises:
        LongslideError: Wrong input, features that the classifier was not trained on, or, unless allowed, slides that it was.
    """
    classifier = load_classifier(checkpoint)
    task = classifier.task
    data = BagDataModule(
        settle(
            "test",
            options,
            label=options.label or list(task.label),
            task=task.kind,
            classes=list(task.classes) or None,
            times=list(task.times) or None,
            discrete_time=task.discrete_time,
            splits="test",
            bags=classifier.bag_unit,
            slide_embeddings=classifier.aggregator.reads_slide_embedding,
        )
    )
    _check_features(checkpoint, classifier, data)
    seen = Seen.of([classifier.cases], data.cases("test"))
    if not allow_seen:
        seen.refuse(str(options.table))
    data.setup()
    return classifier, data, seen


def _check_features(checkpoint: Path, classifier: SlideClassifier, data: BagDataModule) -> None:
    """Refuse features that a classifier was not trained on; lesser differences are printed."""
    made_with = data.survey.preprocessing
    trained = Preprocessing.from_dict(classifier.facts.preprocessing)
    if ways := made_with.unlike_training(trained):
        raise LongslideError(
            f"{data.options.features}: the features are not like those {checkpoint} was trained on ({'; '.join(ways)}); "
            "embed the slides as those were"
        )
    if data.feature_dim != classifier.facts.feature_dim:
        raise LongslideError(
            f"{checkpoint}: reads embeddings of length {classifier.facts.feature_dim}, but these have {data.feature_dim}"
        )
    for remark in made_with.remarks(trained):
        print(remark, file=sys.stderr)


def predict_test_part(
    classifier: SlideClassifier, data: BagDataModule, seen: Seen, accelerator: str, precision: Any
) -> pd.DataFrame:
    """The rows of `predictions.csv` of a test part, predicted on one device."""
    trainer = Trainer(accelerator=accelerator, devices=1, precision=precision, logger=False, enable_checkpointing=False)
    context = trainer.precision_plugin.forward_context()
    device = trainer.strategy.root_device
    outputs = run_classifier(classifier, data.in_order("test", device), device, context)
    bags, whole = data.bags("test"), not data.cohort.mixed_patients
    return prediction_rows(classifier, outputs, bags, fold=0, part="test", seen=seen.mark, of_patients=whole)

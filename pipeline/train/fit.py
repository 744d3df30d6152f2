"""Train one model: a slide classifier, or the masked autoencoder."""

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from lightning.pytorch.utilities import rank_zero_only

from ...data.cohort.splits import Part
from ...data.whole_file import write_whole
from ...errors import LongslideError
from ...models.aggregators.slide_encoder import use_cuda_graphs
from ...models.classifier.checkpoint import load_classifier
from ...models.classifier.classifier import SlideClassifier
from ...models.classifier.objective import Cox
from .options import Training, TrainingCLI
from .prediction_table import Outputs, calibrate, prediction_rows, run_classifier
from .run import TrainingRun, tell


def fit(argv: Sequence[str]) -> int:
    """Run `longslide fit`.

    Args:
        argv: The words after `fit`.

    Returns:
        The exit status, 0.

    Raises:
        LongslideError: Wrong usage or input.
    """
    cli = TrainingCLI("fit", argv)
    run = TrainingRun(cli.run, cli.resolved(), cli.subgroups) if getattr(rank_zero_only, "rank", 0) == 0 else None
    training = cli.build()
    classifies = isinstance(training.model, SlideClassifier)
    if run is not None:
        run.describe(
            training.data,
            training.data.task if classifies else None,
            command="fit",
            aggregator=aggregator_facts(training),
            seed=cli.seed,
            counts=[row | {"fold": training.data.fold} for row in training.data.counts()],
        )
    train(training, run)
    if run is None or not training.trainer.is_global_zero:
        return 0
    if not classifies:
        run.facts["finished"] = True
        run.write()
        print(f"pretrained: use it by --model.checkpoint {cli.run / 'best.ckpt'}")
        return 0
    rows = held_out_predictions(training)
    metrics = run.finish(rows, training.data.task, bootstrap=cli.config["bootstrap"], cohort=training.data.cohort.rows)
    tell(metrics, cli.run)
    return 0


def train(training: Training, run: TrainingRun | None) -> None:
    """Train, from the start or from `last.ckpt`; not at all if the run has trained this fold already.

    Args:
        training: What to train.
        run: The run folder; None on other ranks than the first.

    Raises:
        LongslideError: Wrong input.
        KeyboardInterrupt: Ctrl-C.
    """
    fold, trainer = training.data.fold, training.trainer
    if run is not None and fold in run.trained:
        return
    last = training.folder / "last.ckpt"
    resume = last if last.is_file() else None
    if resume is not None and run is not None:
        print(f"going on from {last}", file=sys.stderr)
    use_cuda_graphs(training.model)
    try:
        trainer.fit(
            training.model, datamodule=training.data, ckpt_path=resume, weights_only=None if resume is None else True
        )
    except torch.OutOfMemoryError as error:
        raise LongslideError(
            "the GPU has too little memory: lower --data.max_tokens, or set --model.longnet.checkpointing true (or "
            "--model.gigapath.checkpointing), or --trainer.precision bf16-mixed"
        ) from error
    except SystemExit as end:  # Lightning's way to end after Ctrl-C
        if trainer.interrupted:
            raise KeyboardInterrupt from end
        raise
    if run is not None:
        run.trained.append(fold)
        run.write()


def held_out_predictions(training: Training) -> list[pd.DataFrame]:
    """Calibrate the best model on the validation part, and predict the validation and test parts with it.

    The calibration goes into `best.ckpt`.
    """
    best = training.folder / "best.ckpt"
    classifier = load_classifier(best)
    data = training.data.with_fold(training.data.fold)  # without the trainer: all bags, on this device
    device = training.trainer.strategy.root_device

    def outputs_of(part: Part) -> Outputs:
        return run_classifier(
            classifier, data.in_order(part), device, training.trainer.precision_plugin.forward_context()
        )

    tables = []
    if data.bags("val"):
        validation = outputs_of("val")
        calibrate(classifier, validation)
        tables.append(prediction_rows(classifier, validation, data.bags("val"), fold=data.fold, part="val"))
    elif isinstance(classifier.objective, Cox):  # survival needs a baseline, if need be that of the training part
        training_outputs = outputs_of("train")
        classifier.objective.fit_baseline(training_outputs.raw, training_outputs.target)
    store_calibration(best, classifier)
    if data.bags("test"):
        tables.append(prediction_rows(classifier, outputs_of("test"), data.bags("test"), fold=data.fold, part="test"))
    return tables


def store_calibration(path: Path, classifier: SlideClassifier) -> None:
    """Put temperature, thresholds and baseline hazard into a checkpoint, whole or not at all."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    content["longslide"] |= {"temperature": classifier.temperature, "thresholds": classifier.thresholds}
    content["state_dict"] |= {f"objective.{name}": value for name, value in classifier.objective.state_dict().items()}
    stream = io.BytesIO()
    torch.save(content, stream)
    write_whole(path, stream.getbuffer(), "--run")


def aggregator_facts(training: Training) -> dict[str, object]:
    """Name, options and size of the model, for `run.json`."""
    model = training.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if not isinstance(model, SlideClassifier):
        return {"name": "mae", "parameters": parameters}
    described = model.describe()["aggregator"]
    return {"name": described["name"], "options": described["options"], "parameters": parameters}

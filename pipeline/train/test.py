"""Evaluate a trained classifier on another cohort."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning import Trainer

from ...data.cohort.datamodule import BagDataModule
from ...errors import LongslideError
from ...models.classifier.checkpoint import check_preprocessing, load_classifier
from ...models.classifier.classifier import SlideClassifier
from .options import SUBGROUPS_HELP, TrainingParser, quieten
from .prediction_table import prediction_rows, run_classifier
from .run import TrainingRun, tell

# What the checkpoint says, and the command line does not.
_FROM_CHECKPOINT = {"task", "classes", "times", "discrete_time", "task_file", "slide_embeddings", "bags"}
_FOR_TRAINING = {
    "splits",
    "fold",
    "folds",
    "val_share",
    "test_share",
    "keep_sites_apart",
    "max_tiles",
    "balance",
    "augment",
}


def test(argv: Sequence[str]) -> int:
    """Run `longslide test`.

    Args:
        argv: The words after `test`.

    Returns:
        The exit status, 0.

    Raises:
        LongslideError: Wrong usage or input, or features that the classifier was not trained on.
    """
    quieten()
    parser = _parser()
    config = parser.parse_args(list(argv))
    checkpoint = Path(config.checkpoint)
    classifier = load_classifier(checkpoint)
    folder = config.run or Path("runs") / f"{checkpoint.resolve().parent.name}-test"
    run = TrainingRun(folder, parser.dump(config, skip_none=False), config.subgroups)
    data = _data(classifier, config.data.as_dict())
    check_preprocessing(checkpoint, classifier, data.preprocessing, data.feature_dim)
    data.setup()
    task = classifier.task
    run.describe(
        data,
        task,
        command="test",
        checkpoint=str(checkpoint),
        aggregator={"name": classifier.aggregator_name},
        counts=[row | {"fold": 0} for row in data.counts()],
        risk_threshold=(classifier.thresholds or {}).get("risk"),
    )
    trainer = Trainer(
        accelerator=config.accelerator, devices=1, precision=config.precision, logger=False, enable_checkpointing=False
    )
    outputs = run_classifier(
        classifier, data.in_order("test"), trainer.strategy.root_device, trainer.precision_plugin.forward_context()
    )
    rows = prediction_rows(classifier, outputs, data.bags("test"), fold=0, part="test")
    tell(run.finish([rows], task, bootstrap=config.bootstrap, cohort=data.cohort.rows), folder)
    return 0


def _parser() -> TrainingParser:
    parser = TrainingParser(
        prog="longslide test",
        description="Evaluate a trained classifier on another cohort.",
        print_config="--print_config",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options as keys.")
    parser.add_argument("--checkpoint", type=str, required=True, help="A checkpoint of longslide fit or crossval.")
    parser.add_argument("--run", type=Path | None, default=None, help="Run folder. Default: runs/<run>-test.")
    parser.add_argument("--bootstrap", type=int, default=1000, help="Resamples for the intervals of the metrics.")
    parser.add_argument("--subgroups", type=str, default="", help=SUBGROUPS_HELP)
    parser.add_argument("--accelerator", type=str, default="auto", help="Device, as Lightning names it.")
    parser.add_argument(
        "--precision",
        type=Literal["32-true", "bf16-mixed", "16-mixed"],
        default="32-true",
        help="Lightning's precision.",
    )
    parser.add_class_arguments(BagDataModule, "data", skip=_FROM_CHECKPOINT | _FOR_TRAINING)
    return parser


def _data(classifier: SlideClassifier, options: dict[str, Any]) -> BagDataModule:
    """The whole cohort as a test part, with labels as the classifier knows them."""
    task = classifier.task
    if options.get("table") is None:
        raise LongslideError("longslide test needs labels: give --data.table; `longslide predict` does without")
    options["label"] = options["label"] or list(task.label)
    return BagDataModule(
        **options,
        task=task.kind,
        classes=list(task.classes) or None,
        times=list(task.times) or None,
        discrete_time=task.discrete_time,
        splits="test",
        bags=classifier.bag_unit,
        slide_embeddings=classifier.aggregator.reads_slide_embedding,
    )

"""The options of training: LightningCLI over the data module, the model and the trainer."""

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import yaml
from lightning import LightningModule, Trainer, seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from ...data.cohort.datamodule import BagDataModule
from ...data.cohort.splits import check_validation
from ...errors import LongslideError
from ...models.classifier.classifier import SlideClassifier, TrainingFacts
from ...models.slide_encoder.mae import MaskedAutoencoder, UnlabelledFacts
from ..cli import refused_value
from .callbacks import BestCheckpoint, DefinedMetric, History, StepSeed

Method = Literal["classifier", "mae"]

SUBGROUPS_HELP = "Columns of the table to evaluate by too, separated by commas. Default: site, if there is one."

TRAINER_DEFAULTS = {
    "max_epochs": 20,
    "gradient_clip_val": 1.0,
    "logger": False,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}
"""Where training differs from Lightning's own defaults; `history.csv` is written without a logger."""


@dataclass(frozen=True)
class Training:
    """What one fold is trained with.

    Attributes:
        model: The model.
        data: The data, of this fold.
        trainer: The trainer.
        folder: Where its checkpoints go.
    """

    model: LightningModule
    data: BagDataModule
    trainer: Trainer
    folder: Path


def quieten() -> None:
    """Leave out what Lightning says of itself and of what is meant to be so."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LightningCLI's own calls
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        "Checkpoint directory .* exists",
        ".*LeafSpec.*",
        ".*logging interval.*",
        ".*in eval mode at the start of training.*",
    ):
        warnings.filterwarnings("ignore", message)


class TrainingParser(LightningArgumentParser):
    """A parser whose errors are one line: there are too many options to list them each time."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong, and exit with status 2."""
        if self.exit_on_error:
            if refused := refused_value(message):
                message = f"--{refused[0]} {refused[1]}"
            line = " ".join(message.split())
            self.exit(2, f"{self.prog}: {line}; `{self.prog} --help` lists the options\n")
        super().error(message, ex)


class TrainingCLI(LightningCLI):
    """Options from YAML files and the command line. Nothing is built before `build`.

    Args:
        command: `fit` or `crossval`.
        argv: The words after the command; a recipe of the package may be given by its name alone.
    """

    def __init__(self, command: Literal["fit", "crossval"], argv: Sequence[str]) -> None:
        quieten()
        self.command = command
        words = with_recipe_paths(argv)
        self.method = method_of(words)
        self._data: BagDataModule | None = None
        super().__init__(
            model_class=SlideClassifier if self.method == "classifier" else MaskedAutoencoder,
            datamodule_class=BagDataModule,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS | ({"devices": 1} if command == "crossval" else {}),
            seed_everything_default=0,
            parser_kwargs={
                "prog": f"longslide {command}",
                "description": f"Recipes for --config: {', '.join(list_recipes())}.",
                "dump_header": None,
            },
            parser_class=TrainingParser,
            args=words,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options beside those of data, model and trainer."""
        parser.add_argument(
            "--method", type=Method, default="classifier", help="Train a classifier, or pretrain by mae."
        )
        parser.add_argument("--run", type=Path | None, default=None, help="Run folder. Default: runs/<aggregator>.")
        metrics = Literal["val_metric", "val_loss"] if self.method == "classifier" else Literal["val_loss"]
        parser.add_argument(
            "--monitor",
            type=metrics,
            default="val_loss" if self.method == "mae" else "val_metric",
            help="What best.ckpt is best by.",
        )
        parser.add_argument(
            "--patience", type=int | None, default=None, help="Epochs without a better one after which training stops."
        )
        parser.add_argument(
            "--ema", type=float | None, default=None, help="Decay of an average of the weights, such as 0.999."
        )
        parser.add_argument(
            "--checkpoint_every_n_steps", type=int | None, default=None, help="Write last.ckpt within epochs too."
        )
        if self.method == "classifier":
            parser.add_argument(
                "--bootstrap", type=int, default=1000, help="Resamples for the intervals of the metrics."
            )
            parser.add_argument("--subgroups", type=str, default="", help=SUBGROUPS_HELP)
            parser.link_arguments("model.aggregator", "data.slide_embeddings", lambda name: name == "linear-probe")
        if self.command == "crossval":
            parser.add_argument("--folds", type=int, default=5, help="Folds, if the splits are not given.")
            parser.link_arguments("folds", "data.folds")
        parser.link_arguments("data", "model.facts", compute_fn=self._facts, apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the words given, whatever those of the process are."""
        assert isinstance(args, list)
        self.config = parser.parse_args(args)

    def instantiate_classes(self) -> None:
        """Nothing yet: see `build`."""

    @property
    def seed(self) -> int:
        """The seed."""
        return int(self.config["seed_everything"])

    @property
    def run(self) -> Path:
        """The run folder."""
        if self.config["run"] is not None:
            return Path(self.config["run"])
        return Path("runs") / (self.config["model"]["aggregator"] if self.method == "classifier" else "mae")

    @property
    def subgroups(self) -> str:
        """Columns to evaluate by; a masked autoencoder has none."""
        return str(self.config.get("subgroups", ""))

    def resolved(self) -> str:
        """The resolved configuration as YAML."""
        return str(self.parser.dump(self.config, skip_none=False))

    def build(self, fold: int | None = None) -> Training:
        """Model, data and trainer of a fold, from one seed; the data of all folds share what was read.

        Raises:
            LongslideError: Wrong input, or options that do not go together.
        """
        config = self.config.clone()
        if (accumulated := config["trainer"]["accumulate_grad_batches"]) < 1:
            raise LongslideError(f"--trainer.accumulate_grad_batches {accumulated} must be at least 1")
        folder = self.run
        if fold is not None:
            config["data"]["fold"] = fold
        if self.command == "crossval":
            folder = folder / f"fold_{config['data']['fold']}"
        seed_everything(self.seed, workers=True, verbose=False)
        try:
            self.config_init = self.parser.instantiate_classes(config)
        except ValueError as error:
            if isinstance(error.__cause__, LongslideError):
                raise
            raise LongslideError(" ".join(str(error).split())) from error  # options that do not go together
        model, data = self.config_init["model"], self._data
        assert data is not None
        data.setup()
        if isinstance(model, SlideClassifier):
            model.fold = data.fold
            model.bag_unit = data.bag_unit
            model.slide_ids = {part: sum(len(bag.slide_ids) for bag in data.bags(part)) for part in ("train", "val")}
            model.use_training_features(data.training_features.to_dict())
        trainer_config = dict(self.config_init["trainer"])
        trainer_config["default_root_dir"] = trainer_config["default_root_dir"] or str(self.run)
        own = self._callbacks(folder, data)
        try:
            trainer = self._instantiate_trainer(trainer_config, own)
        except (MisconfigurationException, ValueError) as error:
            raise LongslideError(f"--trainer: {' '.join(str(error).split())}") from error
        return Training(model, data, trainer, folder)

    def _callbacks(self, folder: Path, data: BagDataModule) -> list[Any]:
        config = self.config
        callbacks: list[Any] = [StepSeed(self.seed), History(self.run / "history.csv", data.fold)]
        validates = bool(data.bags("val"))
        monitor = config["monitor"] if validates else None
        mode = "max" if monitor == "val_metric" else "min"
        if monitor is not None:
            callbacks.append(DefinedMetric(monitor))
            if config["patience"] is not None:
                callbacks.append(EarlyStopping(monitor, patience=config["patience"], mode=mode))
        if config["ema"] is not None:
            callbacks.append(EMAWeightAveraging(decay=config["ema"]))
        options: dict[str, Any] = {"dirpath": folder, "enable_version_counter": False, "auto_insert_metric_name": False}
        callbacks.append(BestCheckpoint(monitor, mode=mode, **options))
        every = config["checkpoint_every_n_steps"]
        if every is not None:
            callbacks.append(ModelCheckpoint(filename="last", every_n_train_steps=every, **options))
        callbacks.append(ModelCheckpoint(filename="last", every_n_epochs=1, save_on_train_epoch_end=True, **options))
        return callbacks

    def _facts(self, data: BagDataModule) -> TrainingFacts | UnlabelledFacts:
        """What the model must know of the data; called while the two are built."""
        self._data = data if self._data is None else self._data.with_fold(data.fold)
        if self.method == "mae":
            return UnlabelledFacts(self._data.feature_dim, self._data.preprocessing)
        if self.config["monitor"] == "val_metric":
            every_fold = self.command == "crossval"  # the last one too, before the first one is trained
            check_validation(self._data.splits, self._data.cohort, None if every_fold else data.fold)
        return facts_of(self._data)


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


def recipes() -> Path:
    """The folder of the recipes."""
    return Path(str(files("longslide.configs"))) / "fit"


def list_recipes() -> list[str]:
    """Names of the recipes."""
    return sorted(path.stem for path in recipes().glob("*.yaml"))


def with_recipe_paths(argv: Sequence[str]) -> list[str]:
    """The words, with `--config <name>` (or `configs/fit/<name>.yaml`) of a recipe of the package replaced by its path.

    Raises:
        LongslideError: A name that is neither a file's nor a recipe's.
    """
    words = list(argv)
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name not in ("--config", "-c") or (not equals and i + 1 == len(words)):
            continue
        value = value if equals else words[i + 1]
        if Path(value).exists():
            continue
        if Path(value).parent == Path("configs/fit"):  # as it is in the repository
            value = Path(value).stem
        if Path(value).suffix:
            raise LongslideError(f"--config {value}: no such file")
        if value not in list_recipes():
            raise LongslideError(
                f"--config {value}: neither a file nor a recipe; recipes are {', '.join(list_recipes())}"
            )
        path = f"{recipes() / value}.yaml"
        words[i if equals else i + 1] = f"{name}={path}" if equals else path
    return words


def method_of(argv: Sequence[str]) -> Method:
    """What is trained: it decides which options there are, so it is looked for before they are parsed.

    Raises:
        LongslideError: A configuration file is not YAML.
    """
    method = "classifier"
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in ("--method", "--config", "-c"):
            continue
        value = value if equals else next(words, "")
        if name == "--method":
            method = value
        elif Path(value).is_file():
            try:
                content = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise LongslideError(f"--config {value}: not YAML: {' '.join(str(error).split())}") from error
            if isinstance(content, dict):
                method = str(content.get("method", method))
    return "mae" if method == "mae" else "classifier"

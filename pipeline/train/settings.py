"""What a training command is asked for, and the recipes. Nothing here imports torch: mistakes are found before it is."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...data.cohort.options import DataOptions
from ...errors import LongslideError
from ...models.classifier.options import ClassifierOptions
from ...models.slide_encoder.mae_options import PretrainingOptions

if TYPE_CHECKING:
    from ...data.cohort.cohort import Cohort

Command = Literal["fit", "crossval", "sweep", "pretrain", "test"]

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Variables that say which of several processes this is, in Lightning's order."""

_LABELS = frozenset({"task", "label", "classes", "positive", "times", "discrete_time", "task_file"})

SETTLED: dict[Command, frozenset[str]] = {
    "fit": frozenset({"slide_embeddings"}),
    "crossval": frozenset({"slide_embeddings", "fold", "folds"}),
    "sweep": frozenset({"slide_embeddings", "fold", "folds"}),
    "pretrain": _LABELS | {"slide_embeddings", "balance"},
    "test": (_LABELS - {"label"})
    | {"slide_embeddings", "bags", "splits", "fold", "folds", "val_share", "test_share"}
    | {"keep_sites_apart", "max_tiles", "balance", "augment"},
}
"""Data options that a command sets itself: it does not offer them."""

TRAINER_DEFAULTS = {
    "gradient_clip_val": 1.0,
    "logger": False,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}
"""Where training differs from Lightning's own defaults; `history.csv` is written without a logger."""


def settle(command: Command, data: DataOptions, **settled: Any) -> DataOptions:
    """The data options as the command needs them.

    Args:
        command: The command.
        data: The options as they were given.
        **settled: What the command sets.

    Raises:
        LongslideError: An option is given that the command sets itself.
    """
    for field in fields(data):
        if field.name in SETTLED[command] and getattr(data, field.name) != field.default:
            name = field.name.replace("_", "-")
            raise LongslideError(f"longslide {command} sets --data.{name} itself; leave it out")
    return replace(data, **settled)


@dataclass(frozen=True)
class Settings:
    """How `fit`, `crossval`, `sweep` and `pretrain` train.

    Attributes:
        command: Which of them.
        data: The data.
        model: The model.
        run: The run folder.
        trainer: Options of Lightning's Trainer that differ from its defaults.
        monitor: What `best.ckpt` is best by; None for `val_loss` of a validation part that defines `val_metric` too.
        epochs: Passes over the training bags.
        min_steps: Optimiser steps at least.
        patience: Epochs without a better one after which training stops.
        ema: Decay of an average of the weights.
        checkpoint_every_n_steps: Steps after which `last.ckpt` is written within epochs too.
        seed: The seed.
        further: Other options of the command.
    """

    command: Command
    data: DataOptions
    model: ClassifierOptions | PretrainingOptions
    run: Path
    trainer: dict[str, Any]
    monitor: Literal["val_metric", "val_loss"] | None
    epochs: int
    min_steps: int
    patience: int | None
    ema: float | None
    checkpoint_every_n_steps: int | None
    seed: int
    further: Mapping[str, Any]

    def read_cohort(self) -> "Cohort":
        """The cohort, which has labels unless a slide encoder is pretrained.

        Raises:
            LongslideError: Table, labels or feature files are wrong.
        """
        cohort = self.data.read_cohort()
        if self.command != "pretrain":
            _ = cohort.labelled_task
        return cohort

    def on(self, device: str) -> "Settings":
        """The same on one device: `cpu`, or `cuda:1`."""
        kind, _, index = device.partition(":")
        place = {"accelerator": kind, "devices": 1}
        if kind == "cuda":
            place = {"accelerator": "gpu", "devices": [int(index or 0)]}
        return replace(self, trainer=self.trainer | place)

    @property
    def configuration(self) -> dict[str, Any]:
        """What `config.yaml` holds, in plain types: the options of the command by name."""
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "further"}
        command = options.pop("command")
        if command == "pretrain":
            del options["monitor"]
        return configuration(command, options | dict(self.further))


def configuration(command: Command, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a command in plain types, without what the command sets itself."""
    content = plain(options)
    content["data"] = {name: value for name, value in content["data"].items() if name not in SETTLED[command]}
    return dict(content)


def plain(value: Any) -> Any:
    """A value in types that YAML knows; an object becomes the name of its class."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value) if isinstance(value, Path) else f"{type(value).__module__}.{type(value).__qualname__}"


def column_names(columns: str | Sequence[str]) -> list[str]:
    """Names of columns, given one by one or separated by commas."""
    names = columns.split(",") if isinstance(columns, str) else columns
    return [name.strip() for name in names if name.strip()]


def first_process() -> bool:
    """Whether this is the only process of the job, or the first: by the variables that Lightning goes by too."""
    return next((int(os.environ[name]) for name in RANKS if name in os.environ), 0) == 0


def alone() -> None:
    """Let this process train by itself, though a cluster's variables count it among others. Before Lightning is imported."""
    for name in (*RANKS, "SLURM_NTASKS"):
        os.environ.pop(name, None)


def recipes(command: Command) -> Path:
    """The folder of the recipes of a command."""
    return Path(str(files("longslide.configs"))) / ("pretrain" if command == "pretrain" else "fit")


def list_recipes(command: Command = "fit") -> list[str]:
    """Names of the recipes of a command."""
    return sorted(path.stem for path in recipes(command).glob("*.yaml"))


def recipe_path(command: Command, name: str) -> str:
    """The file that `--config` names: a file, or a recipe of the package by its name or its path in the repository.

    Raises:
        LongslideError: It is neither.
    """
    folder = recipes(command)
    if Path(name).exists():
        return name
    stem = Path(name).stem if Path(name).parent == Path("configs") / folder.name else name
    if Path(stem).suffix:
        raise LongslideError(f"--config {name}: no such file")
    if stem not in list_recipes(command):
        known = ", ".join(list_recipes(command))
        raise LongslideError(f"--config {name}: neither a file nor a recipe; recipes are {known}")
    return str(folder / f"{stem}.yaml")

"""The grid of a sweep: which options take which values, and the trials that these come to."""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import yaml

from ...errors import LongslideError
from ...ranges import check_options
from .settings import Settings

COURSE = frozenset({"monitor", "epochs", "min_steps", "patience", "ema"})
"""Options of the course of training that a grid may have."""

BAGS = frozenset({"max_tokens", "bags_per_step", "max_tiles", "balance", "augment"})
"""Options of the data that a grid may have: how bags are made of the same files and splits."""


@dataclass(frozen=True)
class Trial:
    """One combination of the values of a grid.

    Attributes:
        number: Its number, from 0.
        values: The value of each option.
        settings: How it trains.
    """

    number: int
    values: dict[str, Any]
    settings: Settings

    @property
    def words(self) -> str:
        """The options as they are typed."""
        return " ".join(f"--{name.replace('_', '-')} {text_of(value)}" for name, value in self.values.items())


def read_grid(grid: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The values of each option, by its name with dots.

    Args:
        grid: Lists, or texts with commas between the values, by the names of the options; nested as in YAML, or with dots.

    Raises:
        LongslideError: It is empty, or an option has no values, one twice, or is not one that a grid may have.
    """
    values = dict(_flat(grid, ""))
    if not values:
        raise LongslideError("no grid: give values to try, such as --grid.model.optimiser.learning-rate 1e-4,3e-4")
    for name, given in values.items():
        option = f"--grid.{name.replace('_', '-')}"
        parts = name.split(".")
        known = parts[0] in ("model", "trainer") and len(parts) > 1
        if not (known or name in COURSE or (parts[0] == "data" and len(parts) > 1 and parts[1] in BAGS)):
            data = ", ".join(f"data.{option.replace('_', '-')}" for option in sorted(BAGS))
            others = ", ".join(option.replace("_", "-") for option in sorted(COURSE))
            raise LongslideError(f"{option}: a grid may have options of model and trainer, {others}, and {data}")
        if not given:
            raise LongslideError(f"{option} has no values")
        texts = [text_of(value) for value in given]
        if twice := [text for text in texts if texts.count(text) > 1]:
            raise LongslideError(f"{option} has the value {twice[0]} twice")
    return values


def _flat(grid: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, list[Any]]]:
    for name, value in grid.items():
        key = f"{prefix}{name}".replace("-", "_")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{key}.")
        elif isinstance(value, list | tuple):
            yield key, list(value)
        elif isinstance(value, str):
            yield key, [_value(text) for text in value.split(",") if text.strip()]
        else:
            yield key, [value]


def _value(text: str) -> Any:
    value = yaml.safe_load(text)
    try:
        return float(value) if isinstance(value, str) else value  # 1e-4 is a text in YAML
    except ValueError:
        return value


def text_of(value: Any) -> str:
    """A value as it is typed."""
    return value if isinstance(value, str) else json.dumps(value)


def trials_of(grid: Mapping[str, list[Any]], settings: Settings) -> list[Trial]:
    """Every combination of the values, the last option changing fastest.

    Args:
        grid: As `read_grid` gives it.
        settings: How all of them train, but for the grid.

    Raises:
        LongslideError: There is no such option, or it cannot have such a value.
    """
    from ..cli import command_parser

    parser = command_parser("crossval")
    parser.exit_on_error = False
    base = settings.configuration
    trials = []
    for number, chosen in enumerate(product(*grid.values())):
        values = dict(zip(grid, chosen, strict=True))
        trainer = {
            name.removeprefix("trainer."): value for name, value in values.items() if name.startswith("trainer.")
        }
        content = copy.deepcopy(base) | {"trainer": {}}
        try:
            for name, value in sorted(values.items()):  # a plug-in before its options
                if not name.startswith("trainer."):
                    _put(content, name.split("."), value)
            options = vars(parser.instantiate(parser.parse_object(content)))
            check_options({name: options[name] for name in ("data", "model", *COURSE)})
            check_options(trainer, "trainer.")
        except LongslideError as error:
            raise LongslideError(
                f"--grid: {' '.join(f'{n}={text_of(v)}' for n, v in values.items())}: {error}"
            ) from error
        changed: dict[str, Any] = {name: options[name] for name in COURSE}
        changed |= {"model": options["model"], "trainer": settings.trainer | trainer}
        data = replace(settings.data, **{name: getattr(options["data"], name) for name in BAGS})
        if options["model"].chosen.reads_slide_embedding != settings.data.slide_embeddings:
            raise LongslideError(
                "--grid.model.aggregator: linear-probe reads slide embeddings, the others tiles; sweep over them apart, "
                "and compare the runs by longslide compare"
            )
        trials.append(Trial(number, values, replace(settings, data=data, **changed)))
    return trials


def _put(content: dict[str, Any], path: list[str], value: Any) -> None:
    """Set an option in nested options; those of a plug-in that is named alone make it a class with arguments.

    Raises:
        LongslideError: A name on the way is that of an option with a value.
    """
    *groups, last = path
    for name in groups:
        inner = content.setdefault(name, {})
        if isinstance(inner, str):
            inner = content[name] = {"class_path": inner, "init_args": {}}
        if not isinstance(inner, dict):
            raise LongslideError(f"{name!r} is one value, it has no options in it")
        if "class_path" in inner:
            inner = inner.setdefault("init_args", {})
        content = inner
    content[last] = value

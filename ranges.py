"""The values that options may have: each range stands here once, for the command line, YAML and Python alike."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from .errors import LongslideError

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`.

    Attributes:
        least: The smallest, or if `above` the largest that is too small.
        most: The largest, or if `below` the smallest that is too large.
        above: Whether `least` itself is too small.
        below: Whether `most` itself is too large.
        also: Further values, such as -1 for "no limit".
    """

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False
    also: frozenset[float] = frozenset()

    def __contains__(self, value: float) -> bool:
        large_enough = value > self.least if self.above else value >= self.least
        small_enough = value < self.most if self.below else value <= self.most
        return value in self.also or (math.isfinite(value) and large_enough and small_enough)

    def __str__(self) -> str:
        ends = []
        if math.isfinite(self.least):
            ends.append(f"{'above' if self.above else 'at least'} {self.least:g}")
        if math.isfinite(self.most):
            ends.append(f"{'below' if self.below else 'at most'} {self.most:.10g}")
        return " and ".join(ends + [f"or {value:g}" for value in sorted(self.also)]).replace(" and or ", " or ")


ABOVE_0 = Range(0, above=True)
AT_LEAST_0 = Range(0)
AT_LEAST_1 = Range(1)
SHARE = Range(0, 1)
SHARE_BELOW_1 = Range(0, 1, below=True)
BETWEEN_0_AND_1 = Range(0, 1, above=True, below=True)
SEED = Range(0, 2**32 - 1)
NO_LIMIT = frozenset({-1.0})

RANGES: Mapping[str, Range] = {
    # Slides and tiles.
    "slide_mpp": ABOVE_0,  # what is plausible is said in data/slides/mpp.py, of files too
    "tile_mpp": Range(0.05, 100),
    "tile_px": Range(16),
    "overlap": AT_LEAST_0,
    "min_tissue": SHARE,
    "max_bad_tiles": AT_LEAST_0,
    "max_blur": Range(0, 1, above=True),
    "slide_timeout": ABOVE_0,
    "batch_size": AT_LEAST_1,
    "cache_dir_gb": ABOVE_0,
    "threads": AT_LEAST_1,
    "tiles_per_shard": AT_LEAST_1,
    "embed_mb": AT_LEAST_0,
    # Data of training.
    "fold": AT_LEAST_0,
    "folds": AT_LEAST_1,
    "crossval.folds": Range(2),
    "inner_folds": AT_LEAST_1,
    "sweep.folds": Range(2),
    "val_share": SHARE_BELOW_1,
    "test_share": SHARE_BELOW_1,
    "times": ABOVE_0,
    "max_tokens": AT_LEAST_1,
    "bags_per_step": AT_LEAST_1,
    "max_tiles": AT_LEAST_1,
    "tile_dropout": SHARE_BELOW_1,
    "crop": Range(0, 1, above=True),
    "noise": AT_LEAST_0,
    "cache_gb": AT_LEAST_0,
    "workers": AT_LEAST_0,
    "seed": SEED,
    # Models.
    "layers": AT_LEAST_1,
    "width": AT_LEAST_1,
    "heads": AT_LEAST_1,
    "ffn_width": AT_LEAST_1,
    "mask_ratio": BETWEEN_0_AND_1,
    "shift": AT_LEAST_0,
    "head_dropout": SHARE_BELOW_1,
    "class_weights": AT_LEAST_0,
    "learning_rate": ABOVE_0,
    "min_learning_rate": AT_LEAST_0,
    "weight_decay": AT_LEAST_0,
    "warmup": SHARE,
    "layer_decay": Range(0, 1, above=True),
    "betas": SHARE_BELOW_1,
    # The course of training.
    "epochs": AT_LEAST_1,
    "min_steps": AT_LEAST_0,
    "patience": AT_LEAST_1,
    "ema": BETWEEN_0_AND_1,
    "checkpoint_every_n_steps": AT_LEAST_1,
    "patients": Range(12),
    # Lightning's Trainer.
    "max_epochs": Range(1, also=NO_LIMIT),
    "max_steps": Range(1, also=NO_LIMIT),
    "min_epochs": AT_LEAST_0,
    "gradient_clip_val": AT_LEAST_0,
    "limit_train_batches": ABOVE_0,
    "limit_val_batches": ABOVE_0,
    "limit_test_batches": AT_LEAST_0,
    "limit_predict_batches": AT_LEAST_0,
    "overfit_batches": AT_LEAST_0,
    "accumulate_grad_batches": AT_LEAST_1,
    "check_val_every_n_epoch": AT_LEAST_1,
    "val_check_interval": ABOVE_0,
    "log_every_n_steps": AT_LEAST_0,
    "num_nodes": AT_LEAST_1,
    "num_sanity_val_steps": Range(0, also=NO_LIMIT),
    "reload_dataloaders_every_n_epochs": AT_LEAST_0,
    # view.
    "port": Range(1, 65535),
    # Attention patterns, and attention-map.
    "tokens": AT_LEAST_1,
    "segment_lengths": AT_LEAST_1,
    "dilated_ratios": AT_LEAST_1,
    "window": AT_LEAST_0,
    "period": AT_LEAST_0,
    "random_keys": AT_LEAST_0,
    "global_tokens": AT_LEAST_0,
    "pattern_seed": SEED,
    "block_size": AT_LEAST_0,
    "chosen_blocks": AT_LEAST_0,
}
"""Of each option with numbers, by its name; with the command in front where that one is narrower."""


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """A command that refuses values out of their ranges, and empty texts, before it does anything.

    Raises:
        LongslideError: One is; names the option as it is typed.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        given = signature.bind(*args, **kwargs).arguments
        empty = {name for name, parameter in signature.parameters.items() if parameter.default == ""}
        check_options(given, command=function.__name__, may_be_empty=empty)
        return function(*args, **kwargs)

    return call


def check_options(
    options: Mapping[str, Any],
    prefix: str = "",
    *,
    command: str = "",
    may_be_empty: "set[str] | frozenset[str]" = frozenset(),
) -> None:
    """Refuse options out of their ranges.

    Args:
        options: Values by name; those of a dataclass or a mapping are options of options.
        prefix: What the names begin with as they are typed, such as `data.`.
        command: The command, where its ranges are narrower.
        may_be_empty: Names of those for which an empty text says something.

    Raises:
        LongslideError: One is, or an empty text where a name or path belongs.
    """
    for name, value in options.items():
        typed = f"--{prefix}{name}".replace("_", "-")
        if is_dataclass(value) and not isinstance(value, type):
            inner = {field.name: getattr(value, field.name) for field in fields(value)}
            check_options(inner, f"{prefix}{name}.", may_be_empty={f.name for f in fields(value) if f.default == ""})
        elif isinstance(value, Mapping):
            check_options(value, f"{prefix}{name}.")
        elif isinstance(value, str):
            if not value and name not in may_be_empty:
                raise LongslideError(f"{typed} is empty; give a value or leave it out")
        else:
            wanted = RANGES.get(f"{command}.{name}") or RANGES.get(name)
            for number in value if isinstance(value, list | tuple) else [value]:
                if wanted is None or isinstance(number, bool) or not isinstance(number, int | float):
                    continue
                if number not in wanted:
                    raise LongslideError(f"{typed} {number} must be {wanted}")

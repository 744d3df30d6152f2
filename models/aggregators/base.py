"""Aggregators: the tile embeddings of a bag in, one vector out; one interface, so that a baseline is one option away."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...bag_lengths import lengths_of
from ...errors import LongslideError
from ...registry import Plugin
from .registry import AGGREGATORS, AggregatorChoice


class Aggregator(Plugin, nn.Module):
    """What every aggregator is: a module that is made by `cls(feature_dim, **options)`, with options of plain types.

    Bags are packed end to end, without padding: bag b has the tiles `cu_seqlens[b]` to `cu_seqlens[b + 1]`.

    Attributes:
        width: Length of the vector of a bag.
        reads_slide_embedding: Whether each bag's only tile is the slide embedding of the feature file.
        learning_rate: The highest learning rate unless another is asked for, of steps that see 8 bags
            (`benchmarks/recipes.py`): each aggregator at its own, else a comparison is one of learning rates.
    """

    GIVEN = frozenset({"feature_dim", "architecture"})

    width: int
    reads_slide_embedding: bool = False
    learning_rate: float = 2e-4

    def forward(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Aggregate bags.

        Args:
            tile_features: `(T, D)` tile embeddings of all bags, any floating dtype.
            grid_cells: `(T, 2)` int64 (column, row) of each tile.
            cu_seqlens: `(B + 1,)` int32 cumulative lengths of the bags, from 0 to T.

        Returns:
            `(B, width)`.
        """
        raise NotImplementedError

    @property
    def name(self) -> str:
        """How it is recorded: its registered name, or the dotted path of its class."""
        return AGGREGATORS.name_of(self)

    def architecture(self) -> dict[str, Any]:
        """What is needed beside the options to build the module again without its weights, in plain types.

        Where it is not empty, the constructor takes it as `architecture`.
        """
        return {}

    def use_features_of(self, tile_encoder: str) -> None:
        """Learn which tile encoder made the training features.

        Raises:
            LongslideError: It was pretrained on those of another.
        """

    def use_training_features(self, statistics: dict[str, Any]) -> None:
        """Learn the statistics of the training features: `mean` `(D,)` and `std` `(D,)` float32."""


def create_aggregator(
    choice: str | AggregatorChoice, checkpoint: str | Path | None, feature_dim: int, tile_encoder: str | None
) -> Aggregator:
    """A new aggregator, for training.

    Args:
        choice: Its name or dotted path, with options or without.
        checkpoint: Weights that its slide encoder begins with.
        feature_dim: Length of a tile embedding.
        tile_encoder: The tile encoder that made the features, if known.

    Raises:
        LongslideError: There is none, it does not take these options or this checkpoint, or was pretrained on features of
            another tile encoder.
    """
    chosen = AggregatorChoice.of(choice)
    options = dict(chosen.init_args)
    if checkpoint is not None:
        if "checkpoint" not in inspect.signature(AGGREGATORS.get(chosen.class_path)).parameters:
            raise LongslideError(
                f"--model.checkpoint {checkpoint}: {chosen.class_path} has no slide encoder to load it into"
            )
        options["checkpoint"] = str(checkpoint)  # plain, for the checkpoint to come
    aggregator = AGGREGATORS.create(chosen.class_path, feature_dim, **options)
    if not isinstance(getattr(aggregator, "width", None), int):
        raise LongslideError(f"aggregator {aggregator.name}: sets no `width`, the length of a bag's vector")
    if not _is_plain(aggregator.options):
        raise LongslideError(
            f"aggregator {aggregator.name}: its options must be of plain types (numbers, text, lists), which a checkpoint "
            f"holds, and not {aggregator.options}"
        )
    if tile_encoder:
        aggregator.use_features_of(tile_encoder)
    return aggregator


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def split_bags(packed: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    """The bags of a packed tensor, as views.

    Reductions run bag by bag over these views: a handful of bags fills a batch, each reduction is one kernel, its order of
    summation does not depend on the neighbours, and no atomic addition makes two runs differ.

    Args:
        packed: `(T, ...)` what each tile of the bags has, one bag after the other.
        cu_seqlens: `(B + 1,)` integer cumulative lengths of the bags, from 0 to T.

    Returns:
        B tensors `(N_b, ...)`.
    """
    return torch.split(packed, lengths_of(cu_seqlens))

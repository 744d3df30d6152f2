"""The options of masked autoencoding. Nothing here imports torch, so that a command line is parsed without it."""

from dataclasses import dataclass
from pathlib import Path

from ..aggregators.registry import AggregatorChoice
from ..classifier.options import OptimiserOptions

LEARNING_RATE = 5e-4
"""The highest learning rate unless another is asked for."""


@dataclass(frozen=True)
class DecoderOptions:
    """Options of the decoder, which is thrown away after pretraining.

    Attributes:
        layers: LongNet layers.
        width: Width of the tokens; a multiple of 4 and of `heads`.
        heads: Attention heads.
        ffn_width: Width of the feed-forward networks.
    """

    layers: int = 2
    width: int = 256
    heads: int = 8
    ffn_width: int = 1024


@dataclass(frozen=True)
class PretrainingOptions:
    """How a slide encoder is pretrained.

    Attributes:
        encoder: Which slide encoder is pretrained: `longnet` of any size, or `gigapath`; with options, an
            `AggregatorChoice`.
        checkpoint: What it begins with; for `gigapath` the published weights by default.
        decoder: Options of the decoder.
        mask_ratio: Share of a slide's tiles that are hidden.
        normalise_targets: Whether each hidden embedding is standardised before it is compared.
        horizontal_flip: Whether half of the training slides are mirrored left to right.
        shift: Training slides are moved right and down by up to so many cells.
        optimiser: Options of the optimiser.
    """

    encoder: str | AggregatorChoice = "longnet"
    checkpoint: str | Path | None = None
    decoder: DecoderOptions = DecoderOptions()
    mask_ratio: float = 0.75
    normalise_targets: bool = True
    horizontal_flip: bool = True
    shift: int = 100
    optimiser: OptimiserOptions = OptimiserOptions(learning_rate=LEARNING_RATE)

"""The options of each aggregator. Nothing here imports torch, so that a command line is parsed without it."""

from dataclasses import dataclass
from typing import Literal

AggregatorName = Literal["longnet", "gigapath", "abmil", "transmil", "mean", "max", "linear-probe"]


@dataclass(frozen=True)
class LongNetOptions:
    """Options of `longnet`; a checkpoint of masked autoencoding brings its own size.

    Attributes:
        layers: LongNet layers.
        width: Width of the tokens and of the bag's vector; a multiple of 4 and of `heads`.
        heads: Attention heads.
        ffn_width: Width of the feed-forward networks.
        dilated_ratios: Dilated ratio of each branch of the attention.
        max_wsi_size: Edge of the largest slide in pixels of the tiles; with `tile_size` it sets the longest segment.
        tile_size: Edge of a tile in pixels.
        pool: What the bag's vector is: the `mean` over the tiles, or the `cls` token.
        dropout: Share of values dropped in training.
        drop_path: Share of bags for which the last layer's halves are left out in training; less before it.
        checkpointing: Whether layers are computed again in the backward, for memory.
    """

    layers: int = 4
    width: int = 256
    heads: int = 8
    ffn_width: int = 1024
    dilated_ratios: tuple[int, ...] = (1, 2, 4, 8, 16)
    max_wsi_size: int = 262144
    tile_size: int = 256
    pool: Literal["mean", "cls"] = "mean"
    dropout: float = 0.1
    drop_path: float = 0.0
    checkpointing: bool = False


@dataclass(frozen=True)
class GigaPathOptions:
    """Options of `gigapath`.

    Attributes:
        slide_encoder: Name of the slide encoder.
        pool: What a layer's vector is: the `mean` over the tiles, or the `cls` token.
        layers: Layers whose vectors are concatenated, 0 being the projected tiles; none for the encoder's final output.
            GigaPath's fine-tuning uses 11 alone, or 5 and 11.
        frozen: Whether the encoder stays as it is and only the head is trained.
        dropout: Share of values dropped in training.
        drop_path: Share of bags for which the last layer's halves are left out in training; less before it.
        checkpointing: Whether layers are computed again in the backward, for memory.
    """

    slide_encoder: str = "gigapath"
    pool: Literal["mean", "cls"] = "mean"
    layers: tuple[int, ...] = ()
    frozen: bool = False
    dropout: float = 0.1
    drop_path: float = 0.0
    checkpointing: bool = False


@dataclass(frozen=True)
class ABMILOptions:
    """Options of `abmil`.

    Attributes:
        width: Width of the tile embeddings after the first linear layer, and of the bag's vector.
        attention_width: Width of the two branches of the attention.
        dropout: Share of values dropped after the first layer and in the attention.
    """

    width: int = 512
    attention_width: int = 256
    dropout: float = 0.25


@dataclass(frozen=True)
class TransMILOptions:
    """Options of `transmil`; the defaults are the published ones.

    Attributes:
        width: Width of the tokens; a multiple of `heads`.
        heads: Attention heads.
        landmarks: Landmarks of the Nyström attention.
        pinv_iterations: Iterations that approximate its pseudo-inverse.
        dropout: Share of values dropped after each attention.
    """

    width: int = 512
    heads: int = 8
    landmarks: int = 256
    pinv_iterations: int = 6
    dropout: float = 0.1


@dataclass(frozen=True)
class PoolOptions:
    """Options of `mean` and `max`.

    Attributes:
        width: Width that a linear layer with ReLU brings the tile embeddings to before they are pooled; 0 pools them as
            they are.
        dropout: Share of values dropped after that layer.
    """

    width: int = 512
    dropout: float = 0.25

"""What slide encoders of other architectures than GigaPath's have in common: packed slides in, slide embeddings out."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...errors import LongslideError
from ..checkpoint_file import digest
from ..later import Later
from .checkpoint import load_published, weights_file
from .packed_slides import PackedSlides, pack_slides
from .spec import Architecture, PublishedSpec

_CLASSES: Mapping[Architecture, str] = {
    "titan": "alibi_transformer:TITAN",
    "moozy": "alibi_transformer:MOOZY",
    "chief": "gated_attention:CHIEF",
    "feather": "gated_attention:Feather",
    "madeleine": "gated_attention:MADELEINE",
    "prism": "perceiver:PRISM",
    "cobra": "mamba:COBRA",
}
"""Module and class of each architecture; the arguments of the class are the `arguments` of its YAML files."""


class PublishedSlideEncoder(nn.Module):
    """Base of the slide encoders of other architectures than GigaPath's. Slides are embedded one by one, each whole.

    Attributes:
        READS_CELLS: Whether it matters where the tiles are; then impossible cells are refused.
        spec: Its facts.
        weights: Source and digest of the weights.
        width: Length of a slide embedding; set by the subclass.
        checkpointing: Whether layers are computed again in the backward, for memory.
        later: Where set, impossible cells on a GPU are refused when this looks, at a later call or step, and not at once.
    """

    PUBLISHED: Mapping[str, str]
    ROOT: str = ""
    LEFT_OUT: tuple[str, ...] = ()
    SHARED: Mapping[str, str] = {}
    READS_CELLS: ClassVar[bool] = False

    width: int

    def __init__(self, spec: PublishedSpec, weights: str = "") -> None:
        super().__init__()
        self.spec = spec
        self.weights = weights
        self.checkpointing = False
        self.later: Later | None = None

    @property
    def name(self) -> str:
        """The encoder's name."""
        return self.spec.name

    @property
    def tile_encoder(self) -> str:
        """The tile encoder whose embeddings it reads; empty if that is not known."""
        return self.spec.tile_encoder

    def embed(self, tile_features: Tensor, grid_cells: Tensor) -> Tensor:
        """One slide: `(N, tile_dim)` in the dtype of the weights and `(N, 2)` int64 -> `(width,)`."""
        raise NotImplementedError

    def forward(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Embed slides: a batch of one length, or slides of any lengths packed end to end.

        Args:
            tile_features: `(B, N, tile_dim)` tile embeddings; N at least 1. Packed: `(T, tile_dim)`.
            grid_cells: `(B, N, 2)` integer (column, row) of each tile. Packed: `(T, 2)`.
            cu_seqlens: For packed slides `(B + 1,)` integer: where each slide's tiles begin, and T.

        Returns:
            `(B, width)` slide embeddings.

        Raises:
            LongslideError: An empty slide, shapes that do not fit, or impossible cells where the encoder reads them.
        """
        slides = self.slides(tile_features, grid_cells, cu_seqlens)
        return torch.stack([self.embed(features, cells) for features, cells in slides])

    def slides(
        self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """The slides of a batch, looked at: `(N, tile_dim)` in the dtype of the weights and `(N, 2)` of each."""
        tile_features, grid_cells, cu_seqlens, lengths = pack_slides(tile_features, grid_cells, cu_seqlens, self.spec)
        if self.READS_CELLS:
            PackedSlides(lengths, cu_seqlens.to(grid_cells.device), grid_cells).check(self.later)
        dtype = next(self.parameters()).dtype
        return list(zip(torch.split(tile_features.to(dtype), lengths), torch.split(grid_cells, lengths), strict=True))

    def recomputes(self) -> bool:
        """Whether layers are computed again in the backward."""
        return self.checkpointing and torch.is_grad_enabled()


def published_class(architecture: Architecture) -> type[PublishedSlideEncoder]:
    """The class of an architecture."""
    module, _, name = _CLASSES[architecture].partition(":")
    found: type[PublishedSlideEncoder] = getattr(import_module(f".{module}", __package__), name)
    return found


def build_published(spec: PublishedSpec, weights: str) -> PublishedSlideEncoder:
    """A slide encoder of random weights.

    Raises:
        LongslideError: The arguments of its YAML file are not those of its architecture.
    """
    try:
        return published_class(spec.architecture)(spec, weights, **spec.arguments)
    except (
        TypeError,
        ValueError,
        ArithmeticError,
        AssertionError,
        RuntimeError,
    ) as error:  # those of torch's modules too
        raise LongslideError(f"slide encoder {spec.name!r}: {' '.join(str(error).split())}") from error


def create_published(spec: PublishedSpec, checkpoint: str | Path | None, seed: int = 0) -> PublishedSlideEncoder:
    """A slide encoder with its weights, on the CPU, in float32 and in evaluation mode.

    Args:
        spec: Its facts.
        checkpoint: A weights file as published, the word `random`, or None for the hub's.
        seed: Seed of random weights.

    Raises:
        LongslideError: The weights are unavailable, or those of another model.
    """
    if str(checkpoint) == "random":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that would also seed the GPUs
            return build_published(spec, f"random seed={seed}").eval()
    file, source = weights_file(spec, checkpoint)
    encoder = build_published(spec, f"{source} {digest(file)}")
    load_published(encoder, file, f"{source}: does not fit slide encoder {spec.name!r}")
    return encoder.float().eval()

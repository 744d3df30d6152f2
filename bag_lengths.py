"""How long packed bags are, for the host: asking the GPU would make it wait for all that has been launched."""

from collections.abc import Sequence

import torch
from torch import Tensor

_ATTRIBUTE = "_longslide_lengths"
_PARTS = "_longslide_parts"


def with_lengths(cu_seqlens: Tensor, lengths: Sequence[int], *, parts: bool = False) -> Tensor:
    """The same tensor, which knows from now on what `lengths_of` says of it; not to be written to.

    Args:
        cu_seqlens: `(B + 1,)` integer cumulative lengths of the bags, from 0, on any device.
        lengths: The B lengths.
        parts: Whether the bags are parts of slides whose other parts other processes have.
    """
    setattr(cu_seqlens, _ATTRIBUTE, list(lengths))
    setattr(cu_seqlens, _PARTS, parts)
    return cu_seqlens


def are_parts(cu_seqlens: Tensor) -> bool:
    """Whether `with_lengths` has said that the bags are parts of slides."""
    return getattr(cu_seqlens, _PARTS, False)


def lengths_of(cu_seqlens: Tensor) -> list[int]:
    """The lengths of packed bags, without waiting for a GPU where `with_lengths` has said them.

    Args:
        cu_seqlens: `(B + 1,)` integer cumulative lengths, from 0.

    Returns:
        B lengths.
    """
    known = None if torch.compiler.is_compiling() else getattr(cu_seqlens, _ATTRIBUTE, None)
    lengths: list[int] = cu_seqlens.diff().tolist() if known is None else known
    return lengths

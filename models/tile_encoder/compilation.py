"""What of a tile encoder is compiled: the repeated blocks of its network, once for all depths, and its transform."""

from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .transform import TileTransform, apply_transform


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The longest row of modules of one class: the blocks of a transformer; none if there are fewer than four."""
    longest: list[nn.Module] = []
    for module in network.modules():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            for kind in {type(child) for child in module}:
                row = [child for child in module if type(child) is kind]
                longest = row if len(row) > len(longest) else longest
    return longest if len(longest) >= 4 else []


def compile_blocks(network: nn.Module) -> None:
    """Compile the forward of a network's blocks in place: one graph for all of them, kept on disk for later runs."""
    blocks = repeated_blocks(network)
    if not blocks:
        return
    forward: Any = type(blocks[0]).forward
    if isinstance(forward, FunctionType):  # a code of its own: what is compiled is kept, and counted, by code
        own = FunctionType(
            forward.__code__.replace(co_name=forward.__name__), forward.__globals__, forward.__name__,
            forward.__defaults__, forward.__closure__,
        )  # fmt: skip
        own.__kwdefaults__ = forward.__kwdefaults__
        forward = own
    # Block sizes of the kernels between the products are tried out: 3% of GigaPath's rate for 8 s, once on a machine.
    compiled = torch.compile(forward, dynamic=False, fullgraph=True, options={"coordinate_descent_tuning": True})
    for block in blocks:
        block.forward = partial(compiled, block)


def compile_transform(network: nn.Module, dtype: torch.dtype) -> None:
    """Make the transform of a `TileEncoder` one kernel from uint8 tiles to images in the dtype of the weights, in place."""
    transform = getattr(network, "transform", None)
    if not isinstance(transform, TileTransform):
        return

    def images(tiles: Tensor, *constants: Any) -> Tensor:
        return apply_transform(tiles, *constants).to(dtype)

    compiled: Any = torch.compile(images, dynamic=False, fullgraph=True)
    fused: Any = network
    fused.transform = lambda tiles: compiled(tiles, *transform.constants(tiles))

"""Launches of Triton kernels. Triton looks at every argument and constant of a launch anew, which takes longer than many a
kernel; here a kernel that has been compiled for such arguments is handed to its launcher directly.
"""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS: Mapping[str, int] = {"num_warps": 4}
_ONES = (1, 1, 1)
_empty_strided: Any = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)  # as Inductor's code takes memory
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    options: Mapping[str, int] = WARPS,
) -> tuple[Any, tuple[Any, ...]] | None:
    """`kernel[grid](*arguments, *constants, **options)`, on the current stream of the current device.

    Args:
        kernel: What `triton.jit` made.
        grid: Its programs, in up to three dimensions.
        arguments: Tensors, numbers and None, in the order of its parameters.
        constants: The `tl.constexpr` that follow: hashable, named tuples among them.
        options: Of the compiler.

    Returns:
        The compiled kernel and the constants as it takes them; None where it is Triton, or another, that launches.
    """
    if torch.compiler.is_compiling() or not isinstance(kernel, triton.JITFunction) or torch.version.hip is not None:
        kernel[grid](*arguments, *map(marked, constants), **options)  # as the compiler and Triton's interpreter know it
        return None
    device: int = torch._C._cuda_getDevice()
    # What Triton makes kernels of their own for. The last bits of an address, and of a number, say how wide loads may be.
    kinds = [
        ((value.dtype, "unaligned") if value.data_ptr() & 15 else value.dtype)
        if isinstance(value, Tensor)
        else _kind_of_int(value)
        if type(value) is int
        else type(value)
        for value in arguments
    ]
    key = (id(kernel), device, constants, *options.items(), *kinds)
    found = _compiled.get(key)
    if found is None:
        final = tuple(map(marked, constants))
        _compiled[key] = found = kernel[grid](*arguments, *final, **options), final
        return found
    compiled, final = found
    stream = torch._C._cuda_getCurrentRawStream(device)
    compiled.run(
        *grid,
        *_ONES[len(grid) :],
        stream,
        compiled.function,
        compiled.packed_metadata,
        None,
        None,
        None,
        *arguments,
        *final,
    )
    return found


class Launch(Protocol):
    """`launch`, or what takes its place."""

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        options: Mapping[str, int] = WARPS,
    ) -> object:
        """See `launch`."""


class Repeated:
    """`launch` for launches that are repeated: each kernel with one grid and constants, and arguments of the same dtypes,
    alignments and numbers. Nothing is looked at again.
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[Any, ...]] = {}

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        options: Mapping[str, int] = WARPS,
    ) -> None:
        """See `launch`."""
        found = self._found.get(id(kernel))
        device: int = -1 if found is None else torch._C._cuda_getDevice()
        if found is None or found[0] != device:
            made = launch(kernel, grid, arguments, constants, options)
            if made is not None:
                compiled, final = made
                run = partial(compiled.run, *grid, *_ONES[len(grid) :])
                device = torch._C._cuda_getDevice()
                self._found[id(kernel)] = device, run, compiled.function, compiled.packed_metadata, final
            return
        _, run, function, metadata, final = found
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(stream, function, metadata, None, None, None, *arguments, *final)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`; on the current GPU in a third of its time."""
    if (
        device.type != "cuda"
        or torch.compiler.is_compiling()
        or _empty_strided is None
        or device.index != torch._C._cuda_getDevice()
    ):
        return torch.empty(shape, dtype=dtype, device=device)
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    found: Tensor = _empty_strided(shape, tuple(strides[::-1]), dtype)
    return found


def _kind_of_int(value: int) -> str:
    if value == 1:
        return "one"
    kind = "number" if value & 15 else "multiple of 16"
    return kind if -(2**31) <= value < 2**31 else "long " + kind


@cache
def marked(constant: Any) -> Any:
    """A constant as a kernel takes it: Triton 3.6 knows the fields of a named tuple for constants only if each is marked."""
    if not isinstance(constant, tuple) or triton.knobs.runtime.interpret:
        return constant  # in Triton's interpreter, which computes with plain numbers
    return type(constant)(*(tl.constexpr(size) for size in constant))

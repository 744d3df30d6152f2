"""Kernels that do not need one another, side by side on a GPU: small ones in the shadow of large ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """What is launched within waits for what was launched before, and runs next to what is launched after, until `join`.

    Nothing that is used within may be freed before `join`. Without a GPU it is launched as it comes.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():  # Dynamo would make a stream of its own for each call
        yield
        return
    stream = _second(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


def join(device: torch.device) -> None:
    """Let what is launched from now on wait for what was launched `beside`."""
    if device.type == "cuda" and not torch.compiler.is_compiling():
        torch.cuda.current_stream(device).wait_stream(_second(device))


@cache
def _second(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

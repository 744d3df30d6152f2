"""A process of a `TilePool`."""

import mmap
import pickle
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import cv2
import numpy as np

from ...errors import LongslideError
from ...registry import adopt
from ..child_process import leave_signals_to_parent
from ..slides import openslide, tiled_tiff  # noqa: F401  most slides are of these: loaded before the first one
from ..slides.base import SlideReader
from ..slides.slide import Slide
from .grid import Grid
from .read import read_tiles


def serve(descriptor: int, memory: int, batches: int, batch_size: int, tile_px: int, cache_bytes: int) -> None:
    """Read tiles until the other end of the pipe is closed.

    Args:
        descriptor: Of the pipe.
        memory: Of the file of the shared memory.
        batches: Shape of the shared memory, as in `TilePool.buffer`.
        batch_size: The same.
        tile_px: The same.
        cache_bytes: Decoded native tiles that an open slide may keep.
    """
    leave_signals_to_parent()
    cv2.setNumThreads(1)
    SlideReader.cache_bytes = cache_bytes
    shape = (batches * batch_size, tile_px, tile_px, 3)
    tiles = np.frombuffer(mmap.mmap(memory, int(np.prod(shape))), np.uint8).reshape(shape)
    pipe: Connection[Any, Any] = Connection(descriptor)
    sources: dict[int, tuple[Slide, Grid] | str] = {}
    asked: SimpleQueue[tuple[Any, ...] | None] = SimpleQueue()
    threading.Thread(target=_take_in, args=(pipe, asked), name="take-in", daemon=True).start()
    with suppress(OSError):  # the job has ended
        pipe.send(None)
        while (message := asked.get()) is not None:
            what, source, *details = message
            if what == "open":
                sources[source] = _open(details[0])
            elif what == "close":
                closed = sources.pop(source)
                if not isinstance(closed, str):
                    closed[0].close()
            else:
                pipe.send(_read(sources[source], tiles, *details))


def _take_in(pipe: "Connection[Any, Any]", asked: "SimpleQueue[tuple[Any, ...] | None]") -> None:
    """Empty the pipe while tiles are read: a large slide's native tiles fill it, and the other end would wait."""
    with suppress(EOFError, OSError):
        while True:
            asked.put(pipe.recv())
    asked.put(None)


def _open(pickled: bytes) -> tuple[Slide, Grid] | str:
    try:
        plugins, slide, grid = pickle.loads(pickled)
        adopt(plugins)
    except LongslideError as error:
        return str(error)
    except Exception as error:  # whatever a reader does when it is opened again
        return " ".join(f"{type(error).__name__}: {error}".split())
    return slide, grid


def _read(
    source: tuple[Slide, Grid] | str, tiles: np.ndarray, places: np.ndarray, corners: np.ndarray
) -> np.ndarray | str:
    if isinstance(source, str):
        return source
    slide, grid = source
    blur = np.empty(len(places), np.float32)
    starts = np.flatnonzero(np.diff(places, prepend=-2) != 1)
    for start, end in zip(starts, [*starts[1:], len(places)], strict=True):  # runs of neighbouring places
        out = tiles[places[start] : places[start] + end - start]
        try:
            blur[start:end] = read_tiles(slide, grid, corners[start:end], out)
        except Exception as error:  # of a reader that breaks its contract
            return " ".join(f"{type(error).__name__}: {error}".split())
    return blur

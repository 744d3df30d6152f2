"""Slides on slow storage, copied ahead to a local disk."""

import itertools
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from ...data.slides.parts import files_of
from ...errors import LongslideError


class LocalCopies:
    """Keeps copies of slides in a folder while they are read, within a budget. A context manager: it leaves nothing there.

    Args:
        folder: The folder; made if need be.
        gigabytes: What all copies together may take; None for half of what is free there.
        slides: The slides, in the order in which they are read, as far as it is known: see `expect`.

    Raises:
        LongslideError: The folder cannot be written.
    """

    def __init__(self, folder: Path, gigabytes: float | None, slides: Sequence[Path]) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="longslide-", dir=folder))
        except OSError as error:
            raise LongslideError(
                f"{folder}: cannot hold copies of slides ({error.strerror}); choose another --cache-dir"
            ) from error
        self.budget = shutil.disk_usage(folder).free // 2 if gigabytes is None else int(gigabytes * 1e9)
        self._places = itertools.count()
        self._order = {path: next(self._places) for path in slides}
        self._sizes: dict[int, int] = {}  # bytes by the place of the slide that is copied
        self._changed = threading.Condition()

    def expect(self, slide: Path) -> None:
        """Say which slide is read after those that were given or said before."""
        self._order[slide] = next(self._places)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def copy_of(self, slide: Path) -> Iterator[Path]:
        """A copy of a slide, with the times of its files, as long as it is needed.

        It waits for room that slides before it will give back. One that is larger than the budget, or that later ones left
        no room for, is read where it is.
        """
        files = files_of(slide)
        size = sum(file.stat().st_size for file in files)
        place = self._order[slide]
        with self._changed:
            while size > self.budget - sum(self._sizes.values()):
                if size > self.budget or not any(other < place for other in self._sizes):
                    break
                self._changed.wait()
            else:
                self._sizes[place] = size
        if place not in self._sizes:
            yield slide
            return
        folder = self._folder / str(place)
        try:
            for file in files:
                local = folder / file.relative_to(slide.parent)
                local.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, local)
            yield folder / slide.name
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with self._changed:
                del self._sizes[place]
                self._changed.notify_all()

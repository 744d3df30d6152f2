"""The loop of every batch job: prepare slides ahead, encode their tiles, finish each behind, record how it ended."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Protocol, TypeVar

from ...data.slides.slide_table import SlideEntry
from ...data.tiles.readers import usable_cores
from ...errors import LongslideError
from .devices import Feed
from .ledger import SUMMARY, SUMMARY_WAIT, record
from .progress import JobProgress, Progress
from .result import SlideResult

PREPARED_AHEAD = max(1, min(8, usable_cores() // 4))
"""Slides that are prepared at a time: finding tissue takes a core a second or more, and small slides are encoded in less."""
FINISHED_BEHIND = 2
"""Slides whose embeddings wait to be written."""


class Prepared(Protocol):
    """A slide that has been prepared."""

    @property
    def resources(self) -> ExitStack:
        """What the slide holds (its claim, the open file); closed when it is finished or given up."""
        ...


S = TypeVar("S")
T = TypeVar("T", bound=Prepared)


class BatchJob(Protocol[T]):
    """What is done to each slide: `prepare` in threads ahead, `encode` all as one stream, `finish` in a thread behind."""

    @property
    def description(self) -> str:
        """What the job does, in a line or two, for the user to check."""
        ...

    def prepare(self, entry: SlideEntry, /) -> T | SlideResult:
        """All that comes before the models; a result if that ends the slide."""
        ...

    def encode(self, slides: Generator[T | SlideResult], progress: Progress, /) -> Generator[T | SlideResult]:
        """Embed the tiles of all slides as one stream, and give the slides on in order."""
        ...

    def finish(self, prepared: T, progress: Progress, /) -> SlideResult:
        """What is left: the other models, the files; closes the slide's resources."""
        ...

    def stop(self) -> None:
        """End what `prepare` is at work on."""
        ...


def run_batch(
    job: BatchJob[T],
    entries: Sequence[SlideEntry] | Feed,
    output: Path,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[SlideResult]:
    """Run a job over slides, and write each one's result into the summary as it ends.

    Args:
        job: What is done to each slide.
        entries: The slides, or what gives them.
        output: Folder of the summary.
        notes: Notes to print first.
        progress: Where progress is told; a display of its own by default.

    Returns:
        One result per slide, in the order of the input.
    """
    with progress or JobProgress(len(entries)) as progress, ExitStack() as given_up, ExitStack() as running:
        for note in (job.description, *notes):
            progress.note(note)

        def prepare(entry: SlideEntry) -> T | SlideResult:
            prepared = job.prepare(entry)
            if not isinstance(prepared, SlideResult):
                given_up.callback(prepared.resources.close)
            return prepared

        def finish(prepared: T | SlideResult) -> SlideResult:
            result = prepared if isinstance(prepared, SlideResult) else job.finish(prepared, progress)
            progress.slide_ended(result)
            unrecorded.append(result)
            unrecorded[:] = _recorded(output, unrecorded, progress)
            return result

        unrecorded: list[SlideResult] = []

        # Closed from the last to the first, whatever ends the job, and then what slides hold that were not finished.
        ahead = running.enter_context(closing(_ahead(prepare, entries)))
        encoded = running.enter_context(closing(job.encode(ahead, progress)))
        results = running.enter_context(closing(_behind(finish, encoded)))
        try:
            ended = list(results)
            if unrecorded:
                _recorded(output, unrecorded, progress, last=True)
            return ended
        except BaseException:  # Ctrl-C, for one
            job.stop()
            raise


def _recorded(output: Path, results: list[SlideResult], progress: Progress, *, last: bool = False) -> list[SlideResult]:
    """Write results into the summary; those that could not be written, for the next time."""
    again = len(results) > 1  # who has waited in vain once does not wait as long for each slide
    try:
        record(output, *results, timeout=SUMMARY_WAIT if last or not again else 1.0)
    except LongslideError as error:  # the slides' own files are there
        if last or not again:
            progress.note(str(error))
        if last:
            progress.note(f"{len(results)} slides are missing in {output / SUMMARY}; the same command adds them")
        return results
    return []


def _ahead(
    prepare: Callable[[SlideEntry], T | SlideResult], entries: Iterable[SlideEntry | None]
) -> Generator[T | SlideResult]:
    """Prepare the next slides (open them, find tissue) while the models work on earlier ones."""
    with ThreadPoolExecutor(PREPARED_AHEAD, thread_name_prefix="prepare") as executor:
        following: deque[Future[T | SlideResult]] = deque()
        try:
            for entry in entries:
                if entry is not None:
                    following.append(executor.submit(prepare, entry))
                if len(following) > (0 if entry is None else PREPARED_AHEAD):
                    yield following.popleft().result()
                elif entry is None:
                    time.sleep(0.2)
            while following:
                yield following.popleft().result()
        finally:
            executor.shutdown(cancel_futures=True)


def _behind(finish: Callable[[S], SlideResult], slides: Iterable[S]) -> Generator[SlideResult]:
    """Finish slides in order while the tile encoder works on later ones."""
    with ThreadPoolExecutor(1, thread_name_prefix="finish") as executor:
        ending: deque[Future[SlideResult]] = deque()
        for slide in slides:
            ending.append(executor.submit(finish, slide))
            if len(ending) > FINISHED_BEHIND:
                yield ending.popleft().result()
        while ending:
            yield ending.popleft().result()

"""The loop of every batch job: prepare slides ahead, encode their tiles, finish each behind, record how it ended."""

import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ...data.slides.slide_table import SlideEntry
from ...data.tiles.readers import usable_cores
from ..signals import Stopped, ending_soon
from .claims import ClaimedError
from .devices import Feed
from .ledger import SUMMARY, Summary
from .memory import MemoryBudget, Turn
from .one_job import one_job
from .progress import JobProgress, Progress
from .result import SlideResult
from .shards import Shard

PREPARED_AHEAD = max(1, min(8, usable_cores() // 4))
"""Slides that are prepared at a time: finding tissue takes a core a second or more, and small slides are encoded in less."""
FINISHED_BEHIND = 2
"""Slides whose embeddings wait to be written."""


class Prepared(Protocol):
    """A slide that has been prepared."""

    @property
    def entry(self) -> SlideEntry:
        """The slide."""
        ...

    @property
    def resources(self) -> ExitStack:
        """What the slide holds (its claim, the open file); closed when it is finished or given up."""
        ...


S = TypeVar("S")
T = TypeVar("T", bound=Prepared)


class BatchJob(Protocol[T]):
    """What is done to each slide: `prepare` in threads ahead, `encode` all as one stream, `finish` in a thread behind.

    What `prepare` or `finish` raises is how that slide ends: failed, or skipped where another process has claimed it.
    """

    @property
    def description(self) -> str:
        """What the job does, in a line or two, for the user to check."""
        ...

    @property
    def made_with(self) -> dict[str, Any]:
        """What results depend on, in plain types; processes with other settings may not work in the folder meanwhile."""
        ...

    def prepare(self, entry: SlideEntry, turn: Turn, /) -> T | SlideResult:
        """All that comes before the models; a result if that ends the slide. Much memory is taken from `turn` first."""
        ...

    def encode(self, slides: Generator[T | SlideResult], progress: Progress, /) -> Generator[T | SlideResult]:
        """Embed the tiles of all slides as one stream, and give the slides on in order."""
        ...

    def finish(self, prepared: T, progress: Progress, /) -> SlideResult:
        """What is left: the other models, the files. The slide's resources are closed after it."""
        ...

    def stop(self) -> None:
        """End what `prepare` is at work on."""
        ...


def run_batch(
    job: BatchJob[T],
    entries: Sequence[SlideEntry] | Feed,
    output: Path,
    notes: Sequence[str] = (),
    shard: Shard | None = None,
) -> list[SlideResult]:
    """Run a job over slides, and write each one's result into the summary as it ends.

    Args:
        job: What is done to each slide.
        entries: The slides; or what gives them, is told the progress and writes the summary.
        output: Folder of the summary.
        notes: Notes to print first.
        shard: The shard that these slides are, if they are one.

    Returns:
        One result per slide, in the order of the input.

    Raises:
        LongslideError: Another job is at work in the folder with other settings.
        Stopped: SIGUSR1 has ended the job before all slides were done.
    """
    feed = entries if isinstance(entries, Feed) else None
    memory = MemoryBudget()
    unfinished: set[ExitStack] = set()  # what the slides under way hold

    def give_up() -> None:
        with ExitStack() as closing_all:  # whatever one of them raises
            for held in unfinished:
                closing_all.callback(held.close)

    with ExitStack() as given_up, ExitStack() as running:
        given_up.callback(give_up)
        running.enter_context(one_job(output, job.made_with))
        if shard is not None:
            shard.begin(output, job.made_with)
        shown: Progress = JobProgress(len(entries)) if feed is None else feed
        progress = running.enter_context(shown)
        for note in (job.description, *notes):
            progress.note(note)
        summary = None
        if feed is None:
            summary = running.enter_context(Summary(output, SUMMARY if shard is None else shard.summary, progress.note))
        soon = running.enter_context(ending_soon())

        def prepare(entry: SlideEntry, turn: Turn) -> T | SlideResult:
            with ExitStack() as failed:
                failed.callback(turn.close)
                prepared = _ended(entry, lambda: job.prepare(entry, turn))
                if not isinstance(prepared, SlideResult):
                    if turn.size is None:
                        turn.take(0)
                    prepared.resources.push(failed.pop_all())
                    unfinished.add(prepared.resources)
                return prepared

        def finish(prepared: T | SlideResult) -> SlideResult:
            if isinstance(prepared, SlideResult):
                result = prepared
            else:
                with prepared.resources:
                    result = _ended(prepared.entry, lambda: job.finish(prepared, progress))
                unfinished.discard(prepared.resources)
            progress.slide_ended(result)
            if summary is not None:
                summary.add(result)
            return result

        # Closed from the last to the first, whatever ends the job, and then what slides hold that were not finished.
        ends_soon = soon.is_set if feed is None else feed.ends_soon
        ahead = running.enter_context(closing(_ahead(prepare, entries, memory, ends_soon)))
        encoded = running.enter_context(closing(job.encode(ahead, progress)))
        results = running.enter_context(closing(_behind(finish, encoded)))
        try:
            ended = list(results)
        except BaseException:  # Ctrl-C, for one
            job.stop()
            memory.stop()
            raise
    if feed is None and len(ended) < len(entries):
        raise Stopped(signal.SIGUSR1)
    return ended


def _ended(entry: SlideEntry, work: Callable[[], S]) -> S | SlideResult:
    """What work on a slide gives, or how it ended the slide: never the job."""
    try:
        return work()
    except ClaimedError as busy:
        return SlideResult.skipped(entry, str(busy))
    except Exception as error:
        return SlideResult.failed(entry, error)


def _ahead(
    prepare: Callable[[SlideEntry, Turn], T | SlideResult],
    entries: Iterable[SlideEntry | None],
    memory: MemoryBudget,
    ends_soon: Callable[[], bool],
) -> Generator[T | SlideResult]:
    """Prepare the next slides (open them, find tissue) while the models work on earlier ones.

    When the job ends soon, slides that no model has begun with are left.
    """
    with ThreadPoolExecutor(PREPARED_AHEAD, thread_name_prefix="prepare") as executor:
        following: deque[Future[T | SlideResult]] = deque()
        try:
            for entry in entries:
                if ends_soon():
                    break
                if entry is not None:
                    following.append(executor.submit(prepare, entry, memory.turn()))
                if len(following) > (0 if entry is None else PREPARED_AHEAD):
                    yield following.popleft().result()
                elif entry is None:
                    time.sleep(0.2)
            while following and not ends_soon():
                yield following.popleft().result()
        finally:
            memory.stop()
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

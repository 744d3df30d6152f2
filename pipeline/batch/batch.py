"""The loop of every batch job: prepare a slide ahead, finish it, record how it ended."""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Protocol, TypeVar

from ...data.slides.slide_table import SlideEntry
from ...errors import LongslideError
from .ledger import SUMMARY, SUMMARY_WAIT, record
from .progress import JobProgress
from .result import SlideResult

T = TypeVar("T")


class BatchJob(Protocol[T]):
    """What is done to each slide: `prepare` in a thread ahead, `finish` where the models are."""

    @property
    def description(self) -> str:
        """What the job does, in a line or two, for the user to check."""
        ...

    def prepare(self, entry: SlideEntry, /) -> T | SlideResult:
        """All that comes before the models; a result if that ends the slide."""
        ...

    def finish(self, prepared: T, progress: JobProgress, /) -> SlideResult:
        """All that needs the models."""
        ...

    def stop(self) -> None:
        """End what `prepare` is at work on."""
        ...


def run_batch(
    job: BatchJob[T], entries: Sequence[SlideEntry], output: Path, notes: Sequence[str] = ()
) -> list[SlideResult]:
    """Run a job over slides, and write each one's result into the summary as it ends.

    Args:
        job: What is done to each slide.
        entries: The slides.
        output: Folder of the summary.
        notes: Notes to print first.

    Returns:
        One result per slide, in the order of the input.
    """
    results: list[SlideResult] = []
    unrecorded: list[SlideResult] = []
    with JobProgress(len(entries)) as progress, ExitStack() as resources:
        for note in (job.description, *notes):
            progress.note(note)
        ahead = resources.enter_context(closing(_one_ahead(job.prepare, job.stop, entries)))
        for prepared in ahead:
            result = prepared if isinstance(prepared, SlideResult) else job.finish(prepared, progress)
            progress.slide_ended(result)
            results.append(result)
            unrecorded.append(result)
            unrecorded = _recorded(output, unrecorded, progress, last=len(results) == len(entries))
    return results


def _recorded(output: Path, results: list[SlideResult], progress: JobProgress, *, last: bool) -> list[SlideResult]:
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


def _one_ahead(
    prepare: Callable[[SlideEntry], T], stop: Callable[[], None], entries: Sequence[SlideEntry]
) -> Generator[T]:
    """Prepare the next slide (open it, find tissue) while the models work on the present one."""
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as executor:
        following = executor.submit(prepare, entries[0])
        try:
            for entry in [*entries[1:], None]:
                current = following.result()
                if entry is not None:
                    following = executor.submit(prepare, entry)
                yield current
        except BaseException:  # Ctrl-C, for one: the executor waits for the slide that is being prepared
            stop()
            raise

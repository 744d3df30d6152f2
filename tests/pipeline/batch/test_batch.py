"""The loop of a batch job, without models: what it holds of slides while it runs and when it is ended."""

import gc
import weakref
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from longslide.data.slides.slide_table import SlideEntry
from longslide.errors import LongslideError
from longslide.pipeline.batch.batch import FINISHED_BEHIND, PREPARED_AHEAD, run_batch
from longslide.pipeline.batch.claims import ClaimedError
from longslide.pipeline.batch.memory import Turn
from longslide.pipeline.batch.progress import Progress
from longslide.pipeline.batch.result import SlideResult


@dataclass
class Held:
    entry: SlideEntry
    resources: ExitStack = field(default_factory=ExitStack)


class Job:
    """Keeps count of what slides hold; `ends` raises when it is finished."""

    description = "a job of a test"
    made_with: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, ends: str = "") -> None:
        self.ends = ends
        self.held: list[weakref.ref[ExitStack]] = []
        self.most = 0
        self.opened: set[str] = set()

    def prepare(self, entry: SlideEntry, turn: Turn, /) -> Held | SlideResult:
        held = Held(entry)
        self.opened.add(entry.slide_id)
        held.resources.callback(self.opened.discard, entry.slide_id)
        self.held.append(weakref.ref(held.resources))
        return held

    def encode(self, slides: Generator[Held | SlideResult], progress: Progress, /) -> Generator[Held | SlideResult]:
        yield from slides

    def finish(self, prepared: Held, progress: Progress, /) -> SlideResult:
        gc.collect()
        self.most = max(self.most, sum(one() is not None for one in self.held))
        if prepared.entry.slide_id == self.ends:
            raise KeyboardInterrupt
        return SlideResult(prepared.entry.slide_id, "", "done")

    def stop(self) -> None:
        pass


@pytest.fixture(autouse=True)
def what_was_there_before_is_not_collected() -> Iterator[None]:
    """Everything that was imported: a collection takes half a second with it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def entries(count: int) -> list[SlideEntry]:
    return [SlideEntry(Path(f"{number:03}.svs"), f"{number:03}") for number in range(count)]


def test_a_job_holds_as_much_of_many_slides_as_of_few(tmp_path: Path) -> None:
    job = Job()
    assert len(run_batch(job, entries(30), tmp_path)) == 30
    assert not job.opened
    under_way = PREPARED_AHEAD + 1 + FINISHED_BEHIND + 1
    assert 1 <= job.most <= under_way + 4, "those that a thread or a generator is just giving on"


def test_a_job_that_is_ended_closes_what_its_slides_hold(tmp_path: Path) -> None:
    job = Job(ends="005")
    with pytest.raises(KeyboardInterrupt):
        run_batch(job, entries(60), tmp_path)
    assert not job.opened


def test_what_is_raised_over_one_slide_ends_that_slide_alone(tmp_path: Path) -> None:
    class Troubled(Job):
        def prepare(self, entry: SlideEntry, turn: Turn, /) -> Held | SlideResult:
            if entry.slide_id == "001":
                raise ClaimedError({})
            return super().prepare(entry, turn)

        def finish(self, prepared: Held, progress: Progress, /) -> SlideResult:
            if prepared.entry.slide_id == "002":
                raise LongslideError("002.svs: no tile can be read")
            return super().finish(prepared, progress)

    job = Troubled()
    results = run_batch(job, entries(4), tmp_path)
    assert [one.status for one in results] == ["done", "skipped", "failed", "done"]
    assert results[2].reason == "002.svs: no tile can be read"
    assert not job.opened, "the resources of a failed slide are closed too"

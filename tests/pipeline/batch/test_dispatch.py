"""Which worker gets which slide: a simulated cluster whose processes and nodes die, and the rules one by one."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from longslide.data.slides.slide_table import SlideEntry
from longslide.pipeline.batch.claims import HEARTBEAT, SILENT
from longslide.pipeline.batch.dispatch import RETRY, Dispatch
from longslide.pipeline.batch.result import BUSY, SlideResult

SCHEDULE = Path(__file__).parents[3] / "benchmarks" / "schedule.py"


@pytest.fixture(scope="module")
def simulate() -> Callable[..., Any]:
    found = importlib.util.spec_from_file_location("schedule", SCHEDULE)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["schedule"] = module  # where its dataclass looks itself up
    found.loader.exec_module(module)
    usual = {"mean_seconds": 60.0, "restart_seconds": 60.0, "ahead": 4}

    def run(**options: Any) -> Any:
        return module.Simulation(**(usual | options)).run()

    return run


@pytest.mark.parametrize("seed", range(3))
def test_a_cluster_that_fails_now_and_then_takes_hardly_longer_and_loses_nothing(
    simulate: Callable[..., Any], seed: int
) -> None:
    found = simulate(slides=20_000, workers=64, hours_between_deaths=20.0, nodes_lost=2, deadly=10, seed=seed)
    assert found.deaths > 30
    assert found.given_again > 100
    assert (found.lost, found.twice) == (0, 0)
    assert found.failed_deadly == 10
    assert found.done == 20_000 - 10 - found.failed_else
    assert found.failed_else <= 2, "two processes that die by chance with the same slide"
    assert found.over_ideal < 0.05


def test_with_no_failures_every_worker_is_at_work_until_nearly_the_end(simulate: Callable[..., Any]) -> None:
    quiet = {"hours_between_deaths": 1e9, "nodes_lost": 0, "deadly": 0, "ahead": 0, "seed": 0}
    found = simulate(slides=20_000, workers=64, **quiet)
    assert (found.deaths, found.done, found.given_again) == (0, 20_000, 0)
    assert found.over_ideal < 0.002


def dispatch_of(sizes: dict[str, float], clock: Callable[[], float] = lambda: 0.0) -> Dispatch:
    return Dispatch([SlideEntry(Path(f"{name}.svs"), name) for name in sizes], list(sizes.values()), clock)


def taken(answer: object) -> str | None:
    assert not isinstance(answer, str)
    return answer.slide_id if isinstance(answer, SlideEntry) else None


def done(name: str) -> SlideResult:
    return SlideResult(name, f"{name}.svs", "done", seconds=1.0)


def test_the_largest_slides_come_first() -> None:
    dispatch = dispatch_of({"small": 1, "large": 9, "middle": 5})
    assert [taken(dispatch.next(worker)) for worker in range(3)] == ["large", "middle", "small"]


def test_slides_of_a_dead_worker_come_after_all_others_and_alone() -> None:
    dispatch = dispatch_of({"a": 3, "b": 2, "c": 1})
    assert taken(dispatch.next("first")) == "a"
    assert dispatch.died("first") == []
    assert [taken(dispatch.next("second")) for _ in range(3)] == ["b", "c", None], "not beside others"
    for name in "bc":
        dispatch.ended("second", done(name))
    assert taken(dispatch.next("second")) == "a"
    [failed] = dispatch.died("second")
    assert (failed.slide_id, failed.status) == ("a", "failed")
    assert dispatch.next("third") == "over"


def test_a_worker_waits_while_slides_of_others_may_come_back() -> None:
    dispatch = dispatch_of({"a": 1})
    assert taken(dispatch.next("first")) == "a"
    assert taken(dispatch.next("second")) is None
    dispatch.died("first")
    assert taken(dispatch.next("second")) == "a"
    dispatch.ended("second", done("a"))
    assert dispatch.next("second") == "over"


def test_a_slide_that_a_dead_worker_still_claims_is_tried_again_until_the_claim_is_void() -> None:
    now = [0.0]
    dispatch = dispatch_of({"a": 1}, lambda: now[0])
    dispatch.next("first")
    dispatch.died("first")
    busy = SlideResult("a", "a.svs", "skipped", f"{BUSY} (process 1 on a node that is gone)")
    tries = 0
    while (answer := dispatch.next("second")) != "over":
        if answer is None:
            now[0] += RETRY
            continue
        tries += 1
        if dispatch.ended("second", busy):
            break
    assert tries > 10
    assert SILENT + 2 * HEARTBEAT <= now[0] < SILENT + 2 * HEARTBEAT + 2 * RETRY
    assert dispatch.results["a"] is busy


def test_a_slide_that_another_job_has_is_left_to_it() -> None:
    dispatch = dispatch_of({"a": 1})
    dispatch.next("first")
    assert dispatch.ended("first", SlideResult("a", "a.svs", "skipped", f"{BUSY} (process 1 on host)"))
    assert dispatch.next("first") == "over"


def test_stopping_soon_leaves_what_is_left() -> None:
    dispatch = dispatch_of({"a": 1, "b": 2})
    dispatch.next("first")
    dispatch.stop(soon=True)
    assert dispatch.next("first") == "stop"
    assert dispatch.results == {}

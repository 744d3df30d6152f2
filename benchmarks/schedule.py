"""Deals a million slides to 512 GPUs that fail now and then: the scheduler of `--devices` and `--ray`, simulated.

    python benchmarks/schedule.py                                # a million slides, 512 workers
    python benchmarks/schedule.py --slides 20000 --workers 64

A worker has slides in hand beside the one that it encodes, as `run_batch` does. Its process dies at random, and is started
again; whole nodes are lost for good; deadly slides take down any process that begins them. Times of slides are log-normal.
The ideal is the time of all slides but the deadly ones, each once, on the workers that are there, none ever waiting.
"""

import argparse
import heapq
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import numpy as np
from longslide.data.slides.slide_table import SlideEntry
from longslide.pipeline.batch.dispatch import Dispatch
from longslide.pipeline.batch.result import SlideResult

PER_NODE = 8
POLL = 0.2
"""Seconds until a worker that was told to wait asks again, as in `run_batch`."""


@dataclass(frozen=True)
class Outcome:
    """What a simulation found.

    Attributes:
        hours: From the first slide to the last.
        ideal_hours: See above.
        over_ideal: By what share it is longer.
        deaths: Processes that died.
        done: Slides that are done.
        deadly: Slides that take down processes.
        failed_deadly: Those of them that failed by name.
        failed_else: Others that failed: two processes died by chance while they had them.
        given_again: Slides that were given to a worker more than once.
        lost: Slides with no result.
        twice: Slides that were done twice, or were at two workers at once.
        dealing_microseconds: What it takes this machine to deal out a slide and hear of its end.
    """

    hours: float
    ideal_hours: float
    over_ideal: float
    deaths: int
    done: int
    deadly: int
    failed_deadly: int
    failed_else: int
    given_again: int
    lost: int
    twice: int
    dealing_microseconds: float


class Simulation:
    """A job of many slides; the arguments are those of the command line."""

    def __init__(
        self,
        slides: int,
        workers: int,
        mean_seconds: float,
        hours_between_deaths: float,
        restart_seconds: float,
        nodes_lost: int,
        deadly: int,
        ahead: int,
        seed: int,
    ) -> None:
        self.random = np.random.default_rng(seed)
        self.seconds = self.random.lognormal(0, 0.8, slides)
        self.seconds *= mean_seconds / self.seconds.mean()
        self.deadly = set(self.random.choice(slides, deadly, replace=False).tolist())
        self.mean_life = hours_between_deaths * 3600
        self.restart_seconds = restart_seconds
        self.ahead = ahead
        self.now = 0.0
        entries = [SlideEntry(Path(f"{number}.svs"), str(number)) for number in range(slides)]
        self.dealing = -time.perf_counter()
        self.dispatch = Dispatch(entries, self.seconds.tolist(), clock=lambda: self.now)
        self.dealing += time.perf_counter()
        self.hands: list[list[int]] = [[] for _ in range(workers)]
        self.process = [0] * workers  # which one it is: what earlier ones were about to do is void
        self.waits = [False] * workers
        self.ends_at = np.full(workers, np.inf)
        self.at_worker: set[int] = set()
        self.given: Counter[int] = Counter()
        self.times_done: Counter[int] = Counter()
        self.deaths = self.twice = 0
        self.last = 0.0
        self.events: list[tuple[float, int, str, int, int]] = []
        self.number = count()
        half = self.seconds.sum() / workers / 2
        for node in self.random.choice(workers // PER_NODE, nodes_lost, replace=False):
            when = self.random.uniform(0, half)
            for worker in range(node * PER_NODE, (node + 1) * PER_NODE):
                self.ends_at[worker] = when
                heapq.heappush(self.events, (when, next(self.number), "lost", worker, -1))
        for worker in range(workers):
            self.at(0.0, "started", worker)

    def run(self) -> Outcome:
        """Run until every slide has a result, or nothing happens any more."""
        while self.events and len(self.dispatch.results) < len(self.seconds):
            self.now, _, what, worker, process = heapq.heappop(self.events)
            if process not in (-1, self.process[worker]) or self.now > self.ends_at[worker]:
                continue
            if what == "started":
                self.at(self.now + self.random.exponential(self.mean_life), "dies", worker)
                self.ask(worker)
            elif what == "asks":
                self.waits[worker] = False
                self.ask(worker)
            elif what == "done":
                self.done(worker)
            else:
                self.die(worker)
                if what == "dies":
                    self.at(self.now + self.restart_seconds, "started", worker)
        slides, results = len(self.seconds), self.dispatch.results
        failed = {int(one.slide_id) for one in results.values() if one.status == "failed"}
        ideal = self.ideal()
        return Outcome(
            hours=self.last / 3600,
            ideal_hours=ideal / 3600,
            over_ideal=self.last / ideal - 1,
            deaths=self.deaths,
            done=len(self.times_done),
            deadly=len(self.deadly),
            failed_deadly=len(failed & self.deadly),
            failed_else=len(failed - self.deadly),
            given_again=sum(times > 1 for times in self.given.values()),
            lost=slides - len(results),
            twice=self.twice,
            dealing_microseconds=self.dealing / slides * 1e6,
        )

    def at(self, when: float, what: str, worker: int) -> None:
        """Something will happen to the process that the worker has now."""
        heapq.heappush(self.events, (when, next(self.number), what, worker, self.process[worker]))

    def ask(self, worker: int) -> None:
        """A worker comes for slides until its hands are full."""
        hand = self.hands[worker]
        while len(hand) <= self.ahead:
            self.dealing -= time.perf_counter()
            answer = self.dispatch.next(worker)
            self.dealing += time.perf_counter()
            if not isinstance(answer, SlideEntry):
                if answer is None and not self.waits[worker]:
                    self.waits[worker] = True
                    self.at(self.now + POLL, "asks", worker)
                return
            slide = int(answer.slide_id)
            self.twice += slide in self.at_worker
            self.at_worker.add(slide)
            self.given[slide] += 1
            hand.append(slide)
            if len(hand) == 1:
                self.begin(worker)

    def begin(self, worker: int) -> None:
        """The tile encoder begins with the first slide in hand."""
        slide = self.hands[worker][0]
        if slide in self.deadly:
            self.at(self.now + self.seconds[slide] / 2, "dies", worker)
        else:
            self.at(self.now + self.seconds[slide], "done", worker)

    def done(self, worker: int) -> None:
        """The first slide in hand is done."""
        slide = self.hands[worker].pop(0)
        self.at_worker.remove(slide)
        self.times_done[slide] += 1
        self.twice += self.times_done[slide] > 1
        self.last = self.now
        self.dealing -= time.perf_counter()
        self.dispatch.ended(worker, SlideResult(str(slide), f"{slide}.svs", "done", seconds=float(self.seconds[slide])))
        self.dealing += time.perf_counter()
        if self.hands[worker]:
            self.begin(worker)
        self.ask(worker)

    def die(self, worker: int) -> None:
        """A process dies with all that it has in hand."""
        self.deaths += 1
        self.process[worker] += 1
        self.waits[worker] = False
        self.at_worker.difference_update(self.hands[worker])
        self.hands[worker].clear()
        self.dealing -= time.perf_counter()
        self.dispatch.died(worker)
        self.dealing += time.perf_counter()

    def ideal(self) -> float:
        """Seconds after which the workers, as long as they are there, have had time for all slides but the deadly ones."""
        work = self.seconds.sum() - sum(self.seconds[slide] for slide in self.deadly)
        ends = np.sort(self.ends_at)
        gone, left = 0.0, len(ends)
        for end in ends:
            if gone + end * left >= work:
                break
            gone, left = gone + end, left - 1
        return float((work - gone) / left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=512)
    parser.add_argument("--mean-seconds", type=float, default=60.0, help="of a slide on a worker")
    parser.add_argument("--hours-between-deaths", type=float, default=100.0, help="of the processes of one worker")
    parser.add_argument("--restart-seconds", type=float, default=60.0, help="from a death to the next process")
    parser.add_argument("--nodes-lost", type=int, default=4, help="of eight workers each, in the first half")
    parser.add_argument("--deadly", type=int, default=20, help="slides that take down processes")
    parser.add_argument("--ahead", type=int, default=4, help="slides in hand beside the one that is encoded")
    parser.add_argument("--seed", type=int, default=0)
    outcome = Simulation(**vars(parser.parse_args())).run()
    print(json.dumps({name: round(value, 4) for name, value in asdict(outcome).items()}, indent=1))


if __name__ == "__main__":
    main()

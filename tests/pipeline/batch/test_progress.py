"""Where no bar can be drawn, lines say how far a job is."""

import time

import pytest
from longslide.pipeline.batch import progress
from longslide.pipeline.batch.progress import JobProgress, duration
from longslide.pipeline.batch.result import SlideResult


def test_a_line_a_minute_says_tiles_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "MINUTE", 0.2)
    with JobProgress(3) as shown:
        shown.slide_started("a", 2000)
        shown.tiles_done(500)
        assert capsys.readouterr().err == "", "a minute has not passed"
        time.sleep(0.21)
        shown.tiles_done(700, "limited by reading")
        [line] = capsys.readouterr().err.splitlines()
        shown.slide_ended(SlideResult("a", "a.svs", "done", tiles=2000, seconds=1.0))
        time.sleep(0.21)
        shown.tiles_done(800)
        *_, later = capsys.readouterr().err.splitlines()
    assert line.startswith("[0/3] 1,200 tiles, ")
    assert line.endswith("tiles/s limited by reading"), "nothing is known of the time before a slide has ended"
    assert later.startswith("[1/3] 2,000 tiles, ")
    assert later.endswith(" s left")


def test_times_are_in_the_unit_that_reads_best() -> None:
    assert [duration(seconds) for seconds in (4.4, 90, 600, 9000)] == ["4.4 s", "1.5 min", "10.0 min", "2.5 h"]

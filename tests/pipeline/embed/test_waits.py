"""What limits embedding is said, with what would make it faster."""

import time

import pytest
from longslide.pipeline.embed.waits import Waits


def test_the_encoder_is_the_limit_unless_more_than_a_little_is_lost_elsewhere() -> None:
    waits = Waits()
    waits.seconds |= {"encoder": 90.0, "tiles": 8.0, "slides": 2.0}
    assert waits.limit == "the tile encoder"
    assert str(waits).startswith("time: the tile encoder 90%, reading tiles 8%, opening slides and finding tissue 2%;")
    waits.seconds["tiles"] = 30.0
    assert waits.limit == "the tile encoder"
    waits.seconds["tiles"] = 60.0
    assert waits.limit == "reading tiles"
    assert "more cores (--threads)" in str(waits)


def test_time_is_counted_from_one_call_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5, 13.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    waits = Waits()
    waits.lap("tiles")
    waits.lap("encoder")
    assert waits.seconds == {"tiles": 2.5, "encoder": 0.5, "slides": 0.0, "writing": 0.0}

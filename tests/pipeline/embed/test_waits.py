"""What limits embedding is said, with what would make it faster."""

import time

from longslide.pipeline.embed.waits import Waits


def test_the_encoder_is_the_limit_unless_more_than_a_little_is_lost_elsewhere() -> None:
    waits = Waits()
    waits.seconds |= {"encoder": 90.0, "tiles": 8.0, "slides": 2.0}
    assert waits.limit == "the tile encoder"
    assert str(waits).startswith("time: the tile encoder 90%, reading tiles 8%, opening slides and finding tissue 2%;")
    waits.seconds["tiles"] = 40.0
    assert waits.limit == "reading tiles"
    assert "more cores (--threads)" in str(waits)


def test_time_is_counted_from_one_call_to_the_next() -> None:
    waits = Waits()
    time.sleep(0.05)
    waits.lap("tiles")
    waits.lap("encoder")
    assert 0.05 <= waits.seconds["tiles"] < 5
    assert waits.seconds["encoder"] < 0.05

"""Memory is given out in the order of the slides: never more than there is, and no slide waits for one that waits for it."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classifier_files import ENCODER
from longslide import embed
from longslide.data.slides.image import ImageReader
from longslide.errors import LongslideError
from longslide.pipeline.batch import memory
from longslide.pipeline.batch.memory import MemoryBudget, Turn
from longslide.pipeline.batch.result import SlideResult
from longslide.pipeline.embed.job import EmbedJob
from PIL import Image


def takes(turn: Turn, size: int) -> threading.Thread:
    thread = threading.Thread(target=turn.take, args=(size,), daemon=True)
    thread.start()
    thread.join(0.2)
    return thread


def test_who_finds_no_room_waits_until_there_is_some() -> None:
    budget = MemoryBudget(10)
    first, second, third = budget.turn(), budget.turn(), budget.turn()
    first.take(6)
    waiting = takes(second, 6)
    assert waiting.is_alive()
    also = takes(third, 1)
    assert also.is_alive()  # it came later: else the second one could wait for it
    first.close()
    waiting.join(5)
    also.join(5)
    assert (second.size, third.size) == (6, 1)


def test_a_later_slide_waits_for_what_an_earlier_one_has_not_asked_for_yet() -> None:
    budget = MemoryBudget(10)
    first, second = budget.turn(), budget.turn()
    waiting = takes(second, 6)
    assert waiting.is_alive()
    first.take(0)
    waiting.join(5)
    assert second.size == 6


def test_a_slide_that_needs_none_never_waits() -> None:
    budget = MemoryBudget(10)
    first, second = budget.turn(), budget.turn()
    second.take(0)
    first.take(10)
    assert (first.size, second.size) == (10, 0)


def test_who_needs_more_than_there_is_waits_to_be_alone() -> None:
    budget = MemoryBudget(10)
    first, second = budget.turn(), budget.turn()
    first.take(1)
    waiting = takes(second, 100)
    assert waiting.is_alive()
    first.close()
    waiting.join(5)
    assert second.size == 100


def test_who_already_has_memory_never_waits_for_a_slide_that_is_encoded_later() -> None:
    budget = MemoryBudget(10)
    first, second = budget.turn(), budget.turn()
    first.take(0)
    second.take(8)
    takes(first, 6).join(5)  # an open slide that takes more than its file told
    assert (first.size, second.size) == (6, 8)
    waiting = takes(budget.turn(), 1)
    assert waiting.is_alive()
    second.close()
    waiting.join(5)
    assert not waiting.is_alive()


def test_waiting_ends_with_the_job() -> None:
    budget = MemoryBudget(10)
    first, second = budget.turn(), budget.turn()
    first.take(10)
    raised: list[Exception] = []

    def wait() -> None:
        try:
            second.take(10)
        except LongslideError as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    budget.stop()
    thread.join(5)
    assert len(raised) == 1


@pytest.mark.slow
def test_plain_images_of_a_batch_are_in_memory_only_as_far_as_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.yaml").write_text(ENCODER)
    (tmp_path / "slides").mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        picture = np.full((600, 800, 3), 240, np.uint8)
        picture[100:500, 100:500] = rng.integers((150, 40, 120), (230, 120, 200), (400, 400, 3))
        suffix = ("png", "jpg", "bmp")[number % 3]
        Image.fromarray(picture).save(tmp_path / "slides" / f"{number}.{suffix}")
    open_now: set[int] = set()
    most = 0
    opened, closed = ImageReader.__init__, ImageReader.close

    def counted(self: ImageReader, path: Path) -> None:
        nonlocal most
        opened(self, path)
        open_now.add(id(self))
        most = max(most, len(open_now))

    def uncounted(self: ImageReader) -> None:
        closed(self)
        open_now.discard(id(self))

    monkeypatch.setattr(ImageReader, "__init__", counted)
    monkeypatch.setattr(ImageReader, "close", uncounted)
    finish = EmbedJob.finish

    def late(*given: Any) -> SlideResult:
        time.sleep(1)  # so that slides wait, as for a large encoder
        return finish(*given)

    monkeypatch.setattr(EmbedJob, "finish", late)
    job: dict[str, Any] = {
        "slides": tmp_path / "slides",
        "tile_encoder": str(tmp_path / "tiny.yaml"),
        "tile_checkpoint": "random",
        "slide_mpp": 0.5,
        "device": "cpu",
    }
    assert [one.status for one in embed(output=tmp_path / "much", **job)] == ["done"] * 6
    with_room, most = most, 0
    monkeypatch.setattr(memory, "MOST_BYTES", 4 * 600 * 800 + 1000)
    assert [one.status for one in embed(output=tmp_path / "little", **job)] == ["done"] * 6
    assert with_room > most == 1
    assert not open_now

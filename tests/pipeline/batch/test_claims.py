"""Claims between processes that share an output folder, also where the file system has no locks."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from longslide.errors import LongslideError
from longslide.pipeline.batch import claims
from longslide.pipeline.batch.claims import ClaimedError, claim, lock_folder, take
from longslide.pipeline.batch.ledger import SUMMARY, record
from longslide.pipeline.batch.result import SlideResult

HOLD = """
import sys, time
from pathlib import Path
from longslide.pipeline.batch import claims
if sys.argv[3] == "without locks":
    import errno, fcntl
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")
    fcntl.flock = flock
held = claims.take(claims.lock_folder(Path(sys.argv[1])) / sys.argv[2])
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["with locks", "without locks"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system with locks, and one on which they are an error, as on Lustre without `-o flock`."""
    if request.param == "without locks":

        def flock(descriptor: int, operation: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", flock)
    return str(request.param)


@pytest.fixture
def holder(locks: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the slide `a`."""
    words = [sys.executable, "-c", HOLD, str(tmp_path), "a.lock", locks]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_claim_is_one_processes_until_it_is_released(locks: str, tmp_path: Path) -> None:
    held = claim(tmp_path, "a")
    with pytest.raises(ClaimedError):
        claim(tmp_path, "a")
    claim(tmp_path, "b").release()
    held.release()
    claim(tmp_path, "a").release()
    assert not list(lock_folder(tmp_path).iterdir())


def test_who_holds_a_claim_is_said(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    said = f"another process is working on it (process {holder.pid} on {socket.gethostname()}, for 0 min)"
    with pytest.raises(ClaimedError) as refused:
        claim(tmp_path, "a")
    assert str(refused.value) == said


def test_a_claim_ends_with_its_process_however_that_dies(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    claim(tmp_path, "a").release()


def test_a_holder_on_another_machine_that_fell_silent_is_taken_over_with_a_remark(
    holder: subprocess.Popen[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The other machine is made up by the record; its process lives, so that its lock is still there."""
    path = lock_folder(tmp_path) / "a.lock"
    path.write_text(json.dumps({"host": "node17", "process": 4711, "since": time.time() - 3600}))
    with pytest.raises(ClaimedError, match=r"process 4711 on node17, for 60 min"):
        claim(tmp_path, "a")
    ago = time.time() - claims.SILENT - 60
    os.utime(path, (ago, ago))
    held = claim(tmp_path, "a")
    assert "taken over from process 4711 on node17, for 60 min, silent for 6 min" in caplog.text
    assert held.held
    with pytest.raises(ClaimedError):
        claim(tmp_path, "a")
    held.release()


def test_a_holder_says_that_it_lives(locks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = claim(tmp_path, "a")
    ago = time.time() - 1000
    os.utime(held.path, (ago, ago))
    held.touch()
    with pytest.raises(ClaimedError):
        claim(tmp_path, "a")
    held.release()


def test_one_that_was_taken_over_leaves_the_claim_of_the_other(locks: str, tmp_path: Path) -> None:
    held = claim(tmp_path, "a")
    ago = time.time() - claims.SILENT - 60
    os.utime(held.path, (ago, ago))
    other = take(held.path)
    assert not held.held
    held.release()
    assert other.held
    with pytest.raises(ClaimedError):
        claim(tmp_path, "a")
    other.release()


def test_a_summary_that_a_stopped_process_holds_is_an_error_that_says_so(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path), f".{SUMMARY}.lock", "with locks"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        one, other = (SlideResult(name, f"{name}.svs", "failed", "broken") for name in "ab")
        with pytest.raises(
            LongslideError, match=rf"summary\.csv: locked by process {process.pid} on .*is it stopped\?"
        ):
            record(tmp_path, one, timeout=0.3)
        process.kill()
    record(tmp_path, one, other)
    assert (tmp_path / SUMMARY).read_text().count("broken") == 2

"""SIGTERM and SIGHUP end a command as Ctrl-C does, and leave neither processes nor pictures of patients."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from classifier_files import ENCODER, write_classifier
from commands import Command
from longslide import embed, write_synthetic_slide
from longslide.pipeline import signals
from longslide.pipeline.signals import Stopped, ending_signals, ending_soon
from training_cohort import quick, write_cohort

SAYS = """
import sys
from lightning import Callback

class Says(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        print("an epoch", file=sys.stderr)
"""

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`slides/` with many slides, a tile encoder, a classifier of its features."""
    home = tmp_path_factory.mktemp("home")
    (home / "tiny.yaml").write_text(ENCODER)
    (home / "slides").mkdir()
    write_synthetic_slide(home / "slides" / "s0.svs", size=(1024, 768))
    embed([home / "slides"], home / "features", str(home / "tiny.yaml"), tile_checkpoint="random", device="cpu")
    write_classifier(home / "best.ckpt", home / "features")
    for number in range(1, 60):
        os.link(home / "slides" / "s0.svs", home / "slides" / f"s{number}.svs")
    return home


def descendants(process: int) -> list[int]:
    """Processes below a process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == process:
            found += [int(folder.name), *descendants(int(folder.name))]
    return found


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ended(
    words: list[str],
    number: signal.Signals,
    when: str,
    temporary: Path,
    afterwards: Callable[[], None] = lambda: None,
) -> tuple[int, str, list[int]]:
    """Send a signal to a command alone when its standard error has a text; its status, last line, processes left."""
    with Command(words, env=os.environ | {"TMPDIR": str(temporary)}) as command:
        command.wait_for(when)
        time.sleep(0.2)
        children = descendants(command.pid)
        command.send_signal(number)
        afterwards()
        _, said = command.communicate(timeout=120)
    deadline = time.monotonic() + 15
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert command.returncode is not None
    return command.returncode, said.splitlines()[-1], [c for c in children if alive(c)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", ["embed", "predict"])
def test_a_signal_ends_a_batch_in_one_line(command: str, number: signal.Signals, home: Path, tmp_path: Path) -> None:
    words = [command, str(home / "slides"), "--device", "cpu"]
    words += ["--tile-encoder", str(home / "tiny.yaml")]
    if command == "embed":
        words += ["--output", str(tmp_path / "out"), "--tile-checkpoint", "random"]
    else:  # without an output folder there is a temporary one, with thumbnails of the slides
        words += ["--checkpoint", str(home / "best.ckpt")]
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    status, last, left = ended(words, number, "[2/60]", temporary)
    assert status == STATUS[number]
    assert last == f"longslide {command}: stopped; the same command goes on from here"
    assert not left
    assert not list(temporary.glob("longslide-*"))


WAITING = """
import threading, time
from pathlib import Path
from longslide.data.slides.openslide import OpenSlideReader

class Waiting(OpenSlideReader):  # most slides are read only after the signal: however fast the machine, some are left
    SUFFIXES = frozenset({".svs"})
    reopens = False

    def __init__(self, path):
        super().__init__(path)
        self.waits = int(path.stem[1:]) % 10 > 1

    def read_region(self, *where):
        while self.waits and threading.current_thread().name.startswith("tiles"):
            if (Path(__file__).parent / "signalled").exists():
                break
            time.sleep(0.05)
        return super().read_region(*where)
"""


@pytest.mark.parametrize("devices", [["--device", "cpu"], ["--devices", "cpu,cpu"]])
def test_usr1_finishes_what_is_in_hand_and_leaves_the_rest_to_the_next_run(
    devices: list[str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "waiting.py").write_text(WAITING)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    words = ["embed", str(home / "slides"), "--output", str(tmp_path / "out")]
    words += ["--tile-encoder", str(home / "tiny.yaml"), "--tile-checkpoint", "random", *devices]
    words += ["--reader", "waiting:Waiting", "--threads", "1", "--batch-size", "4"]
    signalled = (tmp_path / "signalled").touch
    status, last, left = ended(words, signal.SIGUSR1, "[1/60]", tmp_path, afterwards=signalled)
    assert status == 138
    assert last == "longslide embed: stopped; the same command goes on from here"
    assert not left
    done = {path.stem for path in (tmp_path / "out").glob("*.h5")}
    with (tmp_path / "out" / "summary.csv").open(newline="") as file:
        assert {row["slide_id"] for row in csv.DictReader(file) if row["status"] == "done"} == done
    assert 1 <= len(done) < 60
    assert not list((tmp_path / "out" / ".locks").iterdir())


def test_usr1_ends_a_job_whose_slides_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "GRACE", 0.2)

    def work() -> None:
        with ending_soon() as soon:
            signal.raise_signal(signal.SIGUSR1)
            assert soon.is_set()
            time.sleep(30)

    with pytest.raises(Stopped) as stopped:
        work()
    assert stopped.value.number == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_training_leaves_no_worker(number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["fit", "--config", "abmil", "--data.task", "binary", *write_cohort(tmp_path)]
    words += [*quick(tmp_path / "run"), "--trainer.max_epochs", "100000", "--patience", "100000", "--data.workers", "2"]
    words += ["--trainer.callbacks", "[{class_path: says.Says}]"]
    (tmp_path / "says.py").write_text(SAYS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    status, last, left = ended(words, number, "an epoch", tmp_path)
    assert not left
    if number == signal.SIGKILL:
        assert status == -number
    else:
        assert status == STATUS[number], last
        assert last == "longslide fit: stopped; the same command goes on from here"


def test_a_signal_that_is_ignored_stays_ignored_as_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_as_they_were_afterwards() -> None:
    before = [signal.getsignal(number) for number in STATUS]
    with ending_signals() as came, pytest.raises(Stopped):
        signal.raise_signal(signal.SIGTERM)
    assert came.status == 143
    assert [signal.getsignal(number) for number in STATUS] == before


LEFT_BEHIND = """
import sys, threading, time
from longslide.pipeline import cli, signals

signals.LINGERING = 0.5
threading.Thread(target=time.sleep, args=(600,), name="left-behind").start()
sys.exit(cli.command_line())
"""


def test_a_command_ends_with_its_status_whatever_threads_are_left() -> None:
    command = [sys.executable, "-c", LEFT_BEHIND, "fit", "--data.features", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "longslide: ended without waiting for left-behind"


SLOW_TO_IMPORT = """
import os, sys, time
from longslide.data.child_process import start_child

if __name__ == "__main__":
    child = start_child("slow_to_import", pass_fds=[])
    print(child.pid, flush=True)
    while not os.path.exists("importing"):
        time.sleep(0.05)
    os._exit(0)
open("importing", "w").close()
time.sleep(600)
"""


def test_a_process_whose_parent_dies_ends_even_while_it_imports(tmp_path: Path) -> None:
    (tmp_path / "slow_to_import.py").write_text(SLOW_TO_IMPORT)
    command = [sys.executable, "slow_to_import.py"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )  # until nobody has its pipes
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 15  # a process that ends closes its pipes first
    while alive(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(int(done.stdout))

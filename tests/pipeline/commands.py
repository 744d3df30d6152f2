"""`longslide` in a process of its own, which starts at once: forked from one that has imported what every command imports.

`python -m longslide` takes four seconds to import torch, timm and Lightning. What a command does as it starts is shown by
`test_cli.py` and `test_mistakes_before_torch.py`; what it does then is shown here, by processes that get signals, are killed
and have children as others do.
"""

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import TracebackType
from typing import Any

_SERVER: Any = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "longslide.pipeline.embed.tile_embedding",
        "longslide.pipeline.predict.predict",
        "longslide.pipeline.train.fit",
        "longslide.pipeline.train.training",
        "longslide.pipeline.train.sweep",
        "longslide.models.classifier.ensemble",
        "longslide.models.explain.classifier",
        "matplotlib.figure",
    ]
)


def longslide(*words: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = Command(words, env=env)
    out, error = command.communicate(timeout=1800)
    assert command.returncode is not None
    return subprocess.CompletedProcess(list(map(str, words)), command.returncode, out, error)


class Command:
    """A running command, with the methods of `subprocess.Popen`; its output goes into files, so that it never waits for us.

    Args:
        words: The words after `longslide`.
        code: Python that is run in its place, with those words in `sys.argv`.
        env: Its whole environment; by default ours.
        cwd: Where it works.

    Attributes:
        pid: Its number.
        returncode: Its status; the negated signal that ended it; None while it runs.
    """

    def __init__(
        self,
        words: Sequence[str | Path],
        *,
        code: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115 - they live as long as this does
        self._process = _SERVER.Process(
            target=_begin,
            args=(
                list(map(str, words)), code, dict(os.environ if env is None else env), str(cwd or Path.cwd()),
                *(DupFd(file.fileno()) for file in self._files),
            ),
        )  # fmt: skip
        self._process.start()
        self.pid: int = self._process.pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its status, if it has ended."""
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float = 500) -> int:
        """Its status, when it has ended.

        Raises:
            TimeoutExpired: It has not.
        """
        self._process.join(timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired("longslide", timeout)
        return status

    def communicate(self, timeout: float = 500) -> tuple[str, str]:
        """All that it has said on standard output and standard error, when it has ended."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            self.wait()
            raise
        return self.said(0), self.said(1)

    def said(self, which: int) -> str:
        """What it has said so far, on standard output (0) or standard error (1)."""
        file = self._files[which].fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode().replace("\r\n", "\n")

    def wait_for(self, text: str, timeout: float = 400) -> None:
        """Wait until it has said this, or has ended."""
        deadline = time.monotonic() + timeout
        while text not in self.said(0) + self.said(1) and self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> "Command":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        self.wait()


def _begin(words: list[str], code: str | None, env: dict[str, str], cwd: str, out: Any, error: Any) -> None:
    """In the new process: be what `python -m longslide` is when it has imported its modules."""
    for number, file in ((1, out), (2, error)):
        os.dup2(file.detach(), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "wb"), write_through=True) for n in (1, 2))
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:] = [cwd, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *sys.path]
    tempfile.tempdir = None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["longslide", *words]
    status: Any = 1
    try:
        if code is None:
            from longslide.pipeline.cli import command_line

            status = command_line()
        else:
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
            status = 0
    except SystemExit as ended:
        status = 0 if ended.code is None else ended.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    os._exit(status if isinstance(status, int) else 1)

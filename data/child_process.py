"""Processes that this one starts: no forks, which break threads and GPUs, and the user's script is not run again."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

_CHILD = (
    "import importlib, json, sys; here, module, path, parent, *numbers = sys.argv[1:]; sys.path[:] = json.loads(path); "
    "importlib.import_module(here).end_with(int(parent)); "  # before what takes long to import
    "importlib.import_module(module).serve(*map(int, numbers))"
)


def start_child(module: str, *numbers: int, pass_fds: Sequence[int], **options: Any) -> "subprocess.Popen[bytes]":
    """Start a process that calls `serve(*numbers)` of a module of this package; it ends when this one does.

    Args:
        module: Its full name.
        *numbers: What it is called with, such as descriptors.
        pass_fds: Descriptors that the process gets.
        **options: Of `subprocess.Popen`.
    """
    words = [__name__, module, json.dumps(sys.path), str(os.getpid()), *map(str, numbers)]
    # OpenBLAS, which nothing here calls in a loop, takes 90 MB a thread and library at once: on 32 cores 5 GB.
    environment = {"OPENBLAS_NUM_THREADS": "1", **os.environ}
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, *words], stdin=subprocess.DEVNULL, pass_fds=pass_fds, env=environment, **options
    )


def leave_signals_to_parent() -> None:
    """Ignore what is sent to all processes of a job: the parent ends this one."""
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(ending, signal.SIG_IGN)


def end_with(parent: int) -> None:
    """End this process when its parent was killed, whatever the main thread hangs in."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()

"""Set before torch and Triton are imported."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

# The tensors of the tests are tiny: threads would only get in each other's way, and a forked process would wait for ever for
# those of its parent.
os.environ["OMP_NUM_THREADS"] = "1"
# Without a GPU, Triton kernels run in its interpreter.
if not Path("/dev/nvidia0").exists():
    os.environ["TRITON_INTERPRET"] = "1"
# A job that a script runs in the background ignores Ctrl-C, one under nohup SIGHUP, and so would the commands that the tests
# start.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

SLOW = (
    "pipeline/",
    "models/explain/",
    "models/slide_encoder/",
    "models/classifier/",
    "data/slides/test_damaged_levels.py",
    "data/tiles/test_pool.py",
    "data/tissue/test_cases.py",
    "data/tissue/test_large_masks.py",
    "test_extending.py",
)
"""What `-m "not slow"` leaves out beside the tests that are marked: whole jobs, processes, drawn slides by the
dozen, and kernels in Triton's interpreter."""


def is_slow(path: Path) -> bool:
    return (path.relative_to(Path(__file__).parent).as_posix() + "/" * path.is_dir()).startswith(SLOW)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What is left out is not imported either."""
    return (config.option.markexpr == "not slow" and is_slow(collection_path)) or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_slow(item.path):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: not is_slow(item.path))  # so that several processes end at about the same time


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Any:
    """The tests of a file go to one process, so that what they share is made once."""
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False
    return LoadScopeScheduling(config, log)

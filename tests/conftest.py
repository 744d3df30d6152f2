"""Set before torch and Triton are imported."""

import os
import signal
from pathlib import Path

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(Path(__file__).parent).as_posix().startswith(SLOW):
            item.add_marker(pytest.mark.slow)

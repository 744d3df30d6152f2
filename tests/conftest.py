"""Set before torch and Triton are imported."""

import os
import signal
from pathlib import Path

# The tensors of the tests are tiny: threads would only get in each other's way, and a forked process would wait for ever for
# those of its parent.
os.environ["OMP_NUM_THREADS"] = "1"
# Without a GPU, Triton kernels run in its interpreter.
if not Path("/dev/nvidia0").exists():
    os.environ["TRITON_INTERPRET"] = "1"
# A job that a script runs in the background ignores Ctrl-C, and so would the commands that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

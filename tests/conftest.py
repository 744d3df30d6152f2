"""Set before torch and Triton are imported."""

import os
from pathlib import Path

# The tensors of the tests are tiny: threads would only get in each other's way, and a forked process would wait for ever for
# those of its parent.
os.environ["OMP_NUM_THREADS"] = "1"
# Without a GPU, Triton kernels run in its interpreter.
if not Path("/dev/nvidia0").exists():
    os.environ["TRITON_INTERPRET"] = "1"

"""One thread for each process: the tensors are tiny, and threads would only get in each other's way."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

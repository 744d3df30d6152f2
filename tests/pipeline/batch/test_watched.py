"""A watched process takes little memory of its own, so that its limit is one of the slide's."""

import numpy as np
import scipy.linalg
import threadpoolctl
from longslide.pipeline.batch.watched import WatchedProcess


def test_its_linear_algebra_has_one_thread_however_many_cores_there_are() -> None:
    np.linalg.inv(np.eye(2)), scipy.linalg.inv(np.eye(2))
    here = {pool["internal_api"] for pool in threadpoolctl.threadpool_info()}
    with WatchedProcess(60) as process:
        there = process.call("a test", threadpoolctl.threadpool_info)
    pools = [pool for pool in there if pool["internal_api"] == "openblas"]
    assert pools or "openblas" not in here
    assert all(pool["num_threads"] == 1 for pool in pools), (
        "each would take 90 MB of the 4 GB, on 32 cores more than all"
    )

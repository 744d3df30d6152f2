"""The kernels compile for a GPU where there is none: what Triton's interpreter takes, its compiler need not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget

class Hopper:
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Hopper())
from longslide.models.slide_encoder.dilated_attention.fused import backward, forward, layout, schedule
from longslide.models.slide_encoder.dilated_attention.windows import make_windows
from longslide.models.slide_encoder import launch

def rows(*shape): return torch.empty(shape, dtype=torch.bfloat16)

class FirstOfTwo:
    def rank(self): return 0

lengths = torch.tensor([0, 64], dtype=torch.int32)
windows = make_windows(((64,), (64,)), FirstOfTwo(), 16, (16, 64), (1, 16), torch.device("cpu"))
for causal, dim, shards in ((False, 48, None), (True, 64, windows)):
    out, lse = rows(64, 16, dim), torch.empty(16, 64)
    arranged, grads = rows(3, 16, 128, 64), rows(16, 128, 64)
    sizes = (lengths, layout.shards_of(lengths, shards), 1, 64, 128, 0.1)
    z = launch.marked(layout._settings(out.shape, out.dtype, lengths, [1, 16], shards)[2])
    layout.arrange.warmup(out, out, out, arranged, *sizes[:3], 128, out.stride(0), dim, z, grid=(1,))
    layout.arrange_grad.warmup(out, out, lse, arranged, grads, lse, *sizes, z, grid=(1,))
    for name, kernel, arguments, others in (
        ("forward", forward.forward, (arranged, out, lse), (1,)),
        ("backward_q", backward.backward_q, (arranged, grads, lse, out, dim), ()),
        ("backward_kv", backward.backward_kv, (arranged, grads, lse, out, out, dim), ()),
    ):
        grid, z, options, plan = schedule.settings(
            out.shape, out.dtype, lengths, name, [16, 64], [1, 16], causal, shards
        )
        kernel.warmup(*arguments, plan, *sizes, *others, launch.marked(z), grid=grid, **options)
        print(name, causal)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_on_a_machine_without_one(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=600,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        word
        for causal in ("False", "True")
        for name in ("forward", "backward_q", "backward_kv")
        for word in (name, causal)
    ]

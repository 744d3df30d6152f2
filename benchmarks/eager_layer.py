"""One LongNet layer called eagerly beside a layer of dense attention: milliseconds of a call by number of tokens.

    python benchmarks/eager_layer.py [--tokens 256 512 1024 2048 4096]

GigaPath's layer (width 768, 16 heads, feed-forward 3,072) in bfloat16, wall time of a call among many that follow one
another, so launches count where they take longer than the kernels. `dense` is the same layer of PyTorch's own modules:
LayerNorm, Linear, GELU, scaled_dot_product_attention. `attention` is dilated attention alone, of a projection to queries,
keys and values, `sdpa` dense attention of the same. `GPU` is what the kernels of our layer take.

Measured on one H100 (torch 2.11), forward / forward and backward, ours beside dense: 256 tokens 0.225 / 1.142 beside
0.238 / 1.164, 512: 0.271 / 1.266 beside 0.303 / 1.361, 1,024: 0.265 / 1.231 beside 0.297 / 1.343, 2,048: 0.266 / 1.223
beside 0.299 / 1.363, 4,096: 0.275 / 1.229 beside 0.350 / 1.357.
"""

import argparse
import time
from collections.abc import Callable

import torch
from longslide.models.slide_encoder.dilated_attention import dilated_self_attention
from longslide.models.slide_encoder.longnet import LongNetLayer
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

SEGMENT_LENGTHS = (1024, 5792, 32768, 185363, 1048576)
DILATED_RATIOS = (1, 2, 4, 8, 16)
WIDTH, HEADS, FFN_WIDTH = 768, 16, 3072


class DenseLayer(nn.Module):
    """A layer of the same norms and linear layers, with dense attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in (WIDTH, WIDTH, WIDTH, FFN_WIDTH))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.ffn_in = nn.Linear(WIDTH, FFN_WIDTH)
        self.ffn_out = nn.Linear(FFN_WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(T, width) of one sequence."""
        qkv = self.qkv(self.norms[0](x)).view(1, len(x), 3, HEADS, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        attended = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), WIDTH)
        x = x + self.out(self.norms[1](attended))
        output: Tensor = x + self.ffn_out(self.norms[3](gelu(self.ffn_in(self.norms[2](x)))))
        return output


def milliseconds(runs: list[Callable[[], object]], calls: int = 40, rounds: int = 15) -> list[float]:
    """Of each, the best mean of `rounds`, taken in turns: what else the machine does falls on all of them."""
    found = [float("inf")] * len(runs)
    for _ in range(rounds):
        for number, run in enumerate(runs):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(calls):
                run()
            torch.cuda.synchronize()
            found[number] = min(found[number], 1000 * (time.perf_counter() - started) / calls)
    return found


def gpu_milliseconds(run: Callable[[], object], calls: int = 10) -> float:
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    return float(sum(event.self_device_time_total for event in profiler.key_averages()) / 1000 / calls)


def pair(
    call: Callable[[Tensor], Tensor], x: Tensor, parameters: list[nn.Parameter]
) -> tuple[Callable[[], object], ...]:
    """The forward without gradients; forward and backward."""

    def forward() -> object:
        with torch.no_grad():
            return call(x)

    leaf = x.clone().requires_grad_()
    grad = torch.randn_like(call(leaf))

    def both() -> object:
        return torch.autograd.grad(call(leaf), [leaf, *parameters], grad)

    return forward, both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16, ms forward / forward + backward")
    ours = LongNetLayer(WIDTH, HEADS, FFN_WIDTH, SEGMENT_LENGTHS, DILATED_RATIOS).to("cuda", torch.bfloat16)
    dense = DenseLayer().to("cuda", torch.bfloat16)
    print(f"{'tokens':>7} {'longnet':>15} {'dense':>15} {'longnet GPU':>15} {'attention':>15} {'sdpa':>15}")
    for tokens in options.tokens:
        x = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
        qkv = torch.randn(tokens, 3, HEADS, WIDTH // HEADS, device="cuda", dtype=torch.bfloat16)
        cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")

        def layer(x: Tensor, cu_seqlens: Tensor = cu_seqlens) -> Tensor:
            return torch.add(*ours(x, cu_seqlens))

        def attention(qkv: Tensor, cu_seqlens: Tensor = cu_seqlens) -> Tensor:
            return dilated_self_attention(qkv, SEGMENT_LENGTHS, DILATED_RATIOS, cu_seqlens)

        def sdpa(qkv: Tensor) -> Tensor:
            q, k, v = qkv[None].transpose(1, 3).unbind(2)
            return scaled_dot_product_attention(q, k, v).transpose(1, 2)[0]

        own = pair(layer, x, list(ours.parameters()))
        others = (*pair(dense, x, list(dense.parameters())), *pair(attention, qkv, []), *pair(sdpa, qkv, []))
        times = milliseconds([*own, *others])
        times[4:4] = [gpu_milliseconds(run) for run in own]
        columns = zip(times[::2], times[1::2], strict=True)
        print(f"{tokens:7,} " + " ".join(f"{once:7.3f}/{twice:7.3f}" for once, twice in columns), flush=True)


if __name__ == "__main__":
    main()

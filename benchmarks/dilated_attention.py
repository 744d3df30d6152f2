"""Dilated attention by number of tokens, beside dense attention and two other implementations of the same, in one run.

    python benchmarks/dilated_attention.py [--tokens 1000 10000 70000 100000] [--plot dilated_attention.png]

GigaPath's configuration: 16 heads of 48, segments of 1,024 to 1,048,576 tokens, ratios 1 to 16. Random queries, keys and
values; medians of device time, launches left out (each call is a CUDA graph where it can be).

- `fused`: the Triton kernels, chosen on a GPU.
- `gather`: plain PyTorch around its flash kernel.
- `scatter`: as published: every branch padded, gathered, attended by the flash kernel, scattered back into dense tensors,
  then weighed by its log-sum-exp.
- `dense`: PyTorch's dense attention, by its fastest kernel (cuDNN's here).

TFLOP/s count the products that the pattern asks for (forward 4, backward 10 for each query, key and unit of the head
dimension), not those an implementation makes.

What was tried, on an H200 at 70,000 tokens, milliseconds of a layer forward / backward:
- All branches in one softmax, blocks of 64 tokens of one of 16 classes: 5.5 / 16.6.
- ptxas said that the matrix instructions waited for one another: the zero keys had scaled the accumulators inside the loops.
  Taken at the end instead: 4.5.
- Log-sum-exps and inner products added to the logits by the matrix units, as three bfloat16 each, rather than read for each
  thread: backward of the keys 9.1 -> 7.0.
- The token's own logit as reference of the softmax instead of a running maximum, sums by the matrix units: forward 4.0.
- Registers held to 128, so that four programs run on a multiprocessor: backward of the queries 5.4 -> 4.9.
- One division a branch instead of a dozen, classes with most keys first: 10,000 tokens forward 0.51 -> 0.32; none at 70,000.
- The profiler's counters: the L2 cache was busy for 94% of the time, with 55% of the bytes that it can give. It answers
  requests, and a key's 96 bytes, read as 32 and 16 columns at a stride, took 2.25. Laid out by head and class: backward of
  the keys 6.9 -> 6.0, though forward 3.5 -> 3.7.
- Rows of 64 columns, which hold ones and the log-sum-exps where the head has none, so that each product is one instead of
  two or three that wait for one another; then blocks of 128 queries pay in the forward: 3.3 / 3.9 + 5.0 to 5.4.
- Keys that several branches share scored once: a quarter less work at 1,000 tokens, a tenth at 70,000. Their number first
  took one more multiplication a logit, and long forwards lost by it; now its logarithm is the addend of the multiplication
  before the exponential, since the queries' left over columns hold the softmax's reference. Free, but the loops are shorter.
- The left factor in registers (Triton copies it there again in every step unless a product before the loop takes it too),
  and with it blocks of 64 queries again: forward 0.33 -> 0.28 at 10,000, 3.3 -> 3.1 at 70,000; backward of the keys
  5.56 -> 5.45. From 82,000 tokens on blocks of 128: 5.4 -> 5.0 at 100,000.
- Float32 by three TF32 products in place of exact ones: 81 / 337 -> 25 / 79 at 50,000, with errors of 1e-6.
- Not kept: the two kernels of the backward on two streams, sums of columns beside products. A training step of GigaPath on
  1,000 tokens 5.8 -> 5.6, on 70,000 244 -> 243, for streams that compiled graphs, threads and errors must all join.
- Tried without gain: keys laid out by head alone, blocks of 128 keys, two stages or four, eight warps; a quarter of the
  exponentials by polynomials (12% slower); the ragged end of a segment masked by its addend in the same loop (2 to 13%
  slower).
- Nor by exponentials beside the matrix units within a program (the product with the values left to the next step, in
  registers, two steps unrolled so that Triton does not overwrite them under way): forward 3.5 -> 3.55 at best in 18 block
  shapes, since registers and stages cost programs. Nor by half the reads (blocks of 128 queries in 128 or 168 registers):
  forward 3.6 to 4.2, backward of the queries 4.3 to 4.7 from 4.3.
What is left: the card's power. A forward begins with 3.13 ms at 1,965 MHz and is held at 700 W from then on, at 1,650 MHz:
3.60 ms; the backward goes from 9.06 to 9.70, the 8192-cubed matrix product from 775 to 677 TFLOP/s. Rows of 64 columns for
48 make a third more products than are asked for.
Below 2,048 tokens dense attention is faster: the kernels are then as long as their longest program, 16 blocks of keys one
after the other.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from longslide import dilated_attention
from longslide.models.slide_encoder.dilated_attention import dilated_self_attention
from longslide.models.slide_encoder.dilated_attention.attend import attend
from torch import Tensor

SEGMENT_LENGTHS = (1024, 5792, 32768, 185363, 1048576)
DILATED_RATIOS = (1, 2, 4, 8, 16)
HEADS, HEAD_DIM = 16, 48


def scatter_dilated_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As published: gather, attend, scatter into dense tensors, weigh. The weights carry no gradient there."""
    length, heads, dim = q.shape[1:]
    outputs, log_sums = [], []
    for segment_length, ratio in zip(SEGMENT_LENGTHS, DILATED_RATIOS, strict=True):
        width = min(segment_length, length)
        segments, slots = math.ceil(length / width), math.ceil(width / ratio)
        padded = segments * width
        position = torch.arange(segments, device=q.device)[:, None, None] * width
        position = position + torch.arange(slots, device=q.device)[:, None] * ratio
        position = (position + torch.arange(heads, device=q.device) // math.ceil(heads / ratio)).clamp(max=padded - 1)
        index = (position * heads + torch.arange(heads, device=q.device)).flatten()
        sparse = [
            torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padded - length))
            .reshape(-1, dim)[index]
            .view(segments, slots, heads, dim)
            for x in (q, k, v)
        ]
        sparse_q, sparse_k, sparse_v = (x.transpose(1, 2) for x in sparse)
        output, log_sum = attend(sparse_q, sparse_k, sparse_v, False, dim**-0.5)
        dense = q.new_zeros(padded * heads, dim).index_copy(0, index, output.transpose(1, 2).reshape(-1, dim))
        weight = torch.full((padded * heads,), -1e8, device=q.device).index_copy(
            0, index, log_sum.float().transpose(1, 2).flatten()
        )
        outputs.append(dense.view(padded, heads, dim)[:length])
        log_sums.append(weight.view(padded, heads)[:length])
    weights = torch.stack(log_sums).detach().softmax(0).to(q.dtype)
    return (torch.stack(outputs) * weights[..., None]).sum(0)[None]


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def flop(tokens: int) -> float:
    """Of the forward."""
    keys = sum(min(width, tokens) / ratio**2 for width, ratio in zip(SEGMENT_LENGTHS, DILATED_RATIOS, strict=True))
    return 4 * HEADS * HEAD_DIM * tokens * keys


def milliseconds(run: Callable[[], object], seconds: float = 0.1) -> float:
    """Median device time of a call: of a CUDA graph of it if it can be one."""
    run()
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    except RuntimeError:  # asks the host
        torch.cuda.synchronize()
    return float(triton.testing.do_bench(run, warmup=10, rep=1000 * seconds, return_mode="median"))


def ceilings() -> tuple[float, float]:
    """(TFLOP/s of a bf16 matrix product, TB/s of a copy) of this GPU."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9
    x = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return product, 2 * x.nbytes / milliseconds(lambda: y.copy_(x)) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 10_000, 70_000, 100_000])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--plot", type=Path, help="PNG file of time against tokens")
    options = parser.parse_args()

    product, copy = ceilings()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {options.dtype}")
    print(f"ceilings: matrix product {product:.0f} TFLOP/s, copy {copy:.2f} TB/s")
    print(
        f"{'tokens':>9} {'':>8} {'fwd ms':>8} {'TFLOP/s':>8} {'share':>6} {'fwd+bwd ms':>11} {'TFLOP/s':>8} {'GiB':>6}"
    )
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for tokens in options.tokens:
        qkv = torch.randn(1, tokens, 3, HEADS, HEAD_DIM, device="cuda", dtype=getattr(torch, options.dtype))
        grad = torch.randn(1, tokens, HEADS, HEAD_DIM, device="cuda", dtype=qkv.dtype)
        cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")

        def fused(qkv: Tensor, cu_seqlens: Tensor = cu_seqlens) -> Tensor:
            return dilated_self_attention(qkv[0], SEGMENT_LENGTHS, DILATED_RATIOS, cu_seqlens)[None]

        def gather(qkv: Tensor) -> Tensor:
            q, k, v = qkv.unbind(2)
            return dilated_attention(q, k, v, SEGMENT_LENGTHS, DILATED_RATIOS, backend="gather")

        implementations: dict[str, Callable[[Tensor], Tensor]] = {
            "fused": fused,
            "gather": gather,
            "scatter": lambda qkv: scatter_dilated_attention(*qkv.unbind(2)),
            "dense": lambda qkv: dense_attention(*qkv.unbind(2)),
        }
        for name, attention in implementations.items():
            forward_only = name == "scatter"  # its flash call here has no gradient of its own

            def forward(attention: Callable[..., Tensor] = attention, qkv: Tensor = qkv) -> None:
                with torch.no_grad():
                    attention(qkv)

            leaf = qkv.clone().requires_grad_()

            def both(attention: Callable[..., Tensor] = attention, leaf: Tensor = leaf, grad: Tensor = grad) -> None:
                torch.autograd.grad(attention(leaf), leaf, grad)

            once = milliseconds(forward)
            torch.cuda.reset_peak_memory_stats()
            twice = float("nan") if forward_only else milliseconds(both)
            memory = torch.cuda.max_memory_allocated() / 2**30
            work = 4 * HEADS * HEAD_DIM * tokens**2 if name == "dense" else flop(tokens)
            rate = work / once / 1e9
            print(
                f"{tokens:9,} {name:>8} {once:8.3f} {rate:8.1f} {rate / product:6.0%} {twice:11.3f} "
                f"{3.5 * work / twice / 1e9:8.1f} {memory:6.2f}",
                flush=True,
            )
            found.setdefault(name, {})[tokens] = (once, twice)
        ours = found["fused"][tokens]
        others = [(name, found[name][tokens]) for name in found if name != "fused"]
        ratios = ", ".join(f"{name} {other[0] / ours[0]:.2f}x / {other[1] / ours[1]:.2f}x" for name, other in others)
        print(f"{'':9} others over fused, forward / forward + backward: {ratios}", flush=True)
    if options.plot:
        draw(found, options.plot)


def draw(found: dict[str, dict[int, tuple[float, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for place, title in enumerate(("forward", "forward + backward")):
        axes = figure.add_subplot(1, 2, place + 1)
        for colour, (name, times) in enumerate(found.items()):  # of a name the same on both sides
            if not all(math.isnan(time[place]) for time in times.values()):
                axes.plot(list(times), [time[place] for time in times.values()], f"C{colour}o-", label=name)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds", title=title)
        axes.grid(which="major", alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()

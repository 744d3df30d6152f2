"""Dense attention that returns its log-sum-exp, and its backward: PyTorch's fused kernels where they take the tensors.

The kernels behind `scaled_dot_product_attention` return the log-sum-exp too, but only through `torch.ops.aten`. A kernel
that is not there, or refuses a dtype or head dimension, is replaced by plain tensor code in blocks.
"""

import torch
from torch import Tensor

_MAX_LOGITS = 2**25
"""Logits in memory at once in the plain code."""

_aten = torch.ops.aten


def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention.

    Args:
        q: `(B, H, M, D)`.
        k: `(B, H, N, D)`.
        v: `(B, H, N, D)`.
        is_causal: Whether key j is visible to query i only when j <= i; then M must be N.
        scale: Factor of the logits.

    Returns:
        `(B, H, M, D)` output and `(B, H, M)` log-sum-exp of the logits.
    """
    kernel = _kernel(q)
    if kernel == "cpu":
        output, log_sum = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
    elif kernel == "flash":
        output, log_sum = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[:2]
    elif kernel == "efficient":
        output, log_sum = _aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, is_causal, scale=scale
        )[:2]
        log_sum = log_sum[..., : q.shape[2]]  # padded to a multiple of 32
    else:
        output, log_sum = _plain(q, k, v, is_causal, scale)
    return output, log_sum


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, log_sum: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the keys' part in a softmax with this output and log-sum-exp, which may span more keys than `k`.

    Args:
        grad: `(B, H, M, D)` gradient of the output.
        q: `(B, H, M, D)`.
        k: `(B, H, N, D)`.
        v: `(B, H, N, D)`.
        output: `(B, H, M, D)` output of the whole softmax.
        log_sum: `(B, H, M)` log-sum-exp of the whole softmax.
        is_causal: As in the forward.
        scale: As in the forward.

    Returns:
        Gradients of `q` (these keys' share), `k` and `v`.
    """
    kernel = _kernel(q)
    if kernel == "cpu":
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, output, log_sum, 0.0, is_causal, scale=scale
        )
    elif kernel == "flash":
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of the dropout that is not used
        grads = _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, output, log_sum.float().contiguous(), None, None, q.shape[2], k.shape[2], 0.0, is_causal, seed,
            torch.zeros((), dtype=torch.uint64, device=q.device), scale=scale,
        )  # fmt: skip
    elif kernel == "efficient":
        padded = torch.nn.functional.pad(log_sum.float().contiguous(), (0, -q.shape[2] % 32), value=torch.inf)
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        grads = _aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, output, padded, seed, seed, 0.0, [True, True, True, False], is_causal, scale=scale
        )[:3]
    else:
        grads = _plain_backward(grad, q, k, v, output, log_sum, is_causal, scale)
    return grads[0], grads[1], grads[2]


def _kernel(q: Tensor) -> str:
    if q.device.type == "cpu" and hasattr(_aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return "cpu"
    half = q.dtype in (torch.float16, torch.bfloat16)
    if q.device.type == "cuda" and torch.version.cuda and q.shape[-1] % 8 == 0:
        ampere = torch.cuda.get_device_capability(q.device) >= (8, 0)  # older GPUs have neither flash nor bfloat16
        if half and ampere and q.shape[-1] <= 256 and hasattr(_aten, "_scaled_dot_product_flash_attention"):
            return "flash"
        takes = q.dtype in (torch.float32, torch.float16)
        if takes and hasattr(_aten, "_scaled_dot_product_efficient_attention"):
            return "efficient"
    return "plain"


def _blocks(q: Tensor, k: Tensor) -> list[slice]:
    batch, heads, slots = q.shape[:3]
    rows = max(1, _MAX_LOGITS // (batch * heads * k.shape[2]))
    return [slice(start, start + rows) for start in range(0, slots, rows)]


def _logits(q: Tensor, k: Tensor, rows: slice, is_causal: bool, scale: float) -> Tensor:
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits = (scale * q[:, :, rows] @ k.transpose(2, 3)).to(accumulate)
    if is_causal:
        query = torch.arange(q.shape[2], device=q.device)[rows, None]
        logits = logits.masked_fill(torch.arange(k.shape[2], device=q.device) > query, -torch.inf)
    return logits


def _plain(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    outputs, log_sums = [], []
    for rows in _blocks(q, k):
        logits = _logits(q, k, rows, is_causal, scale)
        outputs.append(logits.softmax(3).to(v.dtype) @ v)
        log_sums.append(logits.logsumexp(3))
    return torch.cat(outputs, 2), torch.cat(log_sums, 2)


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, log_sum: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = [], torch.zeros_like(k), torch.zeros_like(v)
    delta = (grad * output).sum(3, keepdim=True)
    for rows in _blocks(q, k):
        share = (_logits(q, k, rows, is_causal, scale) - log_sum[:, :, rows, None]).exp().to(q.dtype)
        grad_v += share.transpose(2, 3) @ grad[:, :, rows]
        grad_logits = scale * share * (grad[:, :, rows] @ v.transpose(2, 3) - delta[:, :, rows])
        grad_q.append(grad_logits @ k)
        grad_k += grad_logits.transpose(2, 3) @ q[:, :, rows]
    return torch.cat(grad_q, 2), grad_k, grad_v

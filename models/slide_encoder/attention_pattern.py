"""Which keys a query sees: dilated attention, and the patterns it is compared with, behind one function."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any, cast, get_args

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...bag_lengths import lengths_of
from ...errors import LongslideError
from .dilated_attention import dilated_attention, has_kernels
from .gathered_attention import as_rows
from .learned_attention import learned_attention
from .random_attention import random_attention
from .spec import PATTERN_SETTINGS
from .spec import Pattern as Pattern
from .window_attention import window_attention

PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
_BLOCK = 128
"""Queries and keys of a block of FlexAttention."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = "dilated",
    is_causal: bool = False,
    *,
    segment_lengths: Sequence[int] = (),
    dilated_ratios: Sequence[int] = (),
    window: int = 0,
    period: int = 0,
    random_keys: int = 0,
    global_tokens: int = 0,
    pattern_seed: int = 0,
    block_size: int = 0,
    chosen_blocks: int = 0,
    gate: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of tokens to the keys that a pattern lets them see.

    - `dilated`: LongNet's, as `dilated_attention`; linear in the tokens.
    - `dense`: every key; quadratic.
    - `sliding-window`: keys at most `window` tokens away (https://arxiv.org/abs/2004.05150); linear.
    - `strided`: keys a multiple of `period` tokens away (https://arxiv.org/abs/1904.10509); quadratic, divided by `period`.
      Tokens of different remainders never meet, however many layers there are.
    - `random`: `random_keys` keys anywhere, others for each query and head, besides the token itself; with a `window` and
      `global_tokens` it is BigBird's (https://arxiv.org/abs/2007.14062); linear.
    - `learned`: tokens are cut into blocks of `block_size`; each block sees itself and the `chosen_blocks` whose mean key
      fits its mean query best, as VSA (https://arxiv.org/abs/2505.13389) and native sparse attention
      (https://arxiv.org/abs/2502.11089) choose them; `choose_blocks` says which. With a `gate` the output also has what
      the blocks' means say: only so does training learn the choice. Linear, but for one score for each pair of blocks.

    Args:
        q: `(B, L, H, D)` queries: batch, tokens, heads, head dimension; any floating dtype. With `cu_seqlens`
            `(T, H, D)`: sequences of any lengths end to end.
        k: Keys, shaped like `q`.
        v: Values, shaped like `q`.
        pattern: The pattern.
        is_causal: Whether later keys are hidden.
        segment_lengths: Tokens of a segment, for each branch of `dilated`.
        dilated_ratios: Every how many-th token takes part, for each branch of `dilated`.
        window: Tokens seen on either side, for `sliding-window`, and if wanted for `random`.
        period: Distance of the keys from one another, for `strided`.
        random_keys: Random keys of each query, for `random`; of a shorter sequence all.
        global_tokens: First tokens of each sequence that see all and that all see, for `random`.
        pattern_seed: Which random keys, for `random`.
        block_size: Tokens of a block, for `learned`.
        chosen_blocks: Blocks seen besides the own, for `learned`.
        gate: `(B, L, H)`, packed `(T, H)`: factor of what the means of all blocks say, for `learned`.
        cu_seqlens: `(B + 1,)` where each packed sequence begins, and T.
        scale: Factor of the logits; `D ** -0.5` by default.

    Returns:
        The shape and dtype of `q`.

    Raises:
        LongslideError: No such pattern, or one of its settings is missing or another pattern's.
        ValueError: Shapes do not fit.
    """
    settings = {
        "window": window,
        "period": period,
        "random_keys": random_keys,
        "global_tokens": global_tokens,
        "pattern_seed": pattern_seed,
        "block_size": block_size,
        "chosen_blocks": chosen_blocks,
    }
    check_pattern(pattern, **settings)
    if pattern == "dilated":
        return dilated_attention(
            q, k, v, segment_lengths, dilated_ratios, is_causal, cu_seqlens=cu_seqlens, scale=scale
        )
    if q.ndim != (4 if cu_seqlens is None else 3) or q.shape != k.shape or q.shape != v.shape or 0 in q.shape:
        raise ValueError(
            f"q, k and v must be {'(B, L, H, D)' if cu_seqlens is None else '(T, H, D)'} alike, not {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )
    if gate is not None and (pattern != "learned" or gate.shape != q.shape[:-1]):
        raise ValueError(f"gate is for the pattern learned, and {tuple(q.shape[:-1])}, not {tuple(gate.shape)}")
    if cu_seqlens is None:
        return _attend(q, k, v, pattern, is_causal, settings, gate, (q.shape[1],), scale)
    lengths = tuple(lengths_of(cu_seqlens))
    # Sequences of one length are a batch, computed at once; of others a batch of one, of each in turn.
    batch, lengths = (len(lengths), lengths[:1]) if len(set(lengths)) == 1 else (1, lengths)
    q, k, v = (x.view(batch, -1, *x.shape[1:]) for x in (q, k, v))
    gate = None if gate is None else gate.view(batch, -1, gate.shape[1])
    return _attend(q, k, v, pattern, is_causal, settings, gate, lengths, scale).flatten(0, 1)


def check_pattern(pattern: str, **settings: int) -> None:
    """Refuse a pattern that is none, or a setting that is missing or another pattern's.

    Args:
        pattern: The pattern.
        **settings: Some of `PATTERN_SETTINGS`; 0 for those that it has not.

    Raises:
        LongslideError: It does not fit; the message says what to set.
    """
    if pattern not in PATTERNS:
        raise LongslideError(f"attention pattern {pattern!r} is none of {', '.join(PATTERNS)}")
    for name, least in PATTERN_SETTINGS.items():
        value, words = settings.get(name, 0), name.replace("_", " ")
        if pattern not in least:
            if value:
                owners = " or ".join(map(repr, least))
                raise LongslideError(
                    f"{words} {value} is for attention pattern {owners}, not {pattern!r}: leave it at 0"
                )
        elif value < least[pattern]:
            article = "" if name.endswith("s") else "a "
            raise LongslideError(
                f"attention pattern {pattern!r} needs {article}{words} of at least {least[pattern]}, not {value}"
            )


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    is_causal: bool,
    settings: Mapping[str, int],
    gate: Tensor | None,
    lengths: tuple[int, ...],
    scale: float | None,
) -> Tensor:
    """(B, T, H, D) of sequences of these lengths end to end -> (B, T, H, D)."""
    if pattern == "sliding-window" and _takes_flex(q):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        block_mask = window_block_mask(lengths, settings["window"], is_causal, q.device)
        output: Tensor = _compiled_flex_attention()(q, k, v, block_mask=block_mask, scale=scale)
        return output.transpose(1, 2)
    outputs = []
    for end, length in zip(accumulate(lengths), lengths, strict=True):
        here = slice(end - length, end)
        one_q, one_k, one_v = (x[:, here] for x in (q, k, v))
        if pattern == "dense":
            outputs.append(_dense(one_q, one_k, one_v, is_causal, scale))
        elif pattern == "strided":
            outputs.append(_strided(one_q, one_k, one_v, is_causal, settings["period"], scale))
        else:
            one_gate = None if gate is None else gate[:, here]
            outputs.append(_by_rows(one_q, one_k, one_v, pattern, is_causal, settings, one_gate, scale))
    return torch.cat(outputs, dim=1)


def _dense(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale).transpose(1, 2)


def _strided(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, period: int, scale: float | None) -> Tensor:
    """Tokens of one remainder are a sequence of their own: dense attention on a batch of them."""
    batch, length = q.shape[:2]
    rounds, longer = divmod(length, period)  # the first remainders have a token more than the others
    order, outputs = [], []
    for first, classes, slots in ((0, longer, rounds + 1), (longer, period - longer, rounds)):
        if classes and slots:
            index = first + torch.arange(classes)[:, None] + period * torch.arange(slots)
            order.append(index.flatten().to(q.device))
            some_q, some_k, some_v = (x[:, order[-1]].view(batch * classes, slots, *x.shape[2:]) for x in (q, k, v))
            outputs.append(_dense(some_q, some_k, some_v, is_causal, scale).reshape(batch, -1, *q.shape[2:]))
    return torch.cat(outputs, dim=1)[:, torch.cat(order).argsort()]


def _by_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    is_causal: bool,
    settings: Mapping[str, int],
    gate: Tensor | None,
    scale: float | None,
) -> Tensor:
    """The patterns whose keys are gathered, for each sequence and head by itself."""
    batch, _, heads, dim = q.shape
    row_q, row_k, row_v = (as_rows(x) for x in (q, k, v))
    scale = dim**-0.5 if scale is None else scale
    window = settings["window"]
    if pattern == "random":
        which = (settings["random_keys"], window, settings["global_tokens"], settings["pattern_seed"])
        output = random_attention(row_q, row_k, row_v, heads, is_causal, *which, scale)
    elif pattern == "learned":
        row_gate = None if gate is None else as_rows(gate[..., None])
        blocks = (settings["block_size"], settings["chosen_blocks"])
        output = learned_attention(row_q, row_k, row_v, is_causal, *blocks, row_gate, scale)
    else:
        output, _ = window_attention(row_q, row_k, row_v, is_causal, window, scale)
    return output.to(q.dtype).view(batch, heads, *output.shape[1:]).transpose(1, 2)


def _takes_flex(q: Tensor) -> bool:
    """FlexAttention's kernels need Triton, and know no float64 and no head dimension below 16."""
    return has_kernels(q) and q.dtype != torch.float64 and q.shape[-1] >= 16


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return cast(Callable[..., Tensor], torch.compile(flex_attention, dynamic=True))


@lru_cache(maxsize=16)  # every layer asks for the same one
@torch.inference_mode(False)  # else one made under inference mode could not serve a later backward
def window_block_mask(lengths: tuple[int, ...], window: int, is_causal: bool, device: torch.device) -> Any:
    """FlexAttention's mask of a sliding window over sequences end to end.

    The blocks come by arithmetic: no table of all queries and keys, which would be quadratic, is looked through.

    Args:
        lengths: Tokens of each sequence.
        window: Tokens seen on either side.
        is_causal: Whether later keys are hidden.
        device: The device of the queries.

    Returns:
        A `BlockMask`.
    """
    from torch.nn.attention.flex_attention import BlockMask

    sequence = torch.repeat_interleave(torch.tensor(lengths)).to(device)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (query - key <= window) & (key - query <= (0 if is_causal else window))
        return near & (sequence[query] == sequence[key])

    total = sum(lengths)
    blocks = -(-total // _BLOCK)
    block = torch.arange(blocks, dtype=torch.int32, device=device)
    first = (block * _BLOCK - window).clamp(min=0) // _BLOCK
    last = block if is_causal else ((block * _BLOCK + _BLOCK - 1 + window) // _BLOCK).clamp(max=blocks - 1)
    indices = (first[:, None] + block).clamp(max=blocks - 1)  # those after the number of blocks are not read
    return BlockMask.from_kv_blocks(
        (last - first + 1)[None, None],
        indices[None, None].contiguous(),
        BLOCK_SIZE=_BLOCK,
        mask_mod=seen,
        seq_lengths=(total, total),
    )

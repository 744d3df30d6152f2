"""Learned sparsity: the blocks chosen, the output against a dense masked reference, and that training moves the choice."""

from pathlib import Path

import pytest
import torch
from longslide import LongslideError, create_slide_encoder
from longslide.models.slide_encoder.attention_pattern import attention
from longslide.models.slide_encoder.checkpoint import to_published
from longslide.models.slide_encoder.learned_attention import choose_blocks
from torch import Tensor, nn


def reference(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, block_size: int, chosen_blocks: int, gate: Tensor | None
) -> Tensor:
    """Block by block and head by head, with dense masks."""
    batch, length, heads, dim = q.shape
    blocks = [slice(start, min(start + block_size, length)) for start in range(0, length, block_size)]
    output = torch.zeros_like(v)
    for b in range(batch):
        for h in range(heads):
            one_q, one_k, one_v = q[b, :, h], k[b, :, h], v[b, :, h]
            asks = torch.stack([one_q[block.start] if causal else one_q[block].mean(0) for block in blocks])
            keys, values = (torch.stack([x[block].mean(0) for block in blocks]) for x in (one_k, one_v))
            for number, block in enumerate(blocks):
                others = [n for n in range(len(blocks)) if n != number and not (causal and n > number)]
                scores = {n: (asks[number] @ keys[n]).item() for n in others}
                chosen = [number, *sorted(others, key=lambda n: -scores[n])[:chosen_blocks]]
                seen = torch.zeros(block.stop - block.start, length, dtype=torch.bool)
                for n in chosen:
                    seen[:, blocks[n]] = True
                if causal:
                    seen &= torch.arange(block.start, block.stop)[:, None] >= torch.arange(length)
                weights = (one_q[block] @ one_k.T / dim**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
                found = weights @ one_v
                visible = list(range(number)) if causal else list(range(len(blocks)))
                if gate is not None and visible:
                    coarse = (asks[number] @ keys[visible].T / dim**0.5).softmax(-1) @ values[visible]
                    found = found + gate[b, block, h, None] * coarse
                output[b, block, h] = found
    return output


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 5, 90])
@pytest.mark.parametrize(("block_size", "chosen_blocks"), [(1, 1), (4, 3), (16, 2), (7, 50), (200, 1)])
def test_learned_attention_and_its_gradients_are_those_of_a_dense_masked_softmax(
    block_size: int, chosen_blocks: int, length: int, causal: bool, gated: bool
) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, length, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    gate = torch.rand(2, length, 3, dtype=torch.float64, requires_grad=True) if gated else None
    output = attention(*inputs, "learned", causal, block_size=block_size, chosen_blocks=chosen_blocks, gate=gate)
    expected = reference(*inputs, causal, block_size, chosen_blocks, gate)
    torch.testing.assert_close(output, expected)
    direction = torch.randn_like(output)
    leaves = inputs if gate is None else [*inputs, gate]
    for actual, wanted in zip(
        torch.autograd.grad(output, leaves, direction, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(expected, leaves, direction, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)


def test_where_each_block_is_among_its_own_best_it_is_video_sparse_attention() -> None:
    """VSA sees the best of all blocks, of which the own may be none: here it always is."""
    torch.manual_seed(0)
    size, blocks, best = 16, 12, 4
    theme = 3 * torch.randn(2, blocks, 3, 8, dtype=torch.float64).repeat_interleave(size, 1)
    k, v = theme + torch.randn_like(theme), torch.randn_like(theme)
    leaves = [(k + torch.randn_like(k)).requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    gate = torch.rand(2, blocks * size, 3, dtype=torch.float64, requires_grad=True)
    means = [x.transpose(1, 2).unflatten(2, (blocks, size)).mean(3) for x in leaves]
    scores = means[0] @ means[1].mT / 8**0.5
    seen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(best).indices, True)
    assert seen.diagonal(dim1=-2, dim2=-1).all()
    logits = torch.einsum("bihd,bjhd->bhij", leaves[0], leaves[1]) / 8**0.5
    of_tokens = seen.repeat_interleave(size, -1).repeat_interleave(size, -2)
    fine = logits.masked_fill(~of_tokens, -torch.inf).softmax(-1) @ v.transpose(1, 2)
    coarse = (scores.softmax(-1) @ means[2]).repeat_interleave(size, 2)
    expected = fine.transpose(1, 2) + gate[..., None] * coarse.transpose(1, 2)
    found = attention(*leaves, "learned", block_size=size, chosen_blocks=best - 1, gate=gate)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(found)
    for one, other in zip(
        *(torch.autograd.grad(output, [*leaves, gate], direction) for output in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_packed_sequences_with_gates_give_what_they_give_one_at_a_time() -> None:
    lengths = [40, 1, 150, 9]
    q, k, v = (torch.randn(200, 3, 4, dtype=torch.float64) for _ in range(3))
    gate = torch.rand(200, 3, dtype=torch.float64)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    settings = {"block_size": 8, "chosen_blocks": 2}
    output = attention(q, k, v, "learned", gate=gate, cu_seqlens=bounds, **settings)
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        alone = attention(*(x[None, start:stop] for x in (q, k, v)), "learned", gate=gate[None, start:stop], **settings)
        torch.testing.assert_close(output[start:stop], alone[0])


def test_a_causal_query_knows_nothing_of_later_tokens_not_even_by_the_choice() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 100, 2, 4, dtype=torch.float64) for _ in range(3)]
    gate = torch.rand(1, 100, 2, dtype=torch.float64)
    settings = {"block_size": 8, "chosen_blocks": 3, "gate": gate}
    before = attention(*inputs, "learned", True, **settings)
    for changed in range(1, 100, 7):
        others = [torch.cat([x[:, :changed], torch.randn_like(x[:, changed:])], 1) for x in inputs]
        after = attention(*others, "learned", True, **settings)
        torch.testing.assert_close(after[:, :changed], before[:, :changed])


def test_it_says_which_blocks_it_chose() -> None:
    q, k = torch.zeros(1, 40, 1, 2), torch.zeros(1, 40, 1, 2)
    q[0, 0:10, 0, 0] = k[0, 20:30, 0, 0] = 1  # the first block asks for what the third has
    chosen, is_one = choose_blocks(q, k, block_size=10, chosen_blocks=1)
    assert chosen.shape == (1, 1, 4, 1)
    assert chosen[0, 0, 0, 0] == 2
    assert is_one.all()
    assert (chosen[0, 0, :, 0] != torch.arange(4)).all(), "its own block it sees anyway"
    _, is_one = choose_blocks(q, k, block_size=10, chosen_blocks=2, is_causal=True)
    assert is_one[0, 0].sum(-1).tolist() == [0, 1, 2, 2]


class Finder(nn.Module):
    """One layer, whose tokens are to report the value of the marked token of their sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 3 * 8, bias=True)
        self.gate = nn.Linear(8, 1)
        self.out = nn.Linear(8, 1)

    def heads(self, x: Tensor) -> list[Tensor]:
        return [part[:, :, None] for part in self.qkv(x).chunk(3, -1)]

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x).sigmoid()
        attended = attention(*self.heads(x), "learned", block_size=8, chosen_blocks=1, gate=gate)
        return self.out(attended[:, :, 0])[..., 0]


@pytest.mark.slow
def test_training_moves_the_choice_to_the_block_that_matters() -> None:
    torch.manual_seed(0)
    model = Finder()

    def batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
        x = 0.3 * torch.randn(size, 64, 8)
        place, value = torch.randint(64, (size,)), torch.randn(size)
        x[torch.arange(size), place, 0] = 3
        x[torch.arange(size), place, 1] = value
        return x, place // 8, value

    def share_found() -> float:
        x, block, _ = batch(200)
        with torch.no_grad():
            q, k, _ = model.heads(x)
        chosen, _ = choose_blocks(q, k, 8, 1)
        others = torch.arange(8) != block[:, None]  # the block itself need not choose itself
        return float((chosen[:, 0, :, 0] == block[:, None])[others].float().mean())

    untrained = share_found()
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(500):
        x, _, value = batch(32)
        optimiser.zero_grad()
        ((model(x) - value[:, None]) ** 2).mean().backward()
        optimiser.step()
    assert untrained < 0.5
    assert share_found() > 0.9


def test_training_and_inference_choose_and_answer_alike() -> None:
    small = {"layers": 2, "width": 64, "ffn_width": 64, "tile_dim": 8, "checkpoint": "random"}
    encoder = create_slide_encoder("gigapath", pattern="learned", block_size=4, chosen_blocks=2, dropout=0.0, **small)
    tiles, cells = torch.randn(1, 60, 8), torch.stack([torch.arange(60), torch.zeros(60, dtype=torch.long)], 1)[None]
    trained = encoder.train()(tiles, cells)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.eval()(tiles, cells), trained, rtol=0, atol=0)


def test_published_weights_which_have_no_gates_are_refused_for_it(tmp_path: Path) -> None:
    settings = {"layers": 1, "width": 64, "ffn_width": 64, "tile_dim": 8}
    torch.save(
        {"model": to_published(create_slide_encoder("gigapath", checkpoint="random", **settings))}, tmp_path / "a.pth"
    )
    lacks = "'learned', whose gates published weights lack: train it from scratch"
    for checkpoint, words in (
        (None, lacks),
        (tmp_path / "a.pth", f"{lacks}; missing: encoder.layers.0.self_attn.gate"),
    ):
        with pytest.raises(LongslideError, match=words):
            create_slide_encoder(
                "gigapath", checkpoint=checkpoint, pattern="learned", block_size=64, chosen_blocks=4, **settings
            )


def test_a_gate_for_another_pattern_or_of_another_shape_is_refused() -> None:
    q = torch.randn(1, 10, 2, 4)
    with pytest.raises(ValueError, match="gate is for the pattern learned"):
        attention(q, q, q, "dense", gate=torch.ones(1, 10, 2))
    with pytest.raises(ValueError, match=r"\(1, 10, 2\), not \(1, 10\)"):
        attention(q, q, q, "learned", block_size=4, chosen_blocks=1, gate=torch.ones(1, 10))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_is_near_the_cpu_and_repeats_its_gradients_to_the_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    exact = [torch.randn(1, 3000, 4, 32).to(dtype).double().requires_grad_() for _ in range(3)]
    inputs = [x.detach().to("cuda", dtype).requires_grad_() for x in exact]
    gate = torch.full((1, 3000, 4), 0.5)
    settings = {"block_size": 1, "chosen_blocks": 2999}  # all blocks: near ties would choose others
    wanted = attention(*exact, "learned", gate=gate.double(), **settings)
    found = attention(*inputs, "learned", gate=gate.to("cuda", dtype), **settings)
    bound = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    assert (found.cpu().double() - wanted).norm() < bound * wanted.norm()
    few = {"block_size": 32, "chosen_blocks": 4}
    gradients = [
        torch.autograd.grad(attention(*inputs, "learned", gate=gate.to("cuda", dtype), **few).sin().sum(), inputs)
        for _ in range(2)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))

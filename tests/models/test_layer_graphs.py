"""Short sequences as CUDA graphs give what they give without."""

import copy
from functools import partial
from unittest import mock

import pytest
import torch
from longslide import create_slide_encoder
from longslide.models.layer_graphs import bucket
from longslide.models.slide_encoder import SlideEncoder


def test_lengths_are_run_as_few_lengths_a_little_longer() -> None:
    assert all(n <= bucket(n) <= max(n + 31, 1.125 * n) for n in range(1, 20_000))
    assert len({bucket(n) for n in range(256, 16_385)}) <= 60


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")


def slide(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(1, tokens, 1536, device="cuda", generator=torch.Generator("cuda").manual_seed(tokens))
    index = torch.arange(tokens, device="cuda")
    return x, torch.stack([index % 50, index // 50], -1)[None]


def without_graphs(encoder: SlideEncoder, x: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    with mock.patch.object(encoder, "_takes_graphs", return_value=False):
        return encoder(x, cells)


@needs_gpu
def test_graphs_give_what_the_layers_give_and_follow_their_weights() -> None:
    encoder = create_slide_encoder("gigapath", checkpoint="random", layers=2).cuda()
    for tokens in (1, 300, 290, 1000):
        x, cells = slide(tokens)
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                replayed = encoder(x, cells).clone()
                torch.testing.assert_close(replayed, without_graphs(encoder, x, cells), rtol=1e-3, atol=1e-4)
    with torch.inference_mode():
        before = encoder(x, cells)
        other = copy.deepcopy(encoder)
        other.load_state_dict({name: 1.1 * value for name, value in encoder.state_dict().items()})
        assert not torch.equal(other(x, cells), before)
        assert torch.equal(encoder(x, cells), before)


@needs_gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_from_graphs_add_up_as_those_of_the_layers(autocast: bool) -> None:
    encoder = create_slide_encoder("gigapath", checkpoint="random", layers=2).cuda()
    encoder.layers[0].ffn_out.requires_grad_(False)
    found = []
    for run in (encoder, partial(without_graphs, encoder)):
        encoder.zero_grad()
        for tokens in (300, 1000, 290, 300):  # accumulated
            x, cells = slide(tokens)
            x.requires_grad_()
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                run(x, cells).square().sum().backward()
        found.append(
            {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None} | {"x": x.grad}
        )
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        wanted = found[1][name]
        assert (grad - wanted).norm() <= (2e-2 if autocast else 1e-4) * wanted.norm() + 1e-6, name


@needs_gpu
def test_a_second_slide_before_the_backward_of_the_first_leaves_that_one_right() -> None:
    encoder = create_slide_encoder("gigapath", checkpoint="random", layers=1).cuda()
    wanted = [
        torch.autograd.grad(encoder(*slide(n)).square().sum(), encoder.layers[0].qkv.weight)[0] for n in (300, 400)
    ]
    outputs = [encoder(*slide(n)) for n in (300, 400)]
    with torch.no_grad():
        encoder(*slide(350))
    for output, grad in zip(outputs, wanted, strict=True):
        (found,) = torch.autograd.grad(output.square().sum(), encoder.layers[0].qkv.weight)
        assert (found - grad).norm() <= 1e-5 * grad.norm()


@needs_gpu
def test_one_forward_has_as_many_gradients_as_are_asked_for() -> None:
    """As explanations ask for: one for each class."""
    encoder = create_slide_encoder("gigapath", checkpoint="random", layers=2).cuda().requires_grad_(False)
    x, cells = slide(300)
    x.requires_grad_()
    for column in (0, 5):
        replayed, plain = encoder(x, cells), without_graphs(encoder, x, cells)
        for output in (replayed, plain):
            torch.autograd.grad(output[0, 1], x, retain_graph=True)
        found, wanted = (torch.autograd.grad(output[0, column], x)[0] for output in (replayed, plain))
        assert (found - wanted).norm() <= 1e-4 * wanted.norm()


@needs_gpu
def test_dropped_paths_differ_from_replay_to_replay() -> None:
    encoder = create_slide_encoder("gigapath", checkpoint="random", layers=2, drop_path=0.5).cuda().train()
    x, cells = slide(300)
    assert len({round(encoder(x, cells)[0, 0].item(), 4) for _ in range(16)}) > 2

"""Short sequences as CUDA graphs give what they give without."""

import copy

import pytest
import torch
from longslide import create_slide_encoder
from longslide.models.layer_graphs import bucket


def test_lengths_are_run_as_few_lengths_a_little_longer() -> None:
    assert all(n <= bucket(n) <= max(n + 31, 1.125 * n) for n in range(1, 20_000))
    assert len({bucket(n) for n in range(256, 16_385)}) <= 60


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
def test_graphs_give_what_the_layers_give_and_follow_their_weights() -> None:
    encoder = create_slide_encoder("gigapath", checkpoint="random", layers=2).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    for tokens in (1, 300, 290, 1000):
        x = torch.randn(1, tokens, 1536, device="cuda", generator=generator)
        index = torch.arange(tokens, device="cuda")
        cells = torch.stack([index % 50, index // 50], -1)[None]
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                replayed = encoder(x, cells).clone()
            torch.testing.assert_close(replayed, encoder(x, cells), rtol=1e-3, atol=1e-4)
    with torch.inference_mode():
        before = encoder(x, cells)
        other = copy.deepcopy(encoder)
        other.load_state_dict({name: 1.1 * value for name, value in encoder.state_dict().items()})
        assert not torch.equal(other(x, cells), before)
        assert torch.equal(encoder(x, cells), before)

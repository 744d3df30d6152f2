"""LongNet as a plain module."""

import longslide
import torch
from torch.nn.functional import gelu, scaled_dot_product_attention


def test_with_one_dense_branch_it_is_a_transformer_with_norms_within() -> None:
    torch.manual_seed(0)
    model = longslide.LongNet(16, layers=2, heads=4, segment_lengths=[64], dilated_ratios=[1]).double().eval()
    x = torch.randn(3, 20, 16, dtype=torch.float64)
    y = x
    for layer in model.layers:
        q, k, v = layer.qkv(layer.attention_norm(y)).view(3, 20, 3, 4, 4).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = y + layer.attention_out(layer.attention_inner_norm(attended))
        y = y + layer.ffn_out(layer.ffn_inner_norm(gelu(layer.ffn_in(layer.ffn_norm(y)))))
    torch.testing.assert_close(model(x), model.norm(y))


def test_sequences_of_a_batch_do_not_see_one_another_and_gradients_reach_the_tokens() -> None:
    torch.manual_seed(0)
    model = longslide.LongNet(16, layers=1, heads=4, segment_lengths=[8, 32], dilated_ratios=[1, 2])
    x = torch.randn(2, 33, 16, requires_grad=True)
    out = model(x)
    assert out.shape == x.shape
    torch.testing.assert_close(out[1:], model(x[1:]))
    out[0].square().sum().backward()
    assert x.grad is not None
    assert x.grad[0].abs().sum() > 0
    assert x.grad[1].abs().sum() == 0

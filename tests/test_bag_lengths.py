"""The lengths of bags come along with them, so that the host need not ask the GPU."""

import torch
from longslide.bag_lengths import lengths_of, with_lengths


def test_lengths_are_those_said_and_else_those_of_the_tensor() -> None:
    cu_seqlens = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    assert lengths_of(cu_seqlens) == [3, 1, 5]
    assert lengths_of(with_lengths(cu_seqlens, [3, 1, 5])) == [3, 1, 5]


def test_nothing_asks_a_tensor_whose_lengths_are_said() -> None:
    """One on a device without values would say so."""
    assert lengths_of(with_lengths(torch.empty(3, device="meta"), [2, 2])) == [2, 2]

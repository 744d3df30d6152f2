"""What is on the host is looked at at once; what is on a GPU when it has arrived."""

import copy

import pytest
import torch
from longslide.models.later import Later

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: events")


def test_what_is_on_the_host_is_looked_at_at_once() -> None:
    seen: list[float] = []
    Later().put(torch.tensor(3.0, requires_grad=True), lambda value: seen.append(value.item()))
    assert seen == [3.0]


@needs_gpu
def test_what_is_on_a_gpu_is_looked_at_in_order_and_as_it_was() -> None:
    later, seen = Later(), []
    value = torch.zeros((), device="cuda")
    torch.cuda._sleep(100_000_000)
    for _ in range(3):
        later.put(value, lambda value: seen.append(value.item()))
        value += 1
    assert seen == []
    copy.deepcopy(later).look(wait=True)
    assert seen == []
    later.look(wait=True)
    assert seen == [0, 1, 2]

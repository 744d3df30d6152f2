"""What a GPU says, looked at when it has arrived: a step of training need not wait for it."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Later:
    """Looks at small tensors: at those of a GPU when they have arrived, at others at once.

    A copy has nothing to look at.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[Tensor, torch.cuda.Event, Callable[[Tensor], None]]] = deque()

    def __reduce__(self) -> tuple[Any, ...]:
        return Later, ()

    def put(self, value: Tensor, look: Callable[[Tensor], None]) -> None:
        """Call `look` with the value on the host, as soon as it is there and somebody asks.

        Args:
            value: A tensor of the current stream; it may be overwritten afterwards.
            look: May raise, then from here or from `look`.
        """
        self.look()
        if not value.is_cuda:
            look(value.detach())
            return
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        host.copy_(value.detach(), non_blocking=True)
        self._pending.append((host, torch.cuda.current_stream(value.device).record_event(), look))

    def look(self, *, wait: bool = False) -> None:
        """Look at what has arrived.

        Args:
            wait: Wait for the rest too.
        """
        while self._pending and (wait or self._pending[0][1].query()):  # type: ignore[no-untyped-call]
            host, arrived, look = self._pending.popleft()
            arrived.synchronize()
            look(host)

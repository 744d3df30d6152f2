"""Which bags form a batch: sequences of different lengths under a budget of tokens."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from .bags import BagDataset, BagKey

T = TypeVar("T")

_TRIES = 8


class TokenBudgetBatchSampler(DistributedSampler[list[BagKey]]):
    """Packs bags into batches of at most `max_tokens` tiles; a bag with more goes alone.

    Shuffled, it visits every bag once an epoch (or draws them balanced by class), in an order that is a function of seed and
    epoch only; the number of batches is the same in every epoch, as schedules of the learning rate need it. In order, it
    is for evaluation. Ranks get different batches: the same number of them when shuffled (for which the last few bags of an
    epoch may come twice, where each is a batch of its own).

    It is a `DistributedSampler`, so that Lightning neither replaces it nor shards it a second time.

    Args:
        lengths: `(bags,)` tiles of each bag.
        max_tokens: Budget of a batch; None for no limit.
        max_bags: Bags in a batch at most; None for no limit.
        shuffle: For training.
        stratum: `(bags,)` class of each bag, to draw each class as often as any; with that, a bag may come several times
            in an epoch or not at all.
        num_replicas: Ranks.
        rank: This rank.
        seed: Of the order.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        max_tokens: int | None = None,
        max_bags: int | None = None,
        shuffle: bool = False,
        stratum: np.ndarray | None = None,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(lengths, num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]
        self.lengths = np.asarray(lengths, np.int64)
        self.max_tokens = max_tokens if max_tokens is not None else np.iinfo(np.int64).max
        self.max_bags = max_bags if max_bags is not None else len(self.lengths)
        self.stratum = stratum
        self.start = 0
        self._in_order = [] if shuffle else self._evaluation()
        self._count = self._training_count() if shuffle else len(self._in_order)
        self._packed: tuple[int, list[list[BagKey]]] | None = None

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        if self.shuffle:
            return self._count // self.num_replicas
        return len(range(self.rank, self._count, self.num_replicas))

    def __iter__(self) -> Iterator[list[BagKey]]:
        """The batches of this rank, from batch `start` on."""
        batches = self.batches(self.epoch)[self.rank :: self.num_replicas]
        yield from batches[self.start :]

    def batches(self, epoch: int) -> list[list[BagKey]]:
        """The batches of all ranks: batch i is that of rank i modulo the number of ranks."""
        if not self.shuffle:
            return self._in_order
        if self._packed is None or self._packed[0] != epoch:
            self._packed = (epoch, self._training(epoch))
        return self._packed[1]

    def _evaluation(self) -> list[list[BagKey]]:
        """All bags in order. A rank without a batch would wait for the others for ever: it repeats the last one."""
        batches: list[list[BagKey]] = []
        room, tokens = 0, 0
        for index, length in enumerate(self.lengths.tolist()):
            if not batches or room == 0 or tokens + length > self.max_tokens:
                batches.append([])
                room, tokens = self.max_bags, 0
            batches[-1].append((index, 0, 0))
            room, tokens = room - 1, tokens + length
        while 0 < len(batches) < self.num_replicas:
            batches = _halve_largest(batches) or [*batches, batches[-1]]
        return batches

    def _training_count(self) -> int:
        """Batches in an epoch: what the worst of a few orders needs, so that most orders fit."""
        if not len(self.lengths):
            return 0
        orders = [self._order(0, attempt) for attempt in range(_TRIES)]
        most = max(len(self._pack(order)) for order in (*orders, self._longest_first(orders[0])))
        return -(-most // self.num_replicas) * self.num_replicas

    def _training(self, epoch: int) -> list[list[BagKey]]:
        for attempt in range(_TRIES * 8):
            order = self._order(epoch, attempt)
            packed = self._pack(order)
            if len(packed) <= self._count:
                break
        else:
            packed = self._pack(self._longest_first(order))
            packed = packed[: self._count]  # there are more only where bags are drawn, not visited
        draws: dict[int, int] = {}
        batches: list[list[BagKey]] = []
        for batch in packed:
            keys = []
            for index in batch:
                draws[index] = draws.get(index, -1) + 1
                keys.append((index, epoch, draws[index]))
            batches.append(keys)
        while len(batches) < self._count:
            # Where there are not bags enough for the ranks, some come twice.
            batches = _halve_largest(batches) or [*batches, batches[len(batches) % len(packed)]]
        return batches

    def _order(self, epoch: int, attempt: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch, attempt])
        bags = np.arange(len(self.lengths))
        if self.stratum is not None:
            classes = np.unique(self.stratum)
            wanted = -(-len(bags) // len(classes))
            bags = np.concatenate([_draw(np.flatnonzero(self.stratum == value), wanted, rng) for value in classes])
            return rng.permutation(bags)[: len(self.lengths)]
        return rng.permutation(bags)

    def _longest_first(self, order: np.ndarray) -> np.ndarray:
        return order[np.argsort(-self.lengths[order], kind="stable")]

    def _pack(self, order: np.ndarray) -> list[list[int]]:
        """First fit: each bag goes to the first batch that has room for it."""
        tokens = np.zeros(len(order), np.int64)  # of each batch; at most one batch per bag
        room = np.full(len(order), self.max_bags)
        batches: list[list[int]] = []
        first = 0  # batches before it are full
        for index in order.tolist():
            length = self.lengths[index]
            fits = (tokens[first : len(batches)] + length <= self.max_tokens) & (room[first : len(batches)] > 0)
            batch = first + int(fits.argmax()) if fits.any() else len(batches)
            if batch == len(batches):
                batches.append([])
            batches[batch].append(index)
            tokens[batch] += length
            room[batch] -= 1
            while first < len(batches) and (room[first] == 0 or tokens[first] >= self.max_tokens):
                first += 1
        return batches


def _draw(bags: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of the bags, each as often as any other, give or take one."""
    whole = np.repeat(bags, count // len(bags))
    return np.concatenate([whole, rng.choice(bags, count - len(whole), replace=False)])


def _halve_largest(batches: Sequence[list[BagKey]]) -> list[list[BagKey]] | None:
    """Two batches in place of the one with the most bags; None if all have one bag."""
    largest = max(range(len(batches)), key=lambda number: len(batches[number]))
    batch = batches[largest]
    half = len(batch) // 2
    return [*batches[:largest], batch[:half], batch[half:], *batches[largest + 1 :]] if half else None


class BagLoader(DataLoader[Any]):
    """Batches of a `TokenBudgetBatchSampler`, put together ahead by threads, and copied ahead to a GPU.

    Threads, not processes: what takes long (reading, sorting, drawing, copying) runs beside Python's interpreter, and
    features that are kept in memory are there for all. A batch does not depend on which thread makes it, or when.

    It goes on within an epoch after a resume: `state_dict` counts the batches handed out in this epoch; Lightning keeps it
    in the checkpoint and gives it back.

    Args:
        dataset: Makes the batches.
        threads: Threads; 0 makes each batch when it is asked for.
        device: The GPU on which the batches are to be; None, or another device, for the host.
        **options: Of `DataLoader`, the sampler among them.
    """

    _epoch = 0
    _handed_out = 0
    _resume: dict[str, int] | None = None

    def __init__(
        self, dataset: BagDataset, *, threads: int = 0, device: torch.device | None = None, **options: Any
    ) -> None:
        super().__init__(dataset, **({"batch_size": None} | options))  # the sampler gives whole batches
        self.threads = threads
        self.device = device

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches; threads start with the first one, when the sampler knows its epoch."""
        sampler = self.sampler
        if not isinstance(sampler, TokenBudgetBatchSampler):  # Lightning puts another in its place to overfit batches
            yield from super().__iter__()
            return
        self._epoch, self._handed_out = sampler.epoch, 0
        if (
            self._resume is not None
            and self._resume["epoch"] == sampler.epoch
            and self._resume["batches"] < len(sampler)
        ):
            self._handed_out = self._resume["batches"]
        self._resume = None
        sampler.start = self._handed_out
        assert isinstance(self.dataset, BagDataset)
        on_gpu = self.device is not None and self.device.type == "cuda"
        way: _Way[Any] = (
            _ToGPU(self.dataset, self.device) if on_gpu and self.device is not None else _ToHost(self.dataset)
        )
        for made in _ahead(way.make, sampler, self.threads):
            self._handed_out += 1
            yield way.arrived(made)

    def state_dict(self) -> dict[str, int]:
        """Epoch, and batches handed out in it."""
        return {"epoch": self._epoch, "batches": self._handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after these batches, if the next epoch is theirs."""
        self._resume = dict(state)


def _ahead(make: Callable[[list[BagKey]], T], batches: Iterable[list[BagKey]], threads: int) -> Iterator[T]:
    """What is made of the batches, in their order, by threads that are two batches ahead at least."""
    if not threads:
        yield from map(make, batches)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="bags") as pool:
        pending: deque[Future[T]] = deque()
        try:
            for keys in batches:
                pending.append(pool.submit(make, keys))
                if len(pending) > max(2, threads):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


@cache  # torch keeps the memory of a stream for that stream
def _copying(device: torch.device) -> torch.cuda.Stream:
    """The stream of the copies to a GPU."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class _Way(Protocol[T]):
    """How a batch comes to where it is wanted: `make` runs in a thread, `arrived` where the batch is handed out."""

    def make(self, keys: list[BagKey]) -> T: ...

    def arrived(self, made: T) -> dict[str, Tensor]: ...


class _ToHost:
    """Batches that stay on the host."""

    def __init__(self, dataset: BagDataset) -> None:
        self.dataset = dataset

    def make(self, keys: list[BagKey]) -> dict[str, Tensor]:
        return self.dataset.batch(keys)

    def arrived(self, made: dict[str, Tensor]) -> dict[str, Tensor]:
        return made


class _ToGPU:
    """Batches that are copied to a GPU on a stream of their own, while it works on those before."""

    STEPS = 2
    """Batches that the host may be ahead of the GPU: enough for it never to wait, few enough for its memory."""

    def __init__(self, dataset: BagDataset, device: torch.device) -> None:
        self.dataset, self.device = dataset, device
        self._stream = _copying(device)
        self._handed_out: deque[torch.cuda.Event] = deque()

    def make(self, keys: list[BagKey]) -> tuple[dict[str, Tensor], torch.cuda.Event]:
        """In a thread: the batch, and when it will be there."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            batch = self.dataset.batch(keys, self.device)
            return batch, self._stream.record_event()

    def arrived(self, made: tuple[dict[str, Tensor], torch.cuda.Event]) -> dict[str, Tensor]:
        """The batch, for the current stream."""
        batch, ready = made
        if len(self._handed_out) == self.STEPS:
            self._handed_out.popleft().synchronize()
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(ready)
        for tensor in batch.values():
            tensor.record_stream(stream)  # its memory is free when this stream has done with it
        self._handed_out.append(stream.record_event())
        return batch

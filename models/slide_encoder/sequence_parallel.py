"""Training on slides too long for one GPU: a mesh of ranks with a data axis and a sequence axis, under Lightning.

    trainer = lightning.Trainer(devices=8, strategy=SequenceParallelStrategy(sequence_parallel_size=4))

Here two slides are trained on at a time, each spread over four GPUs that stand next to one another. Gradients are averaged
over the data axis and summed over the sequence axis: the sum comes about because DDP averages over all ranks and
the exchanges within a slide have the gradients of the sum of its ranks' losses (see `SlideEncoder.shard_sequence`).

Without Lightning the same in three lines, with `make_mesh` of this file:

    mesh = make_mesh("cuda", 2, 4)
    slide_encoder.shard_sequence(mesh["sequence"].get_group())
    model = torch.nn.parallel.DistributedDataParallel(model)  # or fully_shard(model): both average over all ranks

with a sampler of 2 replicas of which this is number `mesh["data"].get_local_rank()`, and `own_tiles` of each slide.
"""

import itertools
from bisect import bisect_left
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ...bag_lengths import are_parts, lengths_of, with_lengths
from ...errors import LongslideError
from .encoder import SlideEncoder
from .spec import SlideEncoderSpec

LINEAR_WORK = 4
"""What a layer's linear parts take for a token, in keys of its attention for each number of the width; on an H100."""


def own_tiles(tiles: int, rank: int, ranks: int, spec: SlideEncoderSpec) -> slice:
    """The tiles of a slide that a rank of its group holds: parts in a row, as even in their work as can be.

    Tokens of a last, shorter segment see fewer keys: the last part is the largest.

    Args:
        tiles: Tiles of the slide.
        rank: Rank in the group of those that share the slide.
        ranks: Ranks in the group.
        spec: The slide encoder's facts.

    Returns:
        Where they are.
    """

    def work(stop: int) -> float:
        """Of the tiles before one, in keys that a head's queries meet."""
        keys = float(LINEAR_WORK * spec.width * stop)
        for segment_length, ratio in zip(spec.segment_lengths, spec.dilated_ratios, strict=True):
            width = min(segment_length, tiles)
            whole = stop // width * width if width else 0
            keys += (whole * width + (stop - whole) * min(width, tiles - whole)) / ratio**2
        return keys

    bounds = [bisect_left(range(tiles), work(tiles) * part / ranks, key=work) for part in (rank, rank + 1)]
    return slice(bounds[0], tiles if rank == ranks - 1 else bounds[1])


def own_parts(batch: dict[str, Tensor], rank: int, ranks: int, spec: SlideEncoderSpec) -> dict[str, Tensor]:
    """`own_tiles` of each slide of a batch: `tile_features` `(T, D)`, `grid_cells` `(T, 2)`, `cu_seqlens` `(B + 1,)`."""
    parts, begin = [], 0
    for tiles in lengths_of(batch["cu_seqlens"]):
        part = own_tiles(tiles, rank, ranks, spec)
        parts.append(slice(begin + part.start, begin + part.stop))
        begin += tiles
    lengths = [part.stop - part.start for part in parts]
    own = {name: torch.cat([batch[name][part] for part in parts]) for name in ("tile_features", "grid_cells")}
    ends = batch["cu_seqlens"].new_tensor([0, *itertools.accumulate(lengths)])
    return own | {"cu_seqlens": with_lengths(ends, lengths, parts=True)}


def make_mesh(device_type: str, data: int, sequence: int) -> DeviceMesh:
    """A mesh of all ranks with the axes `data` and `sequence`; those that share slides stand next to one another.

    On GPUs the exchanges within a slide have streams of high priority: else they would wait for the kernels that are to
    cover them.

    Args:
        device_type: `cuda` or `cpu`.
        data: Size of the data axis.
        sequence: Ranks that share a slide.
    """
    override: dict[int | str, Any] = {}
    if device_type == "cuda":
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        override["sequence"] = ("nccl", options)
    names = ("data", "sequence")
    return init_device_mesh(device_type, (data, sequence), mesh_dim_names=names, backend_override=override)


class SequenceParallelStrategy(DDPStrategy):
    """DDP in which groups of ranks share slides.

    Batches are those of `data/cohort/bags.py`, of whose slides a rank keeps its parts before they go to the GPU; the loader
    of `BagDataModule`, which copies ahead, asks for them (`own_tiles`). The model's only use of `tile_features` and
    `grid_cells` must be its slide encoder. Samplers go by the data axis.

    Args:
        sequence_parallel_size: Ranks that share slides; divides the number of all ranks.
        **options: Of `DDPStrategy`.
    """

    def __init__(self, sequence_parallel_size: int, **options: Any) -> None:
        super().__init__(**options)
        self.sequence_parallel_size = sequence_parallel_size
        self._mesh: DeviceMesh | None = None
        self._spec: SlideEncoderSpec | None = None

    @property
    def device_mesh(self) -> DeviceMesh:
        """The mesh of all ranks, with the axes `data` and `sequence`."""
        if self._mesh is None:
            raise RuntimeError("there is no device mesh before the processes have started")
        return self._mesh

    def setup_environment(self) -> None:
        """Start the process groups.

        Raises:
            LongslideError: The number of ranks is no multiple of those that share a slide.
        """
        super().setup_environment()
        size, world_size = self.sequence_parallel_size, self.world_size
        if size < 1 or world_size % size:
            raise LongslideError(f"sequence_parallel_size {size} does not divide the {world_size} ranks")
        self._mesh = make_mesh(self.root_device.type, world_size // size, size)

    def setup(self, trainer: Trainer) -> None:
        """Let the model's slide encoders share their slides.

        Raises:
            LongslideError: The model has no slide encoder.
        """
        assert self.lightning_module is not None
        encoders = [module for module in self.lightning_module.modules() if isinstance(module, SlideEncoder)]
        if not encoders:
            raise LongslideError("sequence parallelism is for slide encoders, and this model has none")
        self._spec = encoders[0].spec
        for encoder in encoders:
            encoder.shard_sequence(self.device_mesh["sequence"].get_group())
        super().setup(trainer)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Ranks that share a slide draw the same ones."""
        data = self.device_mesh["data"]
        return {"num_replicas": data.size(), "rank": data.get_local_rank()}

    def own_tiles(self, tiles: int) -> slice:
        """The tiles of a slide that this rank holds: a loader that asks copies no others to the GPU."""
        sequence = self.device_mesh["sequence"]
        assert self._spec is not None
        return own_tiles(tiles, sequence.get_local_rank(), sequence.size(), self._spec)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Keep this rank's part of each slide, unless the loader has left out the others."""
        if isinstance(batch, dict) and "tile_features" in batch and not are_parts(batch["cu_seqlens"]):
            sequence = self.device_mesh["sequence"]
            assert self._spec is not None
            batch = batch | own_parts(batch, sequence.get_local_rank(), sequence.size(), self._spec)
        return super().batch_to_device(batch, device, dataloader_idx)

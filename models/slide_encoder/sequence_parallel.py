"""Training on slides too long for one GPU: a mesh of ranks with a data axis and a sequence axis, under Lightning.

    trainer = lightning.Trainer(devices=8, strategy=SequenceParallelStrategy(sequence_parallel_size=4))

Here two slides are trained on at a time, each spread over four GPUs that stand next to one another. Gradients are averaged
over the data axis and summed over the sequence axis: the sum comes about because DDP averages over all ranks and
the exchanges within a slide have the gradients of the sum of its ranks' losses (see `SlideEncoder.shard_sequence`).

Without Lightning the same in three lines:

    mesh = torch.distributed.init_device_mesh("cuda", (2, 4), mesh_dim_names=("data", "sequence"))
    slide_encoder.shard_sequence(mesh["sequence"].get_group())
    model = torch.nn.parallel.DistributedDataParallel(model)  # or fully_shard(model): both average over all ranks

with a sampler of 2 replicas of which this is number `mesh["data"].get_local_rank()`, and `own_tiles` of each slide.
"""

import itertools
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ...errors import LongslideError
from .encoder import SlideEncoder


def own_tiles(tiles: int, rank: int, ranks: int) -> slice:
    """The tiles of a slide that a rank of its group holds: parts in a row, as even as can be.

    Args:
        tiles: Tiles of the slide.
        rank: Rank in the group of those that share the slide.
        ranks: Ranks in the group.

    Returns:
        Where they are.
    """
    return slice(tiles * rank // ranks, tiles * (rank + 1) // ranks)


def own_parts(batch: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """`own_tiles` of each slide of a batch: `tile_features` `(T, D)`, `grid_cells` `(T, 2)`, `cu_seqlens` `(B + 1,)`."""
    bounds = batch["cu_seqlens"].tolist()
    parts = []
    for begin, end in itertools.pairwise(bounds):
        part = own_tiles(end - begin, rank, ranks)
        parts.append(slice(begin + part.start, begin + part.stop))
    ends = [0, *itertools.accumulate(part.stop - part.start for part in parts)]
    own = {name: torch.cat([batch[name][part] for part in parts]) for name in ("tile_features", "grid_cells")}
    return own | {"cu_seqlens": batch["cu_seqlens"].new_tensor(ends)}


class SequenceParallelStrategy(DDPStrategy):
    """DDP in which groups of ranks share slides.

    Batches are those of `data/cohort/bags.py`: a rank keeps its part of each slide's `tile_features` and `grid_cells` before
    they go to the GPU. The model's only use of them must be its slide encoder. Samplers go by the data axis.

    Args:
        sequence_parallel_size: Ranks that share slides; divides the number of all ranks.
        **options: Of `DDPStrategy`.
    """

    def __init__(self, sequence_parallel_size: int, **options: Any) -> None:
        super().__init__(**options)
        self.sequence_parallel_size = sequence_parallel_size
        self._mesh: DeviceMesh | None = None

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
        names = ("data", "sequence")
        self._mesh = init_device_mesh(self.root_device.type, (world_size // size, size), mesh_dim_names=names)

    def setup(self, trainer: Trainer) -> None:
        """Let the model's slide encoders share their slides.

        Raises:
            LongslideError: The model has no slide encoder.
        """
        assert self.lightning_module is not None
        encoders = [module for module in self.lightning_module.modules() if isinstance(module, SlideEncoder)]
        if not encoders:
            raise LongslideError("sequence parallelism is for slide encoders, and this model has none")
        for encoder in encoders:
            encoder.shard_sequence(self.device_mesh["sequence"].get_group())
        super().setup(trainer)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Ranks that share a slide draw the same ones."""
        data = self.device_mesh["data"]
        return {"num_replicas": data.size(), "rank": data.get_local_rank()}

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Keep this rank's part of each slide."""
        if isinstance(batch, dict) and "tile_features" in batch:
            sequence = self.device_mesh["sequence"]
            batch = batch | own_parts(batch, sequence.get_local_rank(), sequence.size())
        return super().batch_to_device(batch, device, dataloader_idx)

"""One rank of the tests of sequence parallelism in the slide encoder: `python encoder_ranks.py FOLDER` starts four."""

import os
import sys
from pathlib import Path

import lightning
import pytest
import torch
import torch.distributed as dist
from longslide import LongslideError, create_slide_encoder
from longslide.models.slide_encoder.encoder import SlideEncoder
from longslide.models.slide_encoder.sequence_parallel import SequenceParallelStrategy, own_parts
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from torch.utils.data import DataLoader

BATCHES = ([23], [40, 1, 7], [3, 3], [31])
"""Tiles of the slides of each."""


def small_encoder(**settings: object) -> SlideEncoder:
    sizes = {"layers": 2, "width": 32, "heads": 8, "ffn_width": 64, "tile_dim": 12, "dilated_ratios": (1, 2, 4)}
    encoder = create_slide_encoder("gigapath", checkpoint="random", **(sizes | settings)).double()
    for layer in encoder.layers:
        layer.segment_lengths = (
            5,
            16,
            64,
        )  # segments of a slide of some tiles, as the true ones are of one of thousands
    return encoder


def slide(tiles: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tiles)
    cells = torch.stack([torch.arange(tiles) % 6, torch.arange(tiles) // 6], dim=1)
    return torch.randn(tiles, 12, generator=generator, dtype=torch.float64), cells


class Regression(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = small_encoder()
        self.head = nn.Linear(32, 1).double()
        nn.init.ones_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def loss(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        return (self.head(self.encoder(tile_features, grid_cells, cu_seqlens)) - 1).square().mean()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(**batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def check_the_encoder(rank: int) -> None:
    """Embeddings and gradients of slides spread unevenly over three ranks, alone and packed, are those of one process."""
    group = dist.new_group([0, 1, 2])
    if rank == 3:
        return
    for parts in ([[2, 9, 0]], [[0, 0, 1]], [[15, 14, 16]], [[10, 3, 10], [0, 40, 0], [1, 0, 1]]):
        slides = [slide(sum(counts)) for counts in parts]
        features, cells = (torch.cat(x) for x in zip(*slides, strict=True))
        bounds = torch.tensor([0, *(sum(counts) for counts in parts)]).cumsum(0)
        own = torch.cat(
            [begin + torch.arange(sum(p[:rank]), sum(p[: rank + 1])) for begin, p in zip(bounds, parts, strict=False)]
        )
        own_bounds = torch.tensor([0, *(counts[rank] for counts in parts)]).cumsum(0)
        for pool in ("mean", "cls"):
            alone, shared = (
                small_encoder(pool=pool, drop_path=0.5).train(),
                small_encoder(pool=pool, drop_path=0.5).train(),
            )
            shared.shard_sequence(group)
            results = []
            for encoder, x, where, ends, seed in (
                (alone, features, cells, bounds, 0),
                (shared, features[own], cells[own], own_bounds, rank),
            ):
                torch.manual_seed(seed)  # the ranks' generators differ; the first one says which halves are left out
                x = x.clone().requires_grad_()
                inputs = (x[None], where[None]) if len(parts) == 1 else (x, where, ends)
                embeddings = encoder.layer_embeddings(*inputs)
                embedding = encoder(*inputs)
                (embedding.square().sum() + embeddings.sin().sum()).backward()
                results.append((embedding, embeddings, x.grad))
            (embedding, embeddings, grad), (shared_embedding, shared_embeddings, shared_grad) = results
            torch.testing.assert_close(shared_embedding, embedding)
            torch.testing.assert_close(shared_embeddings, embeddings)
            torch.testing.assert_close(shared_grad / 3, grad[own])
            for (name, one), other in zip(alone.named_parameters(), shared.parameters(), strict=True):
                assert other.grad is not None, name
                dist.all_reduce(other.grad, group=group)
                torch.testing.assert_close(other.grad / 3, one.grad, msg=lambda text, name=name: f"{name}: {text}")

    shared.shard_sequence(None)
    torch.testing.assert_close(shared.eval()(features, cells, bounds), alone.eval()(features, cells, bounds))
    shared.shard_sequence(group)
    with pytest.raises(LongslideError, match="no rank has a tile of slide 2 of 2"):
        shared(features[:3], cells[:3], torch.tensor([0, 3, 3]))


def check_the_trainer(folder: Path) -> None:
    """Two batches at a time, each over two ranks: after two steps the weights are those of one process."""
    batches = [
        {
            "tile_features": torch.cat([slide(tiles)[0] for tiles in batch]),
            "grid_cells": torch.cat([slide(tiles)[1] for tiles in batch]),
            "cu_seqlens": torch.tensor([0, *batch], dtype=torch.int32).cumsum(0).int(),
        }
        for batch in BATCHES
    ]
    loader = DataLoader(batches, batch_size=1, collate_fn=lambda items: items[0])

    def trainer(size: int) -> lightning.Trainer:
        return lightning.Trainer(
            accelerator="cpu", devices=4, strategy=SequenceParallelStrategy(size), max_epochs=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip

    model, cut, alone = Regression(), Regression(), Regression()
    with pytest.raises(LongslideError, match="sequence_parallel_size 3 does not divide the 4 ranks"):
        trainer(3).fit(model, loader)
    trainer(2).fit(model, loader)
    training = trainer(2)  # of the same batches, of which the loader leaves out what other ranks hold

    def own(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        mesh = training.strategy.device_mesh["sequence"]
        return own_parts(items[0], mesh.get_local_rank(), mesh.size(), cut.encoder.spec)

    training.fit(cut, DataLoader(batches, batch_size=1, collate_fn=own))
    optimizer = alone.configure_optimizers()
    for step in range(2):  # the sampler of two replicas takes slides in turn
        optimizer.zero_grad()
        sum(alone.loss(**batch) / 2 for batch in batches[2 * step : 2 * step + 2]).backward()
        optimizer.step()
    for (name, one), other in zip(alone.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other, one, msg=lambda text, name=name: f"{name}: {text}")
    for one, other in zip(cut.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(alone.encoder.cls_token, Regression().encoder.cls_token), "the training does something"


def main(rank: int, folder: Path) -> None:
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4"}
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=4)
    check_the_encoder(rank)
    check_the_trainer(folder)
    dist.destroy_process_group()


if __name__ == "__main__":  # forked: everything is imported once
    start_processes(main, (Path(sys.argv[1]),), nprocs=4, start_method="fork")

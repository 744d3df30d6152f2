"""Masked autoencoding of tile embeddings: how GigaPath pretrains its slide encoder, without labels.

Of each slide most tiles are hidden (He et al., https://arxiv.org/abs/2111.06377); the slide encoder sees the rest, and a
light LongNet decoder predicts the hidden embeddings from them and the hidden tiles' places
(https://doi.org/10.1038/s41586-024-07441-w).
"""

from collections.abc import Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torchmetrics import MeanMetric

from ...errors import LongslideError
from ...version import SOFTWARE
from ..aggregators.base import create_aggregator, split_bags
from ..aggregators.slide_encoder import SlideEncoderAggregator
from ..checkpoint_file import SCHEMA
from ..classifier.bag_weights import BagWeightedModule
from ..classifier.optimisation import configure
from .encoder import SlideEncoder
from .longnet import LongNetLayer
from .mae_options import LEARNING_RATE, PretrainingOptions
from .positions import grid_positions


class UnlabelledFacts(NamedTuple):
    """What the masked autoencoder must know of its training data.

    Attributes:
        feature_dim: Length of a tile embedding.
        preprocessing: What made the features, as in a classifier's facts.
    """

    feature_dim: int
    preprocessing: Mapping[str, Any] = MappingProxyType({})


class MaskedAutoencoder(BagWeightedModule):
    """A slide encoder that learns to predict hidden tiles from the others.

    Args:
        facts: What must be known of the training data.
        options: Everything else.
    """

    def __init__(self, facts: UnlabelledFacts, options: PretrainingOptions = PretrainingOptions()) -> None:
        super().__init__()
        if not 0 < options.mask_ratio < 1:
            raise LongslideError(f"--model.mask-ratio {options.mask_ratio} must be above 0 and below 1")
        self.facts = facts._replace(preprocessing=dict(facts.preprocessing))  # averages of the weights copy it
        tile_encoder = facts.preprocessing.get("tile_encoder")
        aggregator = create_aggregator(options.encoder, options.checkpoint, facts.feature_dim, tile_encoder)
        if not isinstance(aggregator, SlideEncoderAggregator) or not isinstance(aggregator.encoder, SlideEncoder):
            raise LongslideError(f"--model.encoder {aggregator.name}: only longnet and gigapath are pretrained here")
        self.encoder: SlideEncoder = aggregator.encoder
        # They come after the pooling, which pretraining does not use.
        self.encoder.norm.requires_grad_(False)
        self.mask_ratio = options.mask_ratio
        self.normalise_targets = options.normalise_targets
        self.horizontal_flip = options.horizontal_flip
        self.shift = options.shift
        self.optimiser = options.optimiser
        self.learning_rate = options.optimiser.learning_rate or LEARNING_RATE
        spec, decoder = self.encoder.spec, options.decoder
        self.decoder_in = nn.Linear(spec.width, decoder.width)
        self.mask_token = nn.Parameter(torch.zeros(1, decoder.width))
        nn.init.normal_(self.mask_token, std=0.02)
        self.decoder_layers = nn.ModuleList(
            LongNetLayer(decoder.width, decoder.heads, decoder.ffn_width, spec.segment_lengths, spec.dilated_ratios)
            for _ in range(decoder.layers)
        )
        self.decoder_norm = nn.LayerNorm(decoder.width)
        self.decoder_out = nn.Linear(decoder.width, facts.feature_dim)
        self.val_loss = MeanMetric()

    def forward(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor, hidden: Tensor) -> Tensor:
        """Tell the tiles from those that are not hidden.

        Args:
            tile_features: `(T, D)` tile embeddings of all slides, packed end to end.
            grid_cells: `(T, 2)` int64 (column, row) of each tile.
            cu_seqlens: `(B + 1,)` int32 cumulative lengths of the slides.
            hidden: `(T,)` bool, which tiles the encoder does not see; it sees one of each slide at least.

        Returns:
            `(T, D)` embeddings.
        """
        seen = ~hidden
        slides = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device).repeat_interleave(cu_seqlens.diff())
        seen_lengths = slides[seen].bincount(minlength=len(cu_seqlens) - 1)
        seen_cu_seqlens = torch.cat([cu_seqlens[:1], seen_lengths.cumsum(0).int()])
        x = self.decoder_in(self.encoder.tile_tokens(tile_features[seen], grid_cells[seen], seen_cu_seqlens))
        tokens = self.mask_token.to(x.dtype).repeat(len(hidden), 1).index_copy(0, seen.nonzero()[:, 0], x)
        y = tokens + grid_positions(grid_cells, tokens.shape[1], self.mask_token.dtype)
        for layer in self.decoder_layers:
            y = torch.add(*layer(y, cu_seqlens))
        predicted: Tensor = self.decoder_out(self.decoder_norm(y))
        return predicted

    def loss(self, batch: dict[str, Tensor], generators: list[torch.Generator | None]) -> tuple[Tensor, Tensor]:
        """The mean squared error of the hidden tiles of each slide.

        Args:
            batch: A batch of slides.
            generators: Draws which tiles are hidden, for each slide; None for torch's own.

        Returns:
            The sum over the slides, and the number of slides that have hidden tiles.
        """
        cu_seqlens = batch["cu_seqlens"]
        lengths = cu_seqlens.diff().tolist()
        drawn = [self._hide(n, generator) for n, generator in zip(lengths, generators, strict=True)]
        hidden = torch.cat(drawn).to(self.device)
        target = batch["tile_features"].float()
        predicted = self(batch["tile_features"], batch["grid_cells"], cu_seqlens, hidden).float()
        if self.normalise_targets:
            target = layer_norm(target, target.shape[-1:])
        error = (predicted - target).square().mean(1)
        losses = [
            bag[mask].mean()
            for bag, mask in zip(split_bags(error, cu_seqlens), split_bags(hidden, cu_seqlens), strict=True)
            if mask.any()
        ]
        # The product with zero keeps the graph where no slide has a tile to hide.
        total = torch.stack(losses).sum() if losses else predicted.sum() * 0.0
        return total, total.new_tensor(float(len(losses)))

    def _hide(self, tiles: int, generator: torch.Generator | None) -> Tensor:
        hidden = torch.zeros(tiles, dtype=torch.bool)
        count = min(tiles - 1, max(1, round(self.mask_ratio * tiles)))
        hidden[torch.randperm(tiles, generator=generator)[:count]] = True
        return hidden

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The sum of the losses of a batch."""
        batch = self._moved(batch)
        loss, weight = self.loss(batch, [None] * (len(batch["cu_seqlens"]) - 1))
        return self.weighted_loss(loss, weight)

    def _moved(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mirror and shift the grids; the tiles go on row by row."""
        features, cells = [], []
        packed = (split_bags(batch[name], batch["cu_seqlens"]) for name in ("tile_features", "grid_cells"))
        for slide, grid in zip(*packed, strict=True):
            flip = self.horizontal_flip and bool(torch.rand(()) < 0.5)
            column, row = grid.unbind(1)
            if flip:
                column = column.max() + column.min() - column
            order = (row * (column.max() + 1) + column).argsort()
            offset = torch.randint(self.shift + 1, (2,)).to(grid.device)
            features.append(slide[order])
            cells.append((torch.stack([column, row], 1) + offset)[order])
        return batch | {"tile_features": torch.cat(features), "grid_cells": torch.cat(cells)}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Gather the loss; each slide hides the same tiles every time."""
        generators: list[torch.Generator | None] = [
            torch.Generator().manual_seed(index) for index in batch["index"].tolist()
        ]
        loss, weight = self.loss(batch, generators)
        if weight > 0:
            self.val_loss.update(loss / weight, weight)
        self.log("val_loss", self.val_loss, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW, with warm-up and cosine at every step."""
        return configure(self, self.optimiser, self.learning_rate, self.trainer)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint holds under `longslide`."""
        return {
            "schema": SCHEMA,
            "kind": "mae",
            "software": SOFTWARE,
            "slide_encoder": asdict(self.encoder.spec),
            "preprocessing": dict(self.facts.preprocessing),
            "mask_ratio": self.mask_ratio,
        }

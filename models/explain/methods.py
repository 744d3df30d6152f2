"""Explanations: how much each tile of a slide speaks for or against what a model says of it.

A model here is any function of the packed interface, `(tile_features (T, D), grid_cells (T, 2), cu_seqlens (B + 1,)) ->
(B, C)`; what is explained are its C numbers, so a caller chooses them: log-odds of classes rather than logits, whose common
part says nothing. Every method sees one slide, keeps no more than one pass of the model in memory (half as much where the
weights do not require gradients), and gives one score per tile and number. Scores above 0 raise it: without the tile,
the number would be lower.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

Method = Literal["integrated-gradients", "gradient-x-input", "occlusion", "attention"]

METHODS: tuple[Method, ...] = get_args(Method)

STEPS = 50
"""Points of the integral of integrated gradients."""

WINDOW = 4
"""Smallest edge of the neighbourhood that occlusion takes away, in tiles, unless asked otherwise."""

WINDOWS = 1000
"""About so many neighbourhoods of a large slide: their edge grows with the slide, not the time a tile takes."""

TOKENS_PER_BATCH = 2**18
"""Tiles that occlusion packs into one pass of the model: about what training on a GPU of 80 GB holds without gradients."""

PackedModel = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TileScores:
    """Scores of the tiles of one slide.

    Attributes:
        scores: `(T, C)` float32 on the CPU; the share of each tile in each of the explained numbers.
        change: `(C,)` float32, the explained numbers less those of the baseline: what the scores of integrated gradients
            add up to, were the integral exact. None for attention, which explains no number.
        completeness_error: `(C,)` float32, how far they are from it: `|sum of scores - change|`. Of integrated gradients
            alone.
    """

    scores: Tensor
    change: Tensor | None = None
    completeness_error: Tensor | None = None


def class_log_odds(logits: Tensor) -> Tensor:
    """`log(p / (1 - p))` of each class.

    Args:
        logits: `(B, C)` numbers whose softmax is the probability p of each class, C at least 2.

    Returns:
        `(B, C)`, without the rounding of p to 0 or 1.
    """
    classes = logits.shape[1]
    others = ~torch.eye(classes, dtype=torch.bool, device=logits.device)
    rest = logits[:, None, :].expand(-1, classes, -1)[:, others].reshape(len(logits), classes, classes - 1)
    return logits - torch.logsumexp(rest, dim=2)


def integrated_gradients(
    model: PackedModel, tile_features: Tensor, grid_cells: Tensor, *, baseline: Tensor, steps: int = STEPS
) -> TileScores:
    """Gradients along the straight line from the baseline to the tiles, integrated (https://arxiv.org/abs/1703.01365).

    The scores add up to the change of the explained number from a slide that is all baseline to this one.

    Args:
        model: The model.
        tile_features: `(T, D)` floating tile embeddings of one slide.
        grid_cells: `(T, 2)` int64 (column, row) of each tile.
        baseline: `(D,)` embedding of a tile that says nothing.
        steps: Points of the integral, by Gauss and Legendre; one pass of the model, forward and backward, each.

    Returns:
        The scores, the change they explain and the completeness error.
    """
    difference = tile_features - baseline
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    lengths = _one_bag(tile_features)
    scores: Tensor | None = None
    for node, weight in zip(((nodes + 1) / 2).tolist(), (weights / 2).tolist(), strict=True):
        step = weight * _gradient_times(model, baseline + node * difference, difference, grid_cells)
        scores = step if scores is None else scores + step
    assert scores is not None
    with torch.no_grad():
        # One after the other, not as one batch: a slide of 50,000 tiles may fill the memory.
        here = model(tile_features, grid_cells, lengths)[0].float()
        there = model(baseline.expand_as(tile_features), grid_cells, lengths)[0].float()
    change = here - there
    error = (scores.double().sum(0) - change).abs().float()
    return TileScores(scores.cpu(), change.cpu(), error.cpu())


def gradient_x_input(model: PackedModel, tile_features: Tensor, grid_cells: Tensor, *, baseline: Tensor) -> TileScores:
    """The gradient at the slide times the tiles' distance from the baseline: integrated gradients in one step.

    Args:
        model: The model.
        tile_features: `(T, D)` floating tile embeddings of one slide.
        grid_cells: `(T, 2)` int64 (column, row) of each tile.
        baseline: `(D,)` embedding of a tile that says nothing; zeros give the method its name has in the literature.

    Returns:
        The scores.
    """
    return TileScores(_gradient_times(model, tile_features, tile_features - baseline, grid_cells).cpu())


def occlusion(
    model: PackedModel,
    tile_features: Tensor,
    grid_cells: Tensor,
    *,
    baseline: Tensor,
    window: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> TileScores:
    """What is lost when the tiles of a neighbourhood become the baseline, shared equally by these tiles.

    The neighbourhoods are squares of the grid that overlap by half; a tile's score is the mean over those it is in. Several
    occluded copies of the slide go through the model together, packed end to end.

    Args:
        model: The model.
        tile_features: `(T, D)` floating tile embeddings of one slide.
        grid_cells: `(T, 2)` int64 (column, row) of each tile.
        baseline: `(D,)` embedding of a tile that says nothing.
        window: Edge of a square in tiles. Default: 4, more where that would make more than about a thousand squares.
        tokens_per_batch: Tiles, of all copies together, that go through the model at once; one copy always does.

    Returns:
        The scores.
    """
    tiles = len(tile_features)
    window = window or max(WINDOW, 2 * math.ceil(math.sqrt(tiles / WINDOWS)))
    # Squares that overlap by half are those of four grids of squares side by side, each shifted by half a square.
    shifts = sorted({0, window // 2})
    squares = [grid_cells - grid_cells.min(0).values + grid_cells.new_tensor([x, y]) for y in shifts for x in shifts]
    with torch.no_grad():
        whole = model(tile_features, grid_cells, _one_bag(tile_features))
        scores = [
            _occlude(
                model, whole, tile_features, grid_cells, baseline, cells // window, max(1, tokens_per_batch // tiles)
            )
            for cells in squares
        ]
    return TileScores(torch.stack(scores).mean(0).cpu())


def _occlude(
    model: PackedModel,
    whole: Tensor,
    tile_features: Tensor,
    grid_cells: Tensor,
    baseline: Tensor,
    squares: Tensor,
    copies: int,
) -> Tensor:
    """`(T, C)` share of each tile in what is lost without its square; `squares` `(T, 2)` says which that is."""
    _, square, count = torch.unique(squares, dim=0, return_inverse=True, return_counts=True)
    lost = []
    for some in torch.split(torch.arange(len(count), device=square.device), copies):
        hidden = (square == some[:, None]).flatten()
        packed = torch.where(hidden[:, None], baseline, tile_features.repeat(len(some), 1))
        lengths = torch.arange(len(some) + 1, dtype=torch.int32, device=square.device) * len(tile_features)
        lost.append((whole - model(packed, grid_cells.repeat(len(some), 1), lengths)).float())
    share: Tensor = torch.cat(lost) / count[:, None]
    return share[square]


def attention(model: nn.Module, tile_features: Tensor, grid_cells: Tensor) -> TileScores:
    """The attention weights of a model that has them, the mean over its heads: where it looks, for or against whatever.

    Args:
        model: A module with a method `attention_weights(tile_features, grid_cells, cu_seqlens) -> (T,) or (T, heads)`.
        tile_features: `(T, D)` floating tile embeddings of one slide.
        grid_cells: `(T, 2)` int64 (column, row) of each tile.

    Returns:
        The scores, `(T, 1)`, none below 0.
    """
    weights: Any = model.attention_weights
    with torch.no_grad():
        found: Tensor = weights(tile_features, grid_cells, _one_bag(tile_features)).float()
    return TileScores(found.reshape(len(tile_features), -1).mean(1, keepdim=True).cpu())


def _gradient_times(model: PackedModel, point: Tensor, factor: Tensor, grid_cells: Tensor) -> Tensor:
    """`(T, C)` float32: for each tile, the gradient of each number at `point`, times `factor`, summed over D."""
    with torch.enable_grad():
        point = point.detach().requires_grad_()
        numbers = model(point, grid_cells, _one_bag(point))[0]
        columns = []
        for number in range(len(numbers)):
            last = number == len(numbers) - 1
            [gradient] = torch.autograd.grad(numbers[number], point, retain_graph=not last)
            columns.append((gradient.float() * factor.float()).sum(1))
    return torch.stack(columns, dim=1).detach()


def _one_bag(tile_features: Tensor) -> Tensor:
    return torch.tensor([0, len(tile_features)], dtype=torch.int32, device=tile_features.device)

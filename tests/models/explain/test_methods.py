"""Explanations against what they must be where it is known, and against a region that was planted to decide."""

import pytest
import torch
from longslide.models.explain.methods import (
    attention,
    class_log_odds,
    gradient_x_input,
    integrated_gradients,
    occlusion,
)
from torch import Tensor, nn


class Linear(nn.Module):
    """The mean tile times a matrix: every method has its exact answer by hand."""

    def __init__(self, dim: int = 6, outputs: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, dim, dtype=torch.float64))

    def forward(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        bags = tile_features.split(cu_seqlens.diff().tolist())
        return torch.stack([bag.mean(0) for bag in bags]) @ self.weight.T


class Curved(Linear):
    """Tiles act on one another, smoothly."""

    def forward(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        return super().forward(tile_features.tanh(), grid_cells, cu_seqlens).exp()


@pytest.fixture
def slide() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    index = torch.arange(35)
    return (
        torch.randn(35, 6, dtype=torch.float64),
        torch.stack([index % 7 + 11, index // 7 + 3], 1),
        torch.randn(6, dtype=torch.float64),
    )


def test_of_a_linear_model_every_method_gives_each_tile_its_part(slide: tuple[Tensor, Tensor, Tensor]) -> None:
    features, cells, baseline = slide
    model = Linear()
    expected = ((features - baseline) @ model.weight.T / 35).detach().float()
    for scores in (
        integrated_gradients(model, features, cells, baseline=baseline, steps=3),
        gradient_x_input(model, features, cells, baseline=baseline),
        occlusion(model, features, cells, baseline=baseline, window=1),
    ):
        torch.testing.assert_close(scores.scores, expected, rtol=1e-5, atol=1e-6)


def test_integrated_gradients_add_up_to_the_change_and_say_how_nearly(slide: tuple[Tensor, Tensor, Tensor]) -> None:
    features, cells, baseline = slide
    model = Curved()
    one_bag = torch.tensor([0, 35])
    with torch.no_grad():
        change = model(features, cells, one_bag)[0] - model(baseline.expand(35, -1), cells, one_bag)[0]
    found = integrated_gradients(model, features, cells, baseline=baseline)
    torch.testing.assert_close(found.scores.sum(0), change.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.change, change.float())
    assert found.completeness_error is not None
    assert (found.completeness_error < 1e-4 * change.abs() + 1e-5).all()
    coarse = integrated_gradients(model, features, cells, baseline=baseline, steps=1)
    error = (coarse.scores.sum(0) - change).abs()
    assert (error > 1e-3).any()
    torch.testing.assert_close(coarse.completeness_error, error.float(), rtol=1e-3, atol=1e-5)


def test_the_gradient_is_that_of_finite_differences(slide: tuple[Tensor, Tensor, Tensor]) -> None:
    features, cells, baseline = slide
    model, one_bag, small = Curved(), torch.tensor([0, 35]), 1e-5
    found = gradient_x_input(model, features, cells, baseline=baseline).scores
    for tile in (0, 17, 34):
        moved = features.clone()
        moved[tile] += small * (features - baseline)[tile]
        with torch.no_grad():
            slope = (model(moved, cells, one_bag) - model(features, cells, one_bag))[0] / small
        torch.testing.assert_close(found[tile], slope.float(), rtol=1e-3, atol=1e-6)


def test_occlusion_takes_away_squares_that_overlap_by_half_and_shares_what_is_lost(
    slide: tuple[Tensor, Tensor, Tensor],
) -> None:
    features, cells, baseline = slide
    model, one_bag = Curved(), torch.tensor([0, 35])
    expected, squares = torch.zeros(35, 3), torch.zeros(35, 1)
    for left in range(-2, 7, 2):
        for top in range(-2, 5, 2):
            corner = torch.tensor([11 + left, 3 + top])
            inside = ((cells >= corner) & (cells < corner + 4)).all(1)
            hidden = torch.where(inside[:, None], baseline, features)
            with torch.no_grad():
                lost = (model(features, cells, one_bag) - model(hidden, cells, one_bag))[0]
            expected[inside] += (lost / inside.sum()).float()
            squares[inside] += 1
    assert (squares == 4).all()
    for budget in (1, 35, 100, 1000):
        scores = occlusion(model, features, cells, baseline=baseline, window=4, tokens_per_batch=budget).scores
        torch.testing.assert_close(scores, expected / 4)


def test_a_large_slide_has_larger_squares_not_more_of_them() -> None:
    index = torch.arange(12_000)
    cells, seen = torch.stack([index % 120, index // 120], 1), []
    features = torch.zeros(12_000, 1)

    def model(tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        seen.append(len(cu_seqlens) - 1)
        return torch.zeros(len(cu_seqlens) - 1, 1)

    occlusion(model, features, cells, baseline=torch.ones(1))
    assert 800 < sum(seen) < 1300


def test_occlusion_never_packs_more_than_its_budget(slide: tuple[Tensor, Tensor, Tensor]) -> None:
    features, cells, baseline = slide
    model, seen = Linear(), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    occlusion(model, features, cells, baseline=baseline, window=1, tokens_per_batch=110)
    assert seen == [35, *[105] * 11, 70]


def test_no_method_keeps_a_gradient_or_changes_the_weights(slide: tuple[Tensor, Tensor, Tensor]) -> None:
    features, cells, baseline = slide
    model = Curved()
    with torch.no_grad():  # a prediction runs without gradients
        found = [
            integrated_gradients(model, features, cells, baseline=baseline, steps=2),
            gradient_x_input(model, features, cells, baseline=baseline),
            occlusion(model, features, cells, baseline=baseline),
        ]
    assert model.weight.grad is None
    assert not any(scores.scores.requires_grad for scores in found)
    assert not features.requires_grad


def test_attention_is_the_mean_over_heads() -> None:
    class Attending(Linear):
        def attention_weights(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
            assert cu_seqlens.tolist() == [0, 4]
            return torch.tensor([[0.1, 0.3], [0.2, 0.2], [0.3, 0.1], [0.4, 0.4]])

    features, cells = torch.randn(4, 6), torch.zeros(4, 2, dtype=torch.long)
    found = attention(Attending(), features, cells)
    torch.testing.assert_close(found.scores, torch.tensor([[0.2], [0.2], [0.2], [0.4]]))
    assert found.change is None


def test_log_odds_of_a_class_are_those_of_its_probability() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(class_log_odds(logits), torch.logit(logits.softmax(1)))
    assert torch.autograd.gradcheck(class_log_odds, logits)
    binary = torch.tensor([[0.0, 3.0], [0.0, -200.0]])
    torch.testing.assert_close(class_log_odds(binary), torch.tensor([[-3.0, 3.0], [200.0, -200.0]]))

"""A region is planted that decides the class: explanations of trained models find it, those of random models do not."""

from functools import cache

import numpy as np
import pytest
import torch
from longslide import LongslideError
from longslide.models.aggregators.registry import AggregatorChoice
from longslide.models.classifier.classifier import SlideClassifier, TrainingFacts
from longslide.models.classifier.ensemble import ClassifierEnsemble
from longslide.models.classifier.options import ClassifierOptions
from longslide.models.explain.classifier import explain_ensemble, recompute_layers
from longslide.task import Task
from sklearn.metrics import roc_auc_score
from torch import Tensor

DIM = 16
EDGE = 3  # of the planted square, in tiles


def plant(rng: np.random.Generator, tumour: bool) -> tuple[Tensor, Tensor, np.ndarray]:
    """A slide of 9 x 8 cells, some without a tile: features, cells, and which tiles are of the planted square."""
    cells = np.stack(np.meshgrid(np.arange(9), np.arange(8)), -1).reshape(-1, 2)
    cells = cells[rng.random(len(cells)) < 0.85]
    features = rng.normal(size=(len(cells), DIM)).astype(np.float32)
    corner = rng.integers(0, [9 - EDGE, 8 - EDGE])
    planted = ((cells >= corner) & (cells < corner + EDGE)).all(1) & tumour
    features[planted] += 4 * np.random.default_rng(99).dirichlet(np.ones(DIM)) ** 0.5  # of length 4
    return torch.from_numpy(features), torch.from_numpy(cells), planted


def slides(count: int, seed: int) -> list[tuple[Tensor, Tensor, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [plant(rng, number % 2 == 1) for number in range(count)]


SMALL = {
    "longnet": {"layers": 2, "width": 32, "heads": 4, "ffn_width": 64, "dilated_ratios": (1, 2), "dropout": 0.0},
    "abmil": {"width": 32, "attention_width": 16, "dropout": 0.0},
    "transmil": {"width": 32, "heads": 4, "landmarks": 16, "dropout": 0.0},
    "mean": {"width": 32, "dropout": 0.0},
    "max": {"width": 32, "dropout": 0.0},
}


def new_model(name: str, seed: int = 0) -> SlideClassifier:
    torch.manual_seed(seed)
    model = SlideClassifier(
        TrainingFacts(Task("binary", ("label",), ("normal", "tumour")), DIM),
        ClassifierOptions(AggregatorChoice(name, SMALL[name])),
    )
    model.training_features = {"mean": torch.cat([features for features, _, _ in slides(40, seed=0)]).mean(0)}
    return model.eval()


@cache
def trained(name: str) -> ClassifierEnsemble:
    model, data = new_model(name), slides(40, seed=0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        chosen = np.random.default_rng(step).choice(len(data), 8, replace=False)
        features, cells, planted = zip(*(data[i] for i in chosen), strict=True)
        lengths = torch.tensor(np.cumsum([0, *map(len, features)]), dtype=torch.int32)
        loss, weight = model.objective(
            model(torch.cat(features), torch.cat(cells), lengths), torch.tensor([int(one.any()) for one in planted])
        )
        optimiser.zero_grad()
        (loss / weight).backward()
        optimiser.step()
    return ClassifierEnsemble([model], [name])


def auroc(ensemble: ClassifierEnsemble, method: str, count: int = 3) -> float:
    """Mean over new slides of the AUROC of the scores for `tumour` against the planted tiles."""
    values = []
    for features, cells, planted in slides(2 * count, seed=1)[1::2]:
        scores = explain_ensemble(ensemble, features, cells, method)
        values.append(roc_auc_score(planted, scores.scores[:, -1]))
    return float(np.mean(values))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "at_least"),
    [
        ("longnet", "integrated-gradients", 0.9),
        ("abmil", "integrated-gradients", 0.9),
        ("transmil", "integrated-gradients", 0.9),
        ("mean", "integrated-gradients", 0.9),
        ("max", "integrated-gradients", 0.6),  # a maximum takes few tiles, the others have a score of 0
        # Where the planted tiles have long decided, the gradient is flat: of LongNet and TransMIL it says little any more.
        ("abmil", "gradient-x-input", 0.9),
        ("mean", "gradient-x-input", 0.9),
        ("max", "gradient-x-input", 0.6),
        ("longnet", "occlusion", 0.9),
        ("abmil", "occlusion", 0.9),
        ("transmil", "occlusion", 0.85),
        ("mean", "occlusion", 0.9),
        ("max", "occlusion", 0.85),
        ("abmil", "attention", 0.9),
    ],
)
def test_the_planted_region_is_found(name: str, method: str, at_least: float) -> None:
    assert auroc(trained(name), method) >= at_least


@pytest.mark.slow
def test_random_models_are_at_chance() -> None:
    values = [
        auroc(ClassifierEnsemble([new_model("longnet", seed)], ["random"]), "integrated-gradients", 1)
        for seed in range(10)
    ]
    assert 0.35 < np.mean(values) < 0.65, values
    assert np.max(values) < 0.95, "none is as sure as the trained one"


def test_the_scores_of_two_classes_mirror_each_other_and_add_up_to_the_log_odds() -> None:
    ensemble = trained("longnet")
    features, cells, _ = slides(2, seed=1)[1]
    found = explain_ensemble(ensemble, features, cells, "integrated-gradients")
    assert found.names == ("normal", "tumour")
    torch.testing.assert_close(found.scores[:, 0], -found.scores[:, 1])
    model = ensemble.classifiers[0]
    one_bag = torch.tensor([0, len(features)], dtype=torch.int32)
    baseline = model.training_features["mean"].expand_as(features)
    with torch.no_grad():
        change = float(model(features, cells, one_bag) - model(baseline, cells, one_bag))
    assert float(found.scores[:, 1].sum()) == pytest.approx(change, rel=0.02)
    assert found.completeness_error is not None
    assert found.change is not None
    assert float(found.change[1]) == pytest.approx(change, rel=1e-4)
    assert float(found.completeness_error[1]) < 0.02 * abs(change)


def test_an_ensemble_shows_the_mean_of_its_classifiers() -> None:
    features, cells, _ = slides(2, seed=1)[1]
    one, other = (ClassifierEnsemble([new_model("abmil", seed)], ["x"]) for seed in (1, 2))
    both = ClassifierEnsemble([one.classifiers[0], other.classifiers[0]], ["a", "b"])
    for method in ("gradient-x-input", "attention"):
        scores = [explain_ensemble(each, features, cells, method).scores for each in (one, other, both)]
        torch.testing.assert_close(scores[2], (scores[0] + scores[1]) / 2)


@pytest.mark.parametrize(
    ("task", "names"),
    [
        (Task("multiclass", ("label",), ("a", "b", "c")), ("a", "b", "c")),
        (Task("ordinal", ("label",), ("low", "middle", "high")), ("low", "middle", "high")),
        (Task("multilabel", ("x", "y"), ("x", "y")), ("x", "y")),
        (Task("regression", ("age",)), ("value",)),
        (Task("survival", ("time", "event"), times=(1.0, 2.0)), ("risk",)),
        (Task("survival", ("time", "event"), times=(1.0, 2.0), discrete_time=True), ("risk",)),
    ],
)
def test_every_task_is_explained_by_the_numbers_it_predicts(task: Task, names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    facts = TrainingFacts(task, DIM)
    model = SlideClassifier(
        facts, ClassifierOptions(AggregatorChoice("abmil", {"width": 16, "attention_width": 8}))
    ).eval()
    features, cells, _ = slides(1, seed=3)[0]
    found = explain_ensemble(ClassifierEnsemble([model], ["x"]), features, cells, "integrated-gradients")
    assert found.names == names
    assert found.scores.shape == (len(features), len(names))
    one_bag = torch.tensor([0, len(features)], dtype=torch.int32)
    with torch.no_grad():
        here = model.predict(model(features, cells, one_bag))
        there = model.predict(model(torch.zeros_like(features), cells, one_bag))  # no mean in the checkpoint
    if "probability" in here:
        change = torch.logit(here["probability"][0]) - torch.logit(there["probability"][0])
    else:
        change = next(here[name] - there[name] for name in ("value", "risk") if name in here)
    torch.testing.assert_close(found.change, change, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.scores.sum(0), change, rtol=0.05, atol=1e-3)


def test_a_classifier_of_slide_embeddings_has_no_tiles_to_explain() -> None:
    facts = TrainingFacts(Task("binary", ("y",), ("a", "b")), DIM)
    model = SlideClassifier(facts, ClassifierOptions("linear-probe")).eval()
    features, cells, _ = slides(1, seed=3)[0]
    with pytest.raises(LongslideError, match="x: linear-probe reads slide embeddings, which have no tiles to explain"):
        explain_ensemble(ClassifierEnsemble([model], ["x"]), features, cells, "occlusion")


def test_a_classifier_without_attention_weights_is_named_also_as_one_of_several() -> None:
    features, cells, _ = slides(1, seed=3)[0]
    ensemble = ClassifierEnsemble([new_model("abmil"), new_model("longnet")], ["x", "y"])
    with pytest.raises(LongslideError, match=r"y: longnet has no attention weights.*integrated-gradients.*occlusion$"):
        explain_ensemble(ensemble, features, cells, "attention")


@pytest.mark.parametrize("method", ["integrated-gradients", "gradient-x-input"])
def test_scores_are_the_same_when_layers_are_computed_again(method: str) -> None:
    features, cells, _ = slides(2, seed=1)[1]
    ensemble = ClassifierEnsemble([new_model("longnet")], ["x"])
    before = explain_ensemble(ensemble, features, cells, method).scores
    recompute_layers(ensemble)
    computed = []
    for layer in ensemble.classifiers[0].aggregator.encoder.layers:
        layer.register_forward_pre_hook(lambda *_: computed.append(1))
    after = explain_ensemble(ensemble, features, cells, method).scores
    torch.testing.assert_close(after, before)
    passes = 50 if method == "integrated-gradients" else 1
    assert len(computed) >= 2 * 2 * passes, "two layers, each twice in a pass"

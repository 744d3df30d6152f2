"""The classifier in training: what a batch is must not matter, checkpoints load without unpickling."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from longslide.errors import LongslideError
from longslide.models.aggregators.registry import AggregatorChoice
from longslide.models.classifier.checkpoint import load_classifier
from longslide.models.classifier.classifier import SlideClassifier, TrainingFacts
from longslide.models.classifier.optimisation import parameter_groups
from longslide.models.classifier.options import ClassifierOptions, OptimiserOptions
from longslide.task import Task
from torch import Tensor
from torch.utils.data import DataLoader

DIM = 6
BINARY = Task("binary", ("y",), ("no", "yes"))
SMALL: dict[str, dict[str, Any]] = {
    "longnet": {"layers": 2, "width": 8, "heads": 2, "ffn_width": 16, "dilated_ratios": (1, 2), "dropout": 0.0},
    "abmil": {"width": 8, "attention_width": 4, "dropout": 0.0},
    "transmil": {"width": 8, "heads": 2, "landmarks": 4},
}
OPTIMISER = OptimiserOptions(learning_rate=0.05, warmup=0.0, weight_decay=0.01)


def classifier(aggregator: Any = "abmil", task: Task = BINARY, **options: Any) -> SlideClassifier:
    torch.manual_seed(0)
    facts = TrainingFacts(task, DIM, preprocessing={"tile_encoder": "toy"})
    choice = AggregatorChoice(aggregator, SMALL.get(aggregator, {}))
    return SlideClassifier(facts, ClassifierOptions(choice, **({"optimiser": OPTIMISER} | options)))


def bag(i: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(i)
    n = int(torch.randint(1, 9, (), generator=generator))
    cells = torch.stack([torch.arange(n) % 3, torch.arange(n) // 3], 1)
    return {
        "tile_features": torch.randn(n, DIM, generator=generator),
        "grid_cells": cells,
        "target": torch.tensor(i % 2),
    }


def batch(*numbers: int) -> dict[str, Tensor]:
    bags = [bag(i) for i in numbers]
    packed = {name: torch.cat([one[name] for one in bags]) for name in ("tile_features", "grid_cells")}
    lengths = [0, *(len(one["grid_cells"]) for one in bags)]
    return packed | {
        "cu_seqlens": torch.tensor(lengths).cumsum(0).int(),
        "index": torch.tensor(numbers),
        "target": torch.stack([one["target"] for one in bags]),
    }


def trained(model: SlideClassifier, batches: list[dict[str, Tensor]], **options: Any) -> lightning.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = lightning.Trainer(accelerator="cpu", **({"max_epochs": 2} | quiet | options))
    trainer.fit(model, DataLoader(batches, batch_size=None))
    return trainer


@pytest.mark.parametrize("aggregator", ["abmil", "longnet"])
def test_a_packed_batch_has_the_loss_and_gradients_of_its_bags_one_at_a_time(aggregator: str) -> None:
    model = classifier(aggregator).double()
    whole = batch(0, 1, 2, 3)
    loss, weight = model.objective(model.outputs_of(whole), whole["target"])
    gradients = torch.autograd.grad(loss / weight, [p for p in model.parameters() if p.requires_grad])
    singles = [batch(i) for i in range(4)]
    losses = [model.objective(model.outputs_of(one), one["target"])[0] for one in singles]
    single = torch.stack(losses).sum() / 4
    torch.testing.assert_close(loss / weight, single)
    for one, other in zip(
        gradients, torch.autograd.grad(single, [p for p in model.parameters() if p.requires_grad]), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("split", [[(0, 1, 2), (3,)], [(0,), (1,), (2,), (3,)]], ids=str)
def test_accumulated_batches_of_different_sizes_train_as_one_batch(split: list[tuple[int, ...]]) -> None:
    one, several = classifier().double(), classifier().double()
    trained(one, [batch(0, 1, 2, 3)], gradient_clip_val=0.5)
    trained(several, [batch(*part) for part in split], accumulate_grad_batches=len(split), gradient_clip_val=0.5)
    for expected, parameter in zip(one.parameters(), several.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)


DISTRIBUTED = """
import sys
import torch
sys.path.insert(0, {folder!r})
from test_classifier import DataLoader, batch, classifier, lightning

if __name__ == "__main__":
    model = classifier("longnet").double()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
    )
    class Data(lightning.LightningDataModule):
        def train_dataloader(self):  # ranks with different numbers of bags
            batches = [[batch(0, 1, 2), batch(4)], [batch(3), batch(5, 6)]]
            return DataLoader(batches[self.trainer.global_rank], batch_size=None)
        def val_dataloader(self):  # the last bag comes twice
            return DataLoader([[batch(0, 1)], [batch(2, 3, 1)]][self.trainer.global_rank], batch_size=None)
    trainer.fit(model, datamodule=Data())
    if trainer.is_global_zero:
        metrics = {{name: float(value) for name, value in trainer.callback_metrics.items()}}
        torch.save({{"state": model.state_dict(), "metrics": metrics}}, {file!r})
"""


@pytest.mark.slow
def test_two_processes_train_as_one_process_with_all_their_bags(tmp_path: Path) -> None:
    script = tmp_path / "distributed.py"
    script.write_text(DISTRIBUTED.format(folder=str(Path(__file__).parent), file=f"{tmp_path}/model.pt"))
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    distributed = torch.load(tmp_path / "model.pt", weights_only=True)

    model = classifier("longnet").double()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=2, **quiet)
    loader = DataLoader([batch(0, 1, 2, 3), batch(4, 5, 6)], batch_size=None)
    trainer.fit(model, loader, DataLoader([batch(0, 1), batch(2, 3)], batch_size=None))
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(distributed["state"][name], tensor, msg=name)
    for name in ("train_loss", "val_loss", "val_metric"):
        assert distributed["metrics"][name] == pytest.approx(float(trainer.callback_metrics[name])), name


def test_layers_learn_slower_the_lower_they_are_and_biases_norms_and_tokens_do_not_decay() -> None:
    model = classifier("longnet")
    options = OptimiserOptions(layer_decay=0.5, weight_decay=0.1)
    rates = {}
    for group in parameter_groups(model, options, 1.0):
        for parameter in group["params"]:
            rates[parameter] = (group["lr"], group["weight_decay"])
    expected = {
        "aggregator.encoder.tile_projection.weight": (0.125, 0.1),
        "aggregator.encoder.tile_projection.bias": (0.125, 0.0),
        "aggregator.encoder.cls_token": (0.125, 0.0),
        "aggregator.encoder.layers.0.qkv.weight": (0.25, 0.1),
        "aggregator.encoder.layers.1.ffn_norm.weight": (0.5, 0.0),
        "aggregator.encoder.norm.weight": (1.0, 0.0),
        "head.weight": (1.0, 0.1),
        "head.bias": (1.0, 0.0),
    }
    named = dict(model.named_parameters())
    assert {name: rates[named[name]] for name in expected} == expected
    assert len(rates) == len(named)


def test_each_aggregator_trains_at_its_own_learning_rate_unless_another_is_asked_for() -> None:
    for aggregator, rate in {"abmil": 3e-3, "mean": 2e-3, "longnet": 4e-4, "linear-probe": 1e-2}.items():
        assert classifier(aggregator, optimiser=OptimiserOptions()).learning_rate == rate
        assert classifier(aggregator, optimiser=OptimiserOptions(learning_rate=5e-3)).learning_rate == 5e-3


def test_the_learning_rate_warms_up_and_ends_at_its_least() -> None:
    model = classifier(optimiser=OptimiserOptions(learning_rate=1.0, min_learning_rate=0.1, warmup=1 / 3))
    rates = []

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[-1]["lr"])

    trainer = trained(model, [batch(0, 1)] * 4, max_epochs=3, callbacks=[Watch()])
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)
    assert trainer.optimizers[0].param_groups[-1]["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize("aggregator", ["abmil", "longnet", "transmil", "mean", "max", "linear-probe"])
def test_a_checkpoint_gives_back_the_classifier(aggregator: str, tmp_path: Path) -> None:
    model = classifier(aggregator)
    model.temperature, model.thresholds = 1.7, {"yes": 0.3}
    model.use_training_features({"mean": torch.randn(DIM), "std": torch.rand(DIM) + 0.5, "dim": DIM})
    trained(model, [batch(0, 1)]).save_checkpoint(tmp_path / "model.ckpt")
    loaded = load_classifier(tmp_path / "model.ckpt")
    assert not loaded.training
    assert (loaded.task, loaded.temperature, loaded.thresholds) == (model.task, 1.7, {"yes": 0.3})
    probe = batch(2, 3, 4)
    predictions = loaded.predict(loaded.outputs_of(probe))
    torch.testing.assert_close(loaded.outputs_of(probe), model.eval().outputs_of(probe), rtol=0, atol=0)
    assert torch.equal(predictions["prediction"], (predictions["probability"][:, 1] >= 0.3).long())


class Opens:
    """What must not be run by loading a file."""

    def __reduce__(self) -> Any:
        return (open, ("/tmp/should-not-be-opened", "w"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path, content: path.unlink(), "no such checkpoint"),
        (lambda path, content: path.write_bytes(path.read_bytes()[:5000]), "not a readable checkpoint"),
        (lambda path, content: torch.save(content | {"x": Opens()}, path), "not a readable checkpoint"),
        (lambda path, content: torch.save({"model": {}}, path), "not a checkpoint of `longslide fit`"),
        (lambda path, content: content["longslide"].update(schema=99), "newer Longslide"),
        (lambda path, content: content["longslide"].update(kind="mae"), "not of a classifier"),
        (lambda path, content: content["longslide"]["aggregator"]["options"].update(width=9), "does not fit"),
    ],
    ids=["missing", "truncated", "pickled code", "foreign", "newer", "other kind", "other width"],
)
def test_what_is_no_classifier_is_refused_in_one_line(change: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    trained(classifier(), [batch(0, 1)]).save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    if (
        change(path, content) is None
        and path.is_file()
        and said in ("newer Longslide", "not of a classifier", "does not fit")
    ):
        torch.save(content, path)
    with pytest.raises(LongslideError, match=said) as caught:
        load_classifier(path)
    assert len(str(caught.value).splitlines()) == 1
    assert str(path) in str(caught.value)


def test_a_loss_that_is_not_finite_says_what_to_do() -> None:
    broken = batch(0, 1)
    broken["tile_features"][0, 0] = torch.nan
    with pytest.raises(LongslideError, match="the loss is nan at step 0: lower"):
        trained(classifier(), [broken])


def test_embeddings_of_another_length_are_refused() -> None:
    with pytest.raises(LongslideError, match="embeddings of length 6, not 7"):
        classifier()(torch.zeros(2, 7), torch.zeros(2, 2).long(), torch.tensor([0, 2]).int())


def test_one_validation_bag_is_enough() -> None:
    model = classifier()
    model.validation.update(model.outputs_of(batch(1)), batch(1)["target"], batch(1)["index"])
    outputs, target = model.validation.gathered()
    assert outputs.shape == (1, 1)
    assert target.shape == (1,)

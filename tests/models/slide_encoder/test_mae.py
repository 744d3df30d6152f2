"""Masked autoencoding: what is hidden cannot be seen, and what is learned is of use."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from longslide.errors import LongslideError
from longslide.models.aggregators.registry import AggregatorChoice
from longslide.models.classifier.classifier import SlideClassifier, TrainingFacts
from longslide.models.classifier.options import ClassifierOptions
from longslide.models.slide_encoder.mae import MaskedAutoencoder, UnlabelledFacts
from longslide.models.slide_encoder.mae_options import DecoderOptions, PretrainingOptions
from longslide.pipeline.cli import main
from longslide.task import Task
from training_cohort import write_cohort

DIM = 6
LONGNET = AggregatorChoice(
    "longnet", {"layers": 1, "width": 16, "heads": 2, "ffn_width": 16, "dilated_ratios": (1, 2), "dropout": 0.0}
)
DECODER = DecoderOptions(layers=1, width=8, heads=2, ffn_width=16)


def autoencoder(tile_encoder: str = "toy", **options) -> MaskedAutoencoder:
    torch.manual_seed(0)
    facts = UnlabelledFacts(DIM, {"tile_encoder": tile_encoder})
    return MaskedAutoencoder(facts, PretrainingOptions(LONGNET, decoder=DECODER, **options))


def slides(*lengths: int) -> dict[str, torch.Tensor]:
    cells = torch.cat([torch.stack([torch.arange(n) % 4, torch.arange(n) // 4], 1) for n in lengths])
    return {
        "tile_features": torch.randn(sum(lengths), DIM, generator=torch.Generator().manual_seed(1)),
        "grid_cells": cells,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "index": torch.arange(len(lengths)),
    }


def test_hidden_tiles_are_not_seen_and_the_others_are() -> None:
    model, batch = autoencoder().double(), slides(8, 5)
    hidden = torch.tensor([True, False] * 6 + [True])
    features = batch["tile_features"].double().requires_grad_()
    predicted = model(features, batch["grid_cells"], batch["cu_seqlens"], hidden)
    assert predicted.shape == features.shape
    (gradient,) = torch.autograd.grad(predicted[:8].square().sum(), features)
    assert not gradient[hidden].any()
    assert gradient[:8][~hidden[:8]].any(1).all()
    assert not gradient[8:].any(), "slides do not see one another"


def test_packed_slides_are_told_as_one_at_a_time() -> None:
    model, batch = autoencoder().double(), slides(8, 5)
    hidden = torch.tensor([True, False] * 6 + [True])
    features, cells = batch["tile_features"].double(), batch["grid_cells"]
    packed = model(features, cells, batch["cu_seqlens"], hidden)
    for a, b in ((0, 8), (8, 13)):
        one = model(features[a:b], cells[a:b], torch.tensor([0, b - a], dtype=torch.int32), hidden[a:b])
        torch.testing.assert_close(packed[a:b], one)


@pytest.mark.parametrize(("tiles", "expected"), [(1, 0), (2, 1), (4, 3), (100, 75)])
def test_of_each_slide_the_share_is_hidden_and_one_tile_at_least_is_left(tiles: int, expected: int) -> None:
    assert int(autoencoder()._hide(tiles, None).sum()) == expected


def test_a_batch_of_single_tiles_has_no_loss_and_no_weight() -> None:
    model = autoencoder()
    loss, weight = model.loss(slides(1, 1), [None, None])
    loss.backward()
    assert (float(loss.detach()), float(weight)) == (0.0, 0.0)


def test_flipped_and_shifted_slides_stay_row_by_row_and_keep_their_neighbours() -> None:
    model, batch = autoencoder(shift=50), slides(8, 6)
    for _ in range(8):
        moved = model._moved(batch)
        for a, b in ((0, 8), (8, 14)):
            column, row = moved["grid_cells"][a:b].unbind(1)
            assert ((row * 1000 + column).diff() > 0).all()
            was = {
                tuple(f.tolist()): c for f, c in zip(batch["tile_features"][a:b], batch["grid_cells"][a:b], strict=True)
            }
            before = torch.stack([was[tuple(f.tolist())] for f in moved["tile_features"][a:b]])
            shift = moved["grid_cells"][a:b] - before
            assert shift[:, 1].unique().numel() == 1
            assert (column + before[:, 0]).unique().numel() == 1 or shift[:, 0].unique().numel() == 1


def pretrain(tmp_path: Path, *words: str) -> Path:
    if not (tmp_path / "cohort").is_dir():
        write_cohort(tmp_path / "cohort", 24)
    small = [
        "--model.encoder",
        "{class_path: longnet, init_args: {layers: 1, width: 16, heads: 2, ffn_width: 16}}",
        "--model.decoder",
        "{layers: 1, width: 16, heads: 2}",
    ]
    options = ["--data.features", f"{tmp_path}/cohort/features", "--data.workers", "0", "--run", f"{tmp_path}/mae"]
    options += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    assert main(["pretrain", "--config", "mae", *small, *options, *words]) == 0
    return tmp_path / "mae"


def test_pretraining_lowers_the_loss_and_a_classifier_begins_with_its_encoder(tmp_path: Path) -> None:
    words = ["--trainer.max_epochs", "8", "--data.bags_per_step", "4", "--model.optimiser.learning_rate", "0.003"]
    run = pretrain(tmp_path, *words)
    history = pd.read_csv(run / "history.csv")
    assert history["val_loss"].iloc[-1] < history["val_loss"].iloc[0]

    content = torch.load(run / "best.ckpt", weights_only=True)
    facts = TrainingFacts(Task("binary", ("y",), ("no", "yes")), DIM, preprocessing={"tile_encoder": "toy"})
    options = ClassifierOptions(AggregatorChoice("longnet", {"pool": "cls"}), checkpoint=str(run / "best.ckpt"))
    classifier = SlideClassifier(facts, options)
    encoder = classifier.aggregator.encoder
    assert encoder.spec.width == 16, "the size is the checkpoint's"
    assert encoder.pool == "cls"
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, content["state_dict"][f"encoder.{name}"]), name

    content["longslide"]["schema"] = 99
    torch.save(content, tmp_path / "newer.ckpt")
    with pytest.raises(LongslideError, match="newer Longslide"):
        SlideClassifier(facts, ClassifierOptions(checkpoint=str(tmp_path / "newer.ckpt")))

    written = (run / "best.ckpt").stat().st_mtime_ns
    pretrain(tmp_path, *words)
    assert (run / "best.ckpt").stat().st_mtime_ns == written, "the same command again: it has finished already"

    other = TrainingFacts(facts.task, DIM, preprocessing={"tile_encoder": "uni"})
    with pytest.raises(LongslideError, match="trained on features of tile encoder 'toy', but these are of 'uni'"):
        SlideClassifier(other, ClassifierOptions(checkpoint=str(run / "best.ckpt")))

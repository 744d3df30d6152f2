"""The data module: what it knows of the training part, what it shows to Lightning, what it refuses before training."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from longslide.data.cohort.augmentation import Augmentation
from longslide.data.cohort.datamodule import BagDataModule
from longslide.data.cohort.options import DataOptions
from longslide.data.features.feature_file import read_features
from longslide.data.features.statistics import distance
from longslide.errors import LongslideError
from longslide.pipeline.parser import OptionParser

from ..refusals import refused

Write = Callable[..., Any]


def data(table: Path, features: Path, **options: Any) -> BagDataModule:
    return BagDataModule(DataOptions(features, table, **({"task": "binary", "workers": 0} | options)))


def refusal(module: BagDataModule) -> str:
    return refused(module.setup, "fit")


@pytest.fixture
def two_classes(cohort: Write) -> tuple[Path, Path]:
    return cohort(20, label=lambda patient: "tumour" if patient % 4 == 0 else "normal")


def test_it_shows_task_splits_and_loaders(two_classes: tuple[Path, Path]) -> None:
    module = data(*two_classes, max_tokens=60)
    module.setup("fit")
    assert module.task.classes == ("normal", "tumour")
    assert module.feature_dim == 6
    assert module.preprocessing == {
        "tile_encoder": "uni2-h", "tile_weights": "sha256:1", "tile_mpp": 0.5, "tile_px": 256, "overlap": 0,
        "min_tissue": 0.1,
    }  # fmt: skip
    assert list(module.splits.columns) == ["slide_id", "patient_id", "fold_0"]
    seen: set[str] = set()
    for part, loader in zip(
        ("train", "val", "test"),
        (module.train_dataloader(), module.val_dataloader(), module.test_dataloader()),
        strict=True,
    ):
        batches = list(loader)
        assert len(batches) == len(loader)
        slides = [module.bags(part)[i].slide_ids[0] for batch in batches for i in batch["index"]]
        assert set(slides) == set(module.splits["slide_id"][module.splits["fold_0"] == part])
        if part != "train":
            assert [i for batch in batches for i in batch["index"]] == list(range(len(slides)))
        assert all(len(batch["tile_features"]) <= 60 for batch in batches)
        assert not seen & set(slides)
        seen |= set(slides)
    assert len(seen) == 40


def test_weights_and_statistics_are_those_of_the_training_part(two_classes: tuple[Path, Path]) -> None:
    module = data(*two_classes)
    training = [read_features(bag.files[0]).features.astype(np.float64) for bag in module.bags("train")]
    tiles = np.concatenate(training)
    statistics = module.training_features.to_dict()
    np.testing.assert_allclose(statistics["mean"], tiles.mean(0), atol=1e-5)
    np.testing.assert_allclose(statistics["std"], tiles.std(0), rtol=1e-4)
    assert statistics["slide_mpp"] == [0.25, 0.25]
    assert statistics["dim"] == 6
    distances = [distance(slide.mean(0), tiles.mean(0), tiles.std(0)) for slide in training]
    assert statistics["distance_quantiles"]["1"] == pytest.approx(max(distances), rel=1e-3)
    assert statistics["distance_quantiles"]["0.5"] == pytest.approx(np.median(distances), rel=1e-3)
    weights = module.class_weights
    assert weights is not None
    targets = module.training_targets
    np.testing.assert_allclose(weights.numpy() * np.bincount(targets), [len(targets) / 2] * 2, rtol=1e-6)


def test_classes_that_are_drawn_equally_often_are_not_weighted_once_more(cohort: Write) -> None:
    table, features = cohort(24, a=lambda p: int(p % 4 == 0), b=lambda p: p % 2)
    module = data(table, features, task="binary", label="a", balance=True)
    np.testing.assert_allclose(module.class_weights, [1, 1], rtol=1e-6)
    module = data(table, features, task="multilabel", label=["a", "b"], balance=True)
    # Drawn are, each in a third: neither, b alone, a alone.
    np.testing.assert_allclose(module.class_weights, [2, 2], rtol=1e-6)


def test_weights_of_several_labels_count_what_is_known(cohort: Write) -> None:
    table, features = cohort(24, a=lambda p: p % 3 == 0 if p != 1 else None, b=lambda p: p % 2)
    module = data(table, features, task="multilabel", label=["a", "b"])
    targets = module.training_targets
    weights = module.class_weights
    assert weights is not None
    np.testing.assert_allclose(weights, np.nansum(targets == 0, 0) / np.nansum(targets == 1, 0), rtol=1e-6)
    assert data(table, features, task="regression", label="b").class_weights is None


def test_a_bag_a_patient(two_classes: tuple[Path, Path]) -> None:
    module = data(*two_classes, bags="patient")
    assert all(len(bag.slide_ids) == 2 for bag in module.bags("train"))
    assert sum(len(module.bags(part)) for part in ("train", "val", "test")) == 20
    batch = next(iter(module.test_dataloader()))
    assert batch["cu_seqlens"][1] == sum(module.bags("test")[0].tiles)


def test_folds_share_everything_but_the_split(two_classes: tuple[Path, Path], tmp_path: Path) -> None:
    module = data(*two_classes, folds=5, splits=tmp_path / "splits.csv")
    module.setup("fit")
    others = [module.with_fold(fold) for fold in range(5)]
    assert (tmp_path / "splits.csv").is_file()
    for fold, other in enumerate(others):
        assert other.cache is module.cache
        assert other.survey is module.survey
        assert {bag.slide_ids[0] for bag in other.bags("test")} == set(
            module.splits["slide_id"][module.splits[f"fold_{fold}"] == "test"]
        )
    assert len({float(other.training_features.mean[0]) for other in others}) == 5
    again = data(*two_classes, splits=tmp_path / "splits.csv", fold=3, seed=99)
    assert [bag.slide_ids for bag in again.bags("test")] == [bag.slide_ids for bag in others[3].bags("test")]
    assert "the splits have 5 folds" in refusal(data(*two_classes, splits=tmp_path / "splits.csv", fold=5))


def test_the_splits_of_the_table_come_first(cohort: Write) -> None:
    table, features = cohort(12, label=lambda p: p % 2, fold_0=lambda p: ["train", "train", "val", "test"][p // 3])
    module = data(table, features)
    assert [len(module.bags(part)) for part in ("train", "val", "test")] == [12, 6, 6]
    assert any("splits are those of" in note for note in module.notes)


def test_a_whole_cohort_can_be_tested_or_trained_on(cohort: Write) -> None:
    table, features = cohort(3, label=lambda p: "a")
    module = data(table, features, classes=["a", "b"], splits="test")
    module.setup("test")
    assert len(module.bags("test")) == 6
    assert any("has no slide of class b: metrics that need one are not defined" in note for note in module.notes)
    assert module.val_dataloader() == []
    unlabelled = BagDataModule(DataOptions(features, splits="train", workers=0))
    batch = next(iter(unlabelled.train_dataloader()))
    assert "target" not in batch
    assert len(unlabelled.bags("train")) == 6
    with pytest.raises(LongslideError, match="no labels: give"):
        _ = unlabelled.task


def test_truncation_is_counted_and_evaluation_is_whole(two_classes: tuple[Path, Path]) -> None:
    module = data(*two_classes, max_tiles=10)
    module.setup("fit")
    long = [sum(bag.tiles) for bag in module.bags("train") if sum(bag.tiles) > 10]
    assert module.truncated == {"bags": len(long), "tiles": sum(long) - 10 * len(long)}
    assert any(f"{len(long)} training bags have more than 10 tiles" in note for note in module.notes)
    for batch in module.train_dataloader():
        assert batch["cu_seqlens"].diff().max() <= 10
    whole = torch.cat([batch["cu_seqlens"].diff() for batch in module.test_dataloader()])
    assert whole.tolist() == [sum(bag.tiles) for bag in module.bags("test")]
    assert data(*two_classes).truncated == {"bags": 0, "tiles": 0}


def test_counts_are_those_of_the_parts(two_classes: tuple[Path, Path]) -> None:
    counts = data(*two_classes).counts()
    assert [row["part"] for row in counts] == ["train", "val", "test"]
    assert sum(row["slides"] for row in counts) == 40
    assert sum(row["patients"] for row in counts) == 20
    assert sum(row["classes"]["tumour"] for row in counts) == 10
    assert all(sum(row["classes"].values()) == row["slides"] for row in counts)


def test_parts_that_lack_a_class_are_said(cohort: Write) -> None:
    table, features = cohort(8, label=lambda p: p % 2, split=lambda p: "val" if p == 1 else "train")
    notes = data(table, features).notes
    assert "the val part of fold 0 has no slide of class 0" in notes
    assert "fold 0 has no test part" in notes


def test_slide_embeddings_are_bags_of_one(cohort: Write, slide: Write) -> None:
    table, features = cohort(10, label=lambda p: p % 2)
    for path in list(features.glob("*.h5")):
        more = {"slide_embedding": np.full(4, 2.0, np.float32), "slide_encoder": "gigapath", "pool": "mean"}
        slide(path.stem, **more)
    module = data(table, features, slide_embeddings=True)
    assert module.feature_dim == 4
    assert module.preprocessing["slide_encoder"] == "gigapath"
    batch = next(iter(module.val_dataloader()))
    assert batch["tile_features"].shape == (len(batch["index"]), 4)
    torch.testing.assert_close(batch["slide_embedding"], batch["tile_features"])


@pytest.mark.parametrize("balance", [False, True])
def test_processes_and_memory_change_nothing(two_classes: tuple[Path, Path], balance: bool) -> None:
    options: dict[str, Any] = {
        "augment": Augmentation(tile_dropout=0.2, flip=True, noise=0.1), "max_tokens": 50, "balance": balance,
    }  # fmt: skip

    def epoch(**more: Any) -> list[dict[str, torch.Tensor]]:
        loader = data(*two_classes, **options, **more).train_dataloader()
        loader.sampler.set_epoch(2)
        return list(loader)

    one, other = epoch(workers=0, cache_gb=0), epoch(workers=2)
    assert len(one) == len(other) > 3
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_little_memory_is_for_the_training_part(two_classes: tuple[Path, Path]) -> None:
    whole = data(*two_classes)
    wanted = sum(sum(bag.tiles) for bag in whole.bags("train")) * (6 * 2 + 16)
    module = data(*two_classes, cache_gb=wanted / 1e9)
    module.setup("fit")
    for part in ("val", "test"):
        for bag in module.bags(part):
            bag.files[0].unlink()
    assert len(list(module.train_dataloader())) > 0


def test_memory_is_filled_once_and_files_are_not_read_again(two_classes: tuple[Path, Path]) -> None:
    module = data(*two_classes, workers=2)
    module.setup("fit")
    for path in two_classes[1].glob("*.h5"):
        path.unlink()
    assert len(list(module.train_dataloader())) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.full((9, 6), np.nan, np.float32), "tiles": 9}, "9 tiles have NaN or infinite features"),
        (
            {"features": np.where(np.eye(9, 6) == 1, np.float32(np.inf), np.float32(0)), "tiles": 9},
            "tiles have NaN or infinite features",
        ),
        ({"tiles": 0}, "no tiles, an empty bag"),
        ({"dim": 7}, "features of mixed width"),
        ({"encoder": "other"}, "tile_encoder is uni2-h in"),
        ({"weights": "sha256:2"}, "tile_weights is sha256:1 in"),
        ({"tile_mpp": 0.25}, "mpp is 0.5 in"),
        ({"tile_px": 224}, "tile_px is 256 in"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_bad_feature_file_is_refused_by_name(
    change: dict[str, Any], message: str, two_classes: tuple[Path, Path], slide: Write
) -> None:
    slide("p7-1", **change)
    said = refusal(data(*two_classes))
    assert message in said
    assert "p7-1.h5" in said


def test_weights_of_one_digest_at_two_paths_are_the_same(two_classes: tuple[Path, Path], slide: Write) -> None:
    for number in range(10):
        slide(f"p{number}-0", weights=f"/home/user{number % 2}/uni.safetensors sha256:0123456789abcdef")
        slide(f"p{number + 10}-0", weights="hf:org/uni@1 sha256:0123456789abcdef")
    for path in two_classes[1].glob("*-1.h5"):
        path.unlink()
    module = data(*two_classes)
    assert module.preprocessing["tile_weights"].endswith("sha256:0123456789abcdef")


def test_a_truncated_feature_file_is_refused_by_name(two_classes: tuple[Path, Path]) -> None:
    path = two_classes[1] / "p3-0.h5"
    path.write_bytes(path.read_bytes()[:300])
    assert "p3-0.h5: not a readable HDF5 file" in refusal(data(*two_classes))


def test_what_files_do_not_say_and_crowded_cells_are_said(two_classes: tuple[Path, Path], slide: Write) -> None:
    slide("p1-0", encoder=None, seed=101)
    slide("p2-0", seed=102, coords=np.zeros((12, 2), np.int64))
    notes = "\n".join(data(*two_classes).notes)
    assert "1 feature file does not say tile_encoder; taken for uni2-h: p1-0.h5" in notes
    assert "1 feature file has two tiles in one grid cell, which slide encoders refuse: p2-0.h5" in notes


def test_bad_labels_and_splits_are_refused_before_features_are_read(cohort: Write, tmp_path: Path) -> None:
    table, features = cohort(12, label=lambda p: p % 2, rare=lambda p: int(p < 2), mixed=lambda p: p % 3)
    (features / "p0-0.h5").write_bytes(b"broken")
    assert "class '1' has 2 patients, fewer than" in refusal(data(table, features, label="rare"))
    assert "a binary task has two" in refusal(data(table, features, label="mixed"))
    assert "no column 'labels'; did you mean 'label'" in refusal(data(table, features, label="labels"))
    splits = tmp_path / "splits.csv"
    lines = [f"p{p}-{s},{'val' if (p, s) == (5, 1) else 'train'}" for p in range(12) for s in range(2)]
    splits.write_text("\n".join(["slide_id,fold_0", *lines]))
    assert "patient p5 is in train and val" in refusal(data(table, features, splits=splits))


def test_patients_with_different_labels_cannot_be_one_bag(slide: Write, rows: Write, tmp_path: Path) -> None:
    table = []
    for patient in range(12):
        for number in range(2):
            slide(f"p{patient}-{number}", seed=2 * patient + number)
            table.append(
                {
                    "slide_id": f"p{patient}-{number}",
                    "patient_id": patient,
                    "label": (patient + (patient == 3) * number) % 2,
                }
            )
    module = data(rows(table), tmp_path / "features", bags="patient")
    assert "1 patient has slides with different labels (3)" in refusal(module)
    notes = data(rows(table), tmp_path / "features").notes
    assert any("different labels (3): where they are tested, metrics are of slides" in note for note in notes)


def test_numbers_out_of_range_are_refused() -> None:
    for name, value in (("max_tokens", 0), ("max_tiles", 0), ("fold", -1), ("cache_gb", -1.0), ("workers", -1)):
        with pytest.raises(LongslideError, match=f"--data.{name.replace('_', '-')}"):
            DataOptions("x", **{name: value})


class Mean(LightningModule):
    """Logistic regression on the mean tile; writes down what it is given, and its losses."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.head = torch.nn.Linear(6, 2)
        self.folder = folder

    def write(self, name: str, *words: Any) -> None:
        with (self.folder / f"{name}-{self.global_rank}.txt").open("a") as file:
            print(*words, file=file)

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        ends = batch["cu_seqlens"].tolist()
        bags = torch.stack([batch["tile_features"][a:b].float().mean(0) for a, b in pairwise(ends)])
        loss = torch.nn.functional.cross_entropy(self.head(bags), batch["target"])
        self.write("loss", self.current_epoch, repr(loss.item()))
        self.write("train", *batch["index"].tolist())
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        self.write("val", *batch["index"].tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def train(folder: Path, module: BagDataModule, checkpoint: Path | None = None, **options: Any) -> None:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    quiet: dict[str, Any] = {
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu",
        "num_sanity_val_steps": 0,
    }  # fmt: skip
    Trainer(**quiet, **options).fit(Mean(folder), datamodule=module, ckpt_path=checkpoint)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_stops_within_an_epoch_and_goes_on_with_the_same_losses(
    two_classes: tuple[Path, Path], tmp_path: Path
) -> None:
    def fresh() -> BagDataModule:
        return data(*two_classes, bags_per_step=3, workers=1, augment=Augmentation(tile_dropout=0.3, flip=True))

    train(tmp_path / "whole", fresh(), max_epochs=3, enable_checkpointing=False)
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_last=True)
    train(tmp_path / "cut", fresh(), max_steps=13, callbacks=[saving])
    train(tmp_path / "cut", fresh(), tmp_path / "saved" / "last.ckpt", max_epochs=3, enable_checkpointing=False)
    whole = (tmp_path / "whole" / "loss-0.txt").read_text().splitlines()
    assert 13 % (len(whole) // 3), "the cut is within an epoch"
    assert (tmp_path / "cut" / "loss-0.txt").read_text().splitlines() == whole


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_may_look_at_a_few_batches_only(two_classes: tuple[Path, Path], tmp_path: Path) -> None:
    module = data(*two_classes, bags_per_step=3, workers=1)
    few: dict[str, Any] = {"limit_train_batches": 2, "limit_val_batches": 1, "max_epochs": 2}
    train(tmp_path / "limited", module, enable_checkpointing=False, **few)
    taken = (tmp_path / "limited" / "train-0.txt").read_text().splitlines()
    assert len(taken) == 4
    assert len(set(taken)) == 4
    train(tmp_path / "overfit", data(*two_classes), enable_checkpointing=False, overfit_batches=2, max_epochs=2)
    taken = (tmp_path / "overfit" / "train-0.txt").read_text().splitlines()
    assert taken[:2] == taken[2:]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_processes_take_different_bags_and_validate_them_all(
    two_classes: tuple[Path, Path], tmp_path: Path
) -> None:
    module = data(*two_classes, bags_per_step=3)
    ddp = {"devices": 2, "strategy": "ddp_fork", "max_epochs": 1, "enable_checkpointing": False}
    train(tmp_path / "run", module, **ddp)
    for part in ("train", "val"):
        ranks = [(tmp_path / "run" / f"{part}-{rank}.txt").read_text().split() for rank in (0, 1)]
        assert sorted(map(int, ranks[0] + ranks[1])) == list(range(len(module.bags(part))))
        assert all(ranks)


def test_every_option_is_one_of_the_command_line(cohort: Write, tmp_path: Path) -> None:
    table, features = cohort(12, grade=lambda p: p % 3)
    (tmp_path / "c.yaml").write_text("data:\n  classes: [2, 1, 0]\n  augment:\n    flip: true\n    noise: 0.1\n")
    parser = OptionParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(DataOptions, "data")
    words = [f"--config={tmp_path / 'c.yaml'}", f"--data.table={table}", f"--data.features={features}"]
    words += ["--data.label=grade", "--data.task=ordinal", "--data.augment.crop=0.875", "--data.folds=3"]
    words += ["--data.splits=test"]
    module = BagDataModule(parser.instantiate(parser.parse_args(words)).data)
    assert module.task.classes == ("2", "1", "0")
    assert module.options.augment == Augmentation(flip=True, crop=0.875, noise=0.1)
    assert module.options.label == "grade"
    assert len(module.bags("test")) == 24


def test_the_times_of_survival_are_those_of_the_training_part(slide: Write, rows: Write, tmp_path: Path) -> None:
    for number in range(12):
        slide(f"s{number}", tiles=3, seed=number)

    def module(test_time: float) -> BagDataModule:
        table = [
            {"slide_id": f"s{n}", "time": 10 * (n + 1) if n < 6 else test_time + n, "event": 1, "fold_0": part}
            for n, part in enumerate(6 * ["train"] + 3 * ["val"] + 3 * ["test"])
        ]
        options = {"task": "survival", "label": ["time", "event"]}
        return data(rows(table, f"{test_time}.csv"), tmp_path / "features", **options)

    assert module(1.0).task.times == module(5000.0).task.times == (22, 35, 48)

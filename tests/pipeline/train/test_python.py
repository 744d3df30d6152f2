"""Training from Python: functions with results, paths as text or Path."""

import json
from pathlib import Path

import longslide
import pytest
from training_cohort import write_cohort

CPU = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False}


@pytest.mark.slow
def test_pretrain_fit_test_compare_and_explain_hand_over_their_results(tmp_path: Path) -> None:
    write_cohort(tmp_path / "cohort", 40)
    features, table = str(tmp_path / "cohort" / "features"), str(tmp_path / "cohort" / "cohort.csv")
    small = longslide.AggregatorChoice("longnet", {"layers": 1, "width": 16, "heads": 2, "ffn_width": 16})
    pretrained = longslide.pretrain(
        longslide.DataOptions(features, workers=0),
        longslide.PretrainingOptions(small),
        run=str(tmp_path / "mae"),
        trainer=CPU,
    )
    assert pretrained.checkpoint.is_file()

    data = longslide.DataOptions(features, table, "binary", workers=0)
    model = longslide.ClassifierOptions(checkpoint=str(pretrained.checkpoint))
    run = longslide.fit(data, model, run=str(tmp_path / "fit"), trainer=CPU, monitor="val_loss")
    assert run.folder == tmp_path / "fit"
    assert run.checkpoints == [tmp_path / "fit" / "best.ckpt"]
    assert "auroc" in set(run.metrics["metric"])
    assert repr(run).startswith("Run(")
    # The model that was built: of the checkpoint's size, and not of the options' (4 layers of width 256).
    built = run.facts["aggregator"]
    size = {"layers": 1, "width": 16, "heads": 2, "ffn_width": 16}
    assert built["options"].items() >= size.items()
    assert built["architecture"].items() >= size.items()
    assert str(pretrained.checkpoint) in built["architecture"]["weights"]
    trained = longslide.load_classifier(run.checkpoints[0])
    assert built["parameters"] == sum(parameter.numel() for parameter in trained.parameters())
    page = (run.folder / "report.html").read_text()
    assert f"{built['parameters']:,} parameters" in page
    assert "layers 1, width 16, heads 2" in page
    assert "width 256" not in page.partition("config.yaml")[0]
    assert (
        json.loads((pretrained.folder / "run.json").read_text())["aggregator"]["architecture"].items() >= size.items()
    )

    mean = longslide.ClassifierOptions("mean")
    folds = longslide.crossval(data, mean, folds=2, run=str(tmp_path / "cv"), trainer=CPU, monitor="val_loss")
    assert [path.parent.name for path in folds.checkpoints] == ["fold_0", "fold_1"]

    write_cohort(tmp_path / "others", 12, seed=5, site="x-")
    tested = longslide.test(
        str(run.checkpoints[0]),
        longslide.DataOptions(f"{tmp_path}/others/features", f"{tmp_path}/others/cohort.csv", workers=0),
        run=str(tmp_path / "test"),
        accelerator="cpu",
    )
    assert set(tested.predictions["part"]) == {"test"}
    assert tested.checkpoints == []
    assert tested.facts["aggregator"] == built

    compared = longslide.compare(
        [str(run.folder), str(folds.folder)], output=str(tmp_path / "compared"), common_patients=True
    )
    assert {one.name for one in compared} == {"fit", "cv"}
    found = longslide.explain(features + "/s0.h5", str(run.checkpoints[0]), device="cpu")
    assert len(found.scores) == len(found.coords)


def test_an_option_that_the_command_sets_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(longslide.LongslideError, match=r"crossval sets --data\.fold itself"):
        longslide.crossval(longslide.DataOptions(tmp_path, fold=1))

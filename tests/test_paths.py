"""Wherever a path goes, it may be text or a Path."""

import inspect
import typing
from pathlib import Path
from types import UnionType
from typing import Any

import longslide
import numpy as np
import pytest
from classifier_files import ENCODER
from training_cohort import write_cohort

# Results, which users read and do not make; and the base of readers, which the package calls with a Path.
MADE_BY_THE_PACKAGE = {
    "AttentionMap",
    "DiskCheck",
    "ExportedEncoder",
    "ExportedFeatures",
    "LabelCheck",
    "PretrainedEncoder",
    "ReportResult",
    "Run",
    "SimilarTile",
    "SlideReader",
    "SlideResult",
}
CPU = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False}


def kinds(annotation: Any) -> set[Any]:
    """The types of an annotation at one level: of `list[str | Path] | None` these are `{list[str | Path], None}`."""
    if typing.get_origin(annotation) in (typing.Union, UnionType):
        return set().union(*(kinds(part) for part in typing.get_args(annotation)))
    return set() if isinstance(annotation, list) else {annotation}  # the arguments of a Callable


def takes_paths_alone(annotation: Any) -> bool:
    """Whether somewhere in an annotation stands `Path` without `str` beside it."""
    parts = kinds(annotation)
    if Path in parts and str not in parts:
        return True
    return any(takes_paths_alone(inner) for part in parts for inner in typing.get_args(part))


@pytest.mark.parametrize("name", sorted(set(longslide.__all__) - MADE_BY_THE_PACKAGE))
def test_no_public_signature_takes_a_path_alone(name: str) -> None:
    public = getattr(longslide, name)
    if not callable(public) or (inspect.isclass(public) and issubclass(public, Exception)):
        return
    methods = [public.__init__] if inspect.isclass(public) else [public]
    if inspect.isclass(public):
        methods += [m for n, m in inspect.getmembers(public, inspect.isroutine) if not n.startswith("_")]
        methods = [method for method in methods if getattr(method, "__module__", "").startswith("longslide")]
    for method in methods:
        for parameter, annotation in inspect.get_annotations(method, eval_str=False).items():
            if parameter == "return":
                continue
            if isinstance(annotation, str):  # names that are imported for types alone
                assert "Path" not in annotation.replace("str | Path", ""), (method, parameter)
            else:
                assert not takes_paths_alone(annotation), (method, parameter)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [str, Path])
def test_every_public_function_takes_text_and_path(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(ENCODER)
    slide, tiny = kind("a.tif"), kind("tiny.yaml")
    longslide.write_synthetic_slide(slide, size=(1024, 768), seed=1)
    with longslide.open_slide(slide) as opened:
        assert opened.path == Path("a.tif")
    assert len(longslide.TileDataset(slide, px=64)) > 0
    assert longslide.create_tile_encoder(tiny, checkpoint="random").spec.name == "tiny"

    encode = {"tile_encoder": tiny, "tile_checkpoint": "random", "device": "cpu", "threads": 1}
    assert all(check.ok for check in longslide.doctor(slide, **encode, output=kind(".")))
    [embedded] = longslide.embed(slide, kind("features"), **encode)
    assert embedded.status == "done"
    features = longslide.read_features(kind("features/a.h5"))
    longslide.write_features(kind("copy.h5"), features)
    np.testing.assert_array_equal(longslide.read_features(kind("copy.h5")).features, features.features)

    write_cohort(tmp_path / "c", 40)
    write_cohort(tmp_path / "others", 12, seed=5, site="x-")
    small = longslide.AggregatorChoice("longnet", {"layers": 1, "width": 16, "heads": 2, "ffn_width": 16})
    data = longslide.DataOptions(kind("c/features"), kind("c/cohort.csv"), "binary", splits=kind("s.csv"), workers=0)
    unlabelled = longslide.DataOptions(kind("c/features"), workers=0)
    pretraining = longslide.PretrainingOptions(small)
    mae = longslide.pretrain(unlabelled, pretraining, run=kind("mae"), trainer=CPU)
    longslide.PretrainingOptions(small, checkpoint=kind(mae.checkpoint))
    model = longslide.ClassifierOptions(checkpoint=kind(mae.checkpoint))
    run = longslide.fit(data, model, run=kind("run"), trainer=CPU, monitor="val_loss")
    assert Path("s.csv").is_file()
    best = kind(run.checkpoints[0])
    assert longslide.load_classifier(best).aggregator_name == "longnet"
    unsplit = longslide.DataOptions(kind("c/features"), kind("c/cohort.csv"), "binary", workers=0)
    mean = longslide.ClassifierOptions("mean")
    longslide.crossval(unsplit, mean, folds=2, run=kind("cv"), trainer=CPU, monitor="val_loss")
    others = longslide.DataOptions(kind("others/features"), kind("others/cohort.csv"), workers=0)
    tested = longslide.test(best, others, run=kind("tested"), accelerator="cpu")
    again = longslide.read_run(kind(tested.folder))
    longslide.evaluate(again.predictions, again.task)
    longslide.compare([kind("run"), kind("cv")], output=kind("compared"), common_patients=True)
    [exported] = longslide.export(best, kind("longnet.pth"))
    encoder = longslide.create_slide_encoder(kind(exported.spec), checkpoint=kind(exported.weights))
    assert encoder.spec.width == 16
    assert len(longslide.explain(kind("c/features/s0.h5"), best, device="cpu").scores)
    assert longslide.attention_map(kind("map.png")).output == Path("map.png")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [str, Path])
def test_predict_and_report_take_text_and_path(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from classifier_files import write_classifier

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(ENCODER)
    longslide.write_synthetic_slide(kind("a.tif"), size=(1024, 768), seed=1)
    encode = {"tile_encoder": kind("tiny.yaml"), "tile_checkpoint": "random", "device": "cpu", "threads": 1}
    longslide.embed(kind("a.tif"), kind("features"), **encode)
    write_classifier(tmp_path / "best.ckpt", tmp_path / "features")
    [predicted] = longslide.predict(
        kind("a.tif"), kind("best.ckpt"), output=kind("x"), features=kind("features"), explain="attention", device="cpu"
    )
    assert predicted.status == "done"
    assert Path("x/predictions.csv").is_file()
    [page] = longslide.report(kind("x"))
    assert page.path == Path("x/report.html")

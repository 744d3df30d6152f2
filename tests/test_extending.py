"""The examples of docs/extending.md, plugged in from outside the package as they stand there."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import h5py
import numpy as np
import openslide
import pytest
import torch
import yaml
from classifier_files import write_classifier
from commands import longslide
from longslide import (
    AggregatorChoice,
    LongslideError,
    embed,
    export,
    open_slide,
    read_features,
    write_features,
    write_synthetic_slide,
)
from longslide.models.classifier.classifier import SlideClassifier, TrainingFacts
from longslide.models.classifier.options import ClassifierOptions
from longslide.models.slide_encoder.base import load_slide_encoder
from longslide.models.slide_encoder.mae import MaskedAutoencoder, UnlabelledFacts
from longslide.models.slide_encoder.mae_options import PretrainingOptions
from longslide.pipeline.cli import main
from longslide.task import Task

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "extending.md").read_text(encoding="utf-8")
PAGE_OF_ENCODERS = (DOCS / "encoders.md").read_text(encoding="utf-8")

TINY = re.search(r"```yaml\n(name: my-encoder\n.*?)```", PAGE_OF_ENCODERS, re.DOTALL)[1]
ENCODER = ("vit_tiny_patch16_224", "random")


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder outside the package that holds the page's modules, and is on the path."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL):
        (folder / name).write_text(code)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slides").mkdir()
    write_synthetic_slide(tmp_path / "slides" / "a.svs", size=(1024, 768), mpp=0.5)
    yield folder
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


def command_with(option: str) -> list[str]:
    """The words of the page's command with this option, with a small encoder of random weights."""
    lines = PAGE.replace("\\\n", " ").splitlines()
    line = next(line for line in lines if line.startswith("longslide ") and option in line)
    here = {"external.csv": "cohort.csv", "external_features/": "features/"}
    words = [here.get(word, word) for word in shlex.split(line)[1:]]
    if "--output" in words:
        words[words.index("--output") + 1] = "features/"
    if "kaiko-vits8" in words:
        words[words.index("kaiko-vits8")] = ENCODER[0]
        words += ["--tile-checkpoint", ENCODER[1]]
    return words


def run(words: list[str], outside: Path) -> subprocess.CompletedProcess[str]:
    paths = [str(outside), *filter(None, [os.environ.get("PYTHONPATH")])]
    return longslide(*words, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})


@pytest.mark.slow
def test_a_reader_of_ones_own_gives_the_features_that_openslide_gives(outside: Path, tmp_path: Path) -> None:
    with openslide.OpenSlide(tmp_path / "slides" / "a.svs") as slide:
        np.save(tmp_path / "slide.npy", np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")))
    done = run(command_with("--reader"), outside)
    assert done.returncode == 0, done.stderr
    embed([tmp_path / "slides"], tmp_path / "reference", ENCODER[0], ENCODER[1], tile_px=224)
    ours, reference = read_features(tmp_path / "features" / "slide.h5"), read_features(tmp_path / "reference" / "a.h5")
    assert ours.settings["reader"] == "numpy_reader.NumpyReader"
    assert reference.settings["reader"] == "tiff"
    np.testing.assert_array_equal(ours.coords, reference.coords)
    np.testing.assert_allclose(ours.features, reference.features, rtol=1e-5, atol=1e-5)
    # Without the reader there is no such file; made with another reader is made with other settings.
    assert (
        main(["embed", "slide.npy", "--output", "other", "--tile-encoder", *ENCODER[:1], "--tile-checkpoint", "random"])
        == 1
    )
    with pytest.raises(LongslideError, match=r"reader numpy_reader\.NumpyReader instead of (tiff|openslide)"):
        embed(["slide.npy"], "features", *ENCODER, reader="openslide")


def test_a_reader_is_chosen_by_name_or_path_or_tried_when_registered(
    outside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import longslide
    from longslide.data.slides.base import READERS

    np.save(tmp_path / "a.npy", np.full((50, 60, 3), 7, np.uint8))
    with open_slide("slides/a.svs") as slide, open_slide("slides/a.svs", reader="openslide") as named:
        assert (slide.reader, named.reader) == ("tiff", "openslide")
    with pytest.raises(
        LongslideError, match=r"a\.npy: not a slide .* readers tiff, openslide, fastslide, ome-zarr, image\)"
    ):
        open_slide("a.npy")
    with pytest.raises(LongslideError, match=r"a\.svs: the slide reader numpy_reader.NumpyReader does not take it"):
        open_slide("slides/a.svs", reader="numpy_reader:NumpyReader")
    with open_slide("a.npy", reader="numpy_reader.NumpyReader") as slide:
        assert slide.vendor == "numpy"
        assert slide.mpp.value == 0.5
        assert slide.read_region(-1, -1, 0, 2, 2).tolist() == [[[255] * 3] * 2, [[255] * 3, [7] * 3]]

    monkeypatch.setattr(READERS, "_classes", dict(READERS._classes))
    from numpy_reader import NumpyReader

    longslide.register("numpy", NumpyReader)
    with open_slide("a.npy") as slide:
        assert slide.reader == "numpy"
    # A folder is searched for its files, and a second run finds them done: the same reader takes them, named or not.
    with open_slide("slides/a.svs") as slide:
        np.save("slides/b.npy", slide.read_region(0, 0, 0, *slide.dimensions))
    options = {"tile_encoder": ENCODER[0], "tile_checkpoint": ENCODER[1]}
    assert [result.slide_id for result in embed("slides", "features", **options)] == ["a", "b"]
    assert [result.reason for result in embed("slides", "features", **options)] == ["already complete"] * 2
    assert [result.reason for result in embed("slides/b.npy", "features", reader="numpy", **options)] == [
        "already complete"
    ]
    with pytest.raises(LongslideError, match="slide reader 'openslide': the name is taken by longslide"):
        longslide.register("openslide", NumpyReader)


@pytest.mark.slow
def test_a_segmenter_of_ones_own_takes_its_options_and_is_recorded(outside: Path, tmp_path: Path) -> None:
    words = command_with("--tissue ")
    assert main(words) == 0
    features = read_features("features/a.h5")
    assert features.tissue_method == "dark-tissue-1"
    assert features.settings["tissue_segmenter"] == "dark_tissue.DarkTissue"
    assert json.loads(features.settings["tissue_settings"]) == {"threshold": 0.7}
    assert main(words) == 0, "the same again is done already"
    assert main([*words, "--tissue.threshold", "0.6"]) == 2, "another threshold is another setting"
    with h5py.File("features/a.h5") as file:
        area = file["coords"].attrs["tissue_mm2"]
    assert main([*words, "--tissue.threshold", "0.99", "--output", "more"]) == 0
    assert read_features("more/a.h5").settings["tissue_mm2"] > area


@pytest.mark.slow
def test_the_default_segmenter_takes_options_without_being_named(outside: Path) -> None:
    words = ["embed", "slides", "--tile-encoder", ENCODER[0], "--tile-checkpoint", "random"]
    assert main([*words, "--output", "one", "--tissue.min-area", "1e9"]) == 0
    assert not Path("one/a.h5").exists(), "no piece of tissue is as large as that"
    Path("embed.yaml").write_text("tissue: {class_path: optical-density, init_args: {threshold: 0.05}}\n")
    assert main([*words, "--output", "two", "--config", "embed.yaml"]) == 0
    settings = read_features("two/a.h5").settings
    assert settings["tissue_segmenter"] == "optical-density"
    assert json.loads(settings["tissue_settings"]) == {"keep_ink": False, "min_area": 2_500.0, "threshold": 0.05}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--tissue", "otsu"],
            "no tissue segmenter 'otsu': there are optical-density, hest, grandqc; a class of your own",
        ),
        (["--tissue", "nowhere.Otsu"], "tissue segmenter 'nowhere.Otsu': no module nowhere; install its package"),
        (["--tissue", "dark_tissue.Otsu"], "tissue segmenter 'dark_tissue.Otsu': dark_tissue has no Otsu"),
        (
            ["--tissue", "numpy_reader.NumpyReader"],
            "not a class derived from longslide.data.tissue.base.TissueSegmenter",
        ),
        (["--tissue", "dark_tissue.DarkTissue", "--tissue.colour", "red"], "colour"),
        (["--reader", "broken.Reader"], "broken cannot be imported (ZeroDivisionError: division by zero)"),
        (["--reader", "thirsty.Reader"], "thirsty needs the module not_installed; install it"),
        (["--reader", "numpy"], "slide reader 'numpy'"),
    ],
)
def test_what_cannot_be_plugged_in_is_one_line_and_status_2(
    words: list[str], message: str, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (outside / "broken.py").write_text("1 / 0\n")
    (outside / "thirsty.py").write_text("import not_installed\n")
    try:
        status = main(["embed", "slides", "--output", "f", "--tile-encoder", ENCODER[0], *words])
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.count("\n") == 1
    assert not Path("f").exists()


@pytest.mark.slow
def test_a_network_of_ones_own_embeds_tiles_from_the_command_line_from_yaml_and_from_python(
    outside: Path, tmp_path: Path
) -> None:
    done = run(command_with("--tile-encoder small_cnn"), outside)
    assert done.returncode == 0, done.stderr
    features = read_features("features/a.h5")
    from small_cnn import SmallCNN, small_cnn

    encoder = small_cnn()
    assert (features.encoder, features.weights) == ("small-cnn", encoder.weights)
    assert (features.tile_px, features.tile_mpp) == (128, 1.0)
    x, y = features.coords[0]
    with open_slide("slides/a.svs") as slide, torch.inference_mode():
        tile = cv2.resize(slide.read_region(x, y, 0, 256, 256), (128, 128), interpolation=cv2.INTER_AREA)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        image = (torch.from_numpy(tile) / 255 - mean) / std
        expected = encoder.network(image.permute(2, 0, 1)[None])[0]
    torch.testing.assert_close(torch.from_numpy(features.features[0]), expected, rtol=1e-4, atol=1e-4)

    # The same from Python: known as done by the digest of its tensors; with other weights it is another encoder.
    [again] = embed(["slides"], "features", encoder, device="cpu")
    assert (again.status, again.reason) == ("done", "already complete")
    with pytest.raises(LongslideError, match="tile_weights SmallCNN sha256:"):
        embed(["slides"], "features", small_cnn(seed=1), device="cpu")

    # From YAML: tiles and transform are the file's, the network the factory's.
    content = yaml.safe_load(TINY) | {"architecture": "small_cnn:SmallCNN", "timm_args": {"dim": 8}, "dim": 8}
    Path("cnn.yaml").write_text(yaml.safe_dump(content | {"pooling": "timm"}))
    torch.save(SmallCNN(8).state_dict(), "cnn.pth")
    [result] = embed(["slides"], "yaml", "cnn.yaml", "cnn.pth", device="cpu")
    assert result.status == "done", result.reason
    assert read_features("yaml/a.h5").weights.startswith("cnn.pth sha256:")
    assert read_features("yaml/a.h5").features.shape[1] == 8

    # A bare module: its dimension is measured.
    assert embed(["slides"], "bare", SmallCNN(5), device="cpu")[0].status == "done"
    assert read_features("bare/a.h5").features.shape[1] == 5
    assert read_features("bare/a.h5").encoder == "SmallCNN"


@pytest.mark.slow
def test_a_slide_encoder_of_ones_own_needs_a_name_weights_what_it_reads_and_a_call(outside: Path) -> None:
    assert main(command_with("--slide-encoder mean_and_spread")) == 0
    features = read_features("features/a.h5")
    assert (features.slide_encoder, features.slide_weights, features.pool) == ("mean-and-spread", "none", None)
    tiles = torch.from_numpy(features.features)
    expected = torch.cat([tiles.mean(0), tiles.std(0)])
    torch.testing.assert_close(torch.from_numpy(features.slide_embedding), expected)

    from mean_and_spread import MeanAndSpread

    class OfUni(MeanAndSpread):
        tile_encoder = "uni"

    with pytest.raises(LongslideError, match="reads tile embeddings of 'uni', not of 'vit_tiny_patch16_224'"):
        embed(["slides"], "other", *ENCODER, slide_encoder=OfUni())
    with pytest.raises(LongslideError, match="function is no slide encoder, which has name, weights and tile_encoder"):
        embed(["slides"], "other", *ENCODER, slide_encoder=lambda features, cells: features.mean(1))
    with pytest.raises(LongslideError, match="takes no argument `checkpoint` for --slide-checkpoint random"):
        embed(["slides"], "other", *ENCODER, "mean_and_spread:MeanAndSpread", "random")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("small_cnn:large_cnn", "small_cnn has no large_cnn"),
        ("nowhere:cnn", "no module nowhere"),
        ("mean_and_spread:MeanAndSpread", "makes a MeanAndSpread, and neither a TileEncoder nor a torch module"),
        ("small_cnn:torch", "not callable"),
        ("torch.nn:Linear", r"cannot be called with no arguments \(missing a required argument: 'in_features'\)"),
        ("torch.nn:Flatten", None),
        ("torch.nn:Identity", r"does not map \(2, 3, 224, 224\) images to \(2, dim\) embeddings"),
    ],
)
def test_a_factory_that_makes_no_tile_encoder_is_refused_in_one_line(
    choice: str, message: str | None, outside: Path
) -> None:
    if message is None:  # raw pixels are an embedding too
        assert embed(["slides"], "f", choice, device="cpu")[0].status == "done"
        return
    with pytest.raises(LongslideError, match=message) as refusal:
        embed(["slides"], "f", choice, device="cpu")
    assert "\n" not in str(refusal.value)


@pytest.mark.slow
def test_an_aggregator_of_ones_own_is_trained_tested_and_predicts(
    outside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_synthetic_slide(tmp_path / "slides" / "b.svs", size=(1024, 768), mpp=0.5, seed=5)
    embed(["slides"], "features", *ENCODER, device="cpu", tile_px=64)
    rows = ["slide_id,patient_id,label,split"]
    for number in range(12):  # of slides that are alike, but not the same
        made = read_features(f"features/{'ab'[number % 2]}.h5")
        noisy = made.features + np.float16((number + 1) / 64)
        write_features(
            f"features/s{number}.h5", replace(made, slide_id=f"s{number}", quickhash=str(number), features=noisy)
        )
        part = ("train", "train", "val", "val", "test", "test")[number % 6]
        rows.append(f"s{number},p{number},{'yes' if number % 2 else 'no'},{part}")
    Path("cohort.csv").write_text("\n".join(rows) + "\n")
    quick = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    words = [*command_with("--model.aggregator.tiles"), "--data.task", "binary", "--data.workers", "0", *quick]
    done = run(words, outside)
    assert done.returncode == 0, done.stderr
    checkpoint = "runs/top_tiles.TopTiles/best.ckpt"
    made = torch.load(checkpoint, weights_only=True)["longslide"]["aggregator"]
    assert made == {"name": "top_tiles.TopTiles", "options": {"tiles": 4, "width": 64}, "architecture": None}

    # A file never causes an import: without --plugins nothing of it is run.
    predict = ["predict", "slides/a.svs", "--checkpoint", checkpoint, "--device", "cpu"]
    refused = run(predict, outside)
    assert refused.returncode == 2
    assert "'top_tiles.TopTiles' is code outside Longslide" in refused.stderr
    assert "--plugins top_tiles" in refused.stderr
    assert refused.stderr.count("\n") == 1

    tested = run(
        [*command_with("--plugins top_tiles"), "--data.workers", "0", "--accelerator", "cpu", "--allow-seen"], outside
    )
    assert tested.returncode == 0, tested.stderr
    predicted = run([*predict, "--output", "results", "--plugins", "top_tiles", "--explain", "occlusion"], outside)
    assert predicted.returncode == 0, predicted.stderr
    assert Path("results/slides/a/overlay.png").exists()
    missing = run([*predict, "--plugins", "gone"], outside)
    assert missing.returncode == 2
    assert "--plugins gone: no module gone" in missing.stderr

    # In Python its module is imported as any other.
    import longslide
    import top_tiles

    [prediction] = longslide.predict("slides/a.svs", checkpoint, device="cpu")
    assert prediction.status == "done"
    assert issubclass(top_tiles.TopTiles, longslide.Aggregator)


@pytest.mark.slow
def test_a_segmenter_and_a_reader_that_made_the_training_features_are_used_by_predict(
    outside: Path, tmp_path: Path
) -> None:
    with openslide.OpenSlide(tmp_path / "slides" / "a.svs") as slide:
        np.save(tmp_path / "slide.npy", np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")))
    own = ["--tissue", "dark_tissue.DarkTissue", "--tissue.threshold", "0.7", "--reader", "numpy_reader.NumpyReader"]
    words = ["embed", "slide.npy", "--output", "features", "--tile-encoder", ENCODER[0], "--tile-checkpoint", "random"]
    assert main([*words, *own]) == 0
    write_classifier(Path("model.ckpt"), Path("features"))
    (tmp_path / "new.npy").write_bytes((tmp_path / "slide.npy").read_bytes())
    predict = ["predict", "new.npy", "--checkpoint", "model.ckpt", "--output", "results", "--device", "cpu"]
    refused = run(predict, outside)
    assert refused.returncode == 2
    assert "is code outside Longslide, which a file alone may not run" in refused.stderr
    done = run([*predict, "--plugins", "dark_tissue,numpy_reader"], outside)
    assert done.returncode == 0, done.stderr
    trained, made = read_features("features/slide.h5"), read_features("results/features/new.h5")
    for name in ("reader", "tissue_segmenter", "tissue_settings"):
        assert made.settings[name] == trained.settings[name]
    np.testing.assert_array_equal(made.coords, trained.coords)


def test_a_pretrained_slide_encoder_is_used_as_it_is_and_exported_in_the_published_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"layers": 2, "width": 16, "heads": 2, "ffn_width": 32, "dilated_ratios": (1, 2)}
    facts = UnlabelledFacts(48, {"tile_encoder": "my-encoder"})
    autoencoder = MaskedAutoencoder(facts, PretrainingOptions(AggregatorChoice("longnet", size)))
    torch.save({"state_dict": autoencoder.state_dict(), "longslide": autoencoder.describe()}, tmp_path / "best.ckpt")
    features = torch.randn(1, 20, 48)
    cells = torch.stack([torch.arange(20) % 5, torch.arange(20) // 5], 1)[None]
    with torch.inference_mode():
        expected = autoencoder.encoder.eval()(features, cells)
    [exported] = export(tmp_path / "best.ckpt", tmp_path / "ours.pth")
    published = torch.load(exported.weights, weights_only=True)["model"]
    assert {
        "cls_token",
        "patch_embed.proj.weight",
        "encoder.layers.1.self_attn.q_proj.weight",
        "norm.bias",
    } <= published.keys()
    reads = {"tile_encoder": "my-encoder", "tile_dim": 48}
    for choice, checkpoint in (("longnet", tmp_path / "best.ckpt"), (exported.spec, exported.weights)):
        encoder = load_slide_encoder(choice, checkpoint=checkpoint, **reads)
        with torch.inference_mode():
            torch.testing.assert_close(encoder(features, cells), expected, rtol=0, atol=0)
    with pytest.raises(LongslideError, match=r"best\.ckpt: a checkpoint of slide encoder 'longnet', not of 'gigapath'"):
        load_slide_encoder("gigapath", checkpoint=tmp_path / "best.ckpt", **reads)
    with pytest.raises(LongslideError, match="reads tile embeddings of 'my-encoder', not of 'uni'"):
        load_slide_encoder("longnet", checkpoint=tmp_path / "best.ckpt", tile_encoder="uni", tile_dim=48)

    # Of a classifier that was trained with a slide encoder, too; of others there is none.
    task = Task("binary", ("y",), ("no", "yes"))
    for name in ("longnet", "abmil"):
        options = AggregatorChoice("longnet", size) if name == "longnet" else AggregatorChoice(name)
        classifier = SlideClassifier(TrainingFacts(task, 48), ClassifierOptions(options))
        torch.save(
            {"state_dict": classifier.state_dict(), "longslide": classifier.describe()}, tmp_path / f"{name}.ckpt"
        )
    [of_classifier] = export(str(tmp_path / "longnet.ckpt"), str(tmp_path / "from-classifier.pth"))
    assert torch.load(of_classifier.weights, weights_only=True)["model"].keys() == published.keys()
    with pytest.raises(LongslideError, match="a classifier without slide encoder"):
        export(tmp_path / "abmil.ckpt", tmp_path / "none.pth")


def test_the_hooks_into_jsonargparse_are_there() -> None:
    """Private names that `plugin_options` builds on: an upgrade that moves them fails here by name."""
    from jsonargparse._typehints import ActionTypeHint
    from jsonargparse._util import NestedArg

    assert {"_check_type", "instantiate_classes", "serialize"} <= vars(ActionTypeHint).keys()
    assert NestedArg._fields == ("key", "val")

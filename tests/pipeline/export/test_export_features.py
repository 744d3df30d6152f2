"""Feature files in the layouts of other tools: each as that tool's own reader looks for it, and as ours reads it back."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from longslide import Features, LongslideError, embed, export, read_features, write_features
from longslide.pipeline.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features of a slide of 0.2525 um/px, with tiles that are resampled."""
    from longslide import write_synthetic_slide

    folder = tmp_path_factory.mktemp("export")
    write_synthetic_slide(folder / "S21.1.svs", size=(3000, 2000), mpp=0.2525)
    [result] = embed(folder / "S21.1.svs", folder / "ours", "vit_tiny_patch16_224", "random", overlap=32)
    assert result.status == "done", result.reason
    return folder / "ours"


@pytest.fixture(scope="module")
def features(folder: Path) -> Features:
    return read_features(folder / "S21.1.h5")


def test_our_own_files_hold_the_attributes_by_which_tridents_tools_find_the_pixels(folder: Path) -> None:
    with h5py.File(folder / "S21.1.h5") as file:
        facts = dict(file["coords"].attrs)
    # WSIPatcher reads round(patch_size * level0_magnification / target_magnification) level-0 pixels.
    quotient = facts["level0_magnification"] / facts["target_magnification"]
    assert facts["patch_size"] * quotient == pytest.approx(facts["patch_size_level0"], abs=1e-9)
    assert facts["level0_magnification"] == pytest.approx(10 / 0.2525)
    # Its reader of older files takes a level and a further factor: the level's downsample is 1 or 2 here.
    assert facts["patch_size"] * facts["custom_downsample"] * 2 ** facts["patch_level"] == facts["patch_size_level0"]
    assert "level0_magnification" not in read_features(folder / "S21.1.h5").settings


@pytest.mark.parametrize("to", ["stamp", "trident", "clam"])
def test_the_folder_of_the_features_is_refused_as_output_and_they_stay(
    to: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "S21.1.h5"
    path.write_bytes((folder / "S21.1.h5").read_bytes())
    for given in (tmp_path, path):
        assert main(["export", "--features", str(given), "--to", to, "--output", f"{tmp_path}/../{tmp_path.name}"]) == 2
        assert "the folder of the features" in capsys.readouterr().err
    assert path.read_bytes() == (folder / "S21.1.h5").read_bytes()
    assert [one.name for one in tmp_path.iterdir()] == ["S21.1.h5"]


def test_trident_finds_features_and_coordinates_where_it_puts_them(
    folder: Path, features: Features, tmp_path: Path
) -> None:
    assert main(["export", "--features", str(folder), "--to", "trident", "--output", str(tmp_path)]) == 0
    path = tmp_path / "features_vit_tiny_patch16_224" / "S21.1.h5"
    for file in (path, tmp_path / "patches" / "S21.1_patches.h5"):
        with h5py.File(file) as content:
            assert content["coords"].dtype == np.int64
            for name in ("patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "overlap"):
                assert name in content["coords"].attrs
    read = read_features(path)
    assert (read.layout, read.encoder, read.overlap) == ("trident", features.encoder, 32)
    np.testing.assert_array_equal(read.features, features.features)
    np.testing.assert_array_equal(read.cells, features.cells)


def test_trident_knows_our_encoders_by_its_own_names(features: Features, folder: Path, tmp_path: Path) -> None:
    for ours, theirs in (("uni2-h", "uni_v2"), ("conch-v15", "conch_v15")):
        write_features(tmp_path / "in" / "a.h5", replace(features, encoder=ours))
        export(features=tmp_path / "in", output=tmp_path / "out", to="trident")
        assert (tmp_path / "out" / f"features_{theirs}" / "S21.1.h5").is_file()


def test_clam_finds_tensors_and_files_of_its_types(folder: Path, features: Features, tmp_path: Path) -> None:
    [done] = export(features=folder, output=tmp_path, to="clam")
    assert done.ok
    tensor = torch.load(tmp_path / "pt_files" / "S21.1.pt", weights_only=True)
    np.testing.assert_array_equal(tensor.numpy(), features.features.astype(np.float32))
    with h5py.File(tmp_path / "h5_files" / "S21.1.h5") as file:
        assert (file["features"].dtype, file["coords"].dtype) == (np.float32, np.int32)
        coords = file["coords"]
        # Whole_Slide_Bag_FP reads patch_size pixels at patch_level, and no resampling follows.
        assert coords.attrs["patch_size"] * 2 ** coords.attrs["patch_level"] == features.tile_size_level0
    read = read_features(tmp_path / "h5_files" / "S21.1.h5")
    assert read.layout == "clam"
    np.testing.assert_array_equal(read.coords, features.coords)


def test_stamp_gets_microns_and_gives_the_same_cells_back(folder: Path, features: Features, tmp_path: Path) -> None:
    write_features(tmp_path / "in" / "a.h5", replace(features, overlap=0, step_level0=features.tile_size_level0))
    whole = read_features(tmp_path / "in" / "a.h5")
    export(features=tmp_path / "in", output=tmp_path / "out", to="stamp")
    with h5py.File(tmp_path / "out" / "S21.1.h5") as file:
        np.testing.assert_allclose(file["coords"][()], features.coords * 0.2525, rtol=1e-9)
        assert file.attrs["tile_size_um"] == pytest.approx(features.tile_size_level0 * 0.2525)
        assert (file.attrs["unit"], file.attrs["feat_type"], file.attrs["tile_size_px"]) == ("um", "tile", 224)
    read = read_features(tmp_path / "out" / "S21.1.h5")
    assert read.layout == "stamp"
    np.testing.assert_array_equal(np.unique(read.cells, axis=0), np.unique(whole.cells, axis=0))
    # And on from STAMP's layout: to STAMP's, not to one that needs level-0 pixels.
    assert all(one.ok for one in export(features=tmp_path / "out", output=tmp_path / "again", to="stamp"))
    [refused] = export(features=tmp_path / "out", output=tmp_path / "no", to="clam")
    assert "holds microns; clam needs level-0 pixels" in refused.problem


def test_a_file_that_cannot_be_exported_does_not_end_the_others(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.h5").write_bytes(b"no HDF5")
    (tmp_path / "in" / "b.h5").write_bytes((folder / "S21.1.h5").read_bytes())
    words = ["export", "--features", str(tmp_path / "in"), "--to", "clam", "--output", str(tmp_path / "out")]
    assert main(words) == 1
    assert (tmp_path / "out" / "h5_files" / "S21.1.h5").is_file()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "one of --checkpoint .* and --features"),
        ({"checkpoint": "a.ckpt", "features": "x"}, "one of --checkpoint"),
        ({"features": "x", "to": "clam"}, "needs --output"),
        ({"features": "x", "output": "y"}, "--features needs --to: trident, clam, stamp, anndata, spatialdata"),
        ({"checkpoint": "x", "output": "y", "to": "clam"}, "--to, --encoder and --scores go with --features"),
        (
            {"features": "x", "output": "y", "to": "clam", "scores": "z"},
            "--scores goes with --to anndata or spatialdata",
        ),
        ({"features": "x", "output": "y", "to": "anndata", "scores": "z"}, "z: no results of `predict --explain`"),
        ({"features": "x", "output": "y", "to": "clam", "name": "z"}, "--name is that of a slide encoder"),
    ],
)
def test_wrong_usage_is_one_line(wrong: dict[str, str], message: str) -> None:
    with pytest.raises(LongslideError, match=message) as caught:
        export(**wrong)
    assert "\n" not in str(caught.value)

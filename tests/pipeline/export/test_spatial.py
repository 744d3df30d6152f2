"""Feature files as AnnData and SpatialData, read back equal and opened by the tools that read them."""

import shutil
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from longslide import Features, LongslideError, embed, export, open_slide, read_features, write_features
from longslide.pipeline.cli import main

anndata = pytest.importorskip("anndata")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features of a slide of 0.2525 um/px, with tiles that are resampled, and results of `predict` for its tiles."""
    from longslide import write_synthetic_slide

    folder = tmp_path_factory.mktemp("spatial")
    write_synthetic_slide(folder / "S21.1.svs", size=(3000, 2000), mpp=0.2525)
    [result] = embed(folder / "S21.1.svs", folder / "ours", "vit_tiny_patch16_224", "random", overlap=32)
    assert result.status == "done", result.reason
    coords = read_features(folder / "ours" / "S21.1.h5").coords
    tiles = folder / "results" / "slides" / "S21.1" / "tiles.csv"
    tiles.parent.mkdir(parents=True)
    rows = [f"{x},{y},{0.25 * n},{-1.5 * n}" for n, (x, y) in enumerate(coords.tolist())]
    tiles.write_text("\n".join(["x,y,score_benign,score_tumour", *reversed(rows)]) + "\n")  # in another order
    return folder


@pytest.fixture(scope="module")
def features(folder: Path) -> Features:
    return read_features(folder / "ours" / "S21.1.h5")


def check_table(table: "anndata.AnnData", features: Features) -> None:
    np.testing.assert_array_equal(table.obsm["features"], features.features)
    np.testing.assert_array_equal(table.obsm["spatial"], features.coords + features.tile_size_level0 / 2)
    np.testing.assert_array_equal(table.obs[["x", "y"]], features.coords)
    np.testing.assert_array_equal(table.obs[["column", "row"]], features.cells)
    np.testing.assert_array_equal(table.obs["blur"], features.blur)
    np.testing.assert_array_equal(table.obs["score_benign"], 0.25 * np.arange(len(table)))
    np.testing.assert_array_equal(table.obs["score_tumour"], -1.5 * np.arange(len(table)))
    assert (table.obs["slide_id"] == "S21.1").all()
    assert table.uns["longslide"]["encoder"] == features.encoder


def test_anndata_holds_tiles_embeddings_scores_contours_and_the_slide(
    folder: Path, features: Features, tmp_path: Path
) -> None:
    words = ["export", "--features", str(folder / "ours"), "--to", "anndata", "--scores", str(folder / "results")]
    assert main([*words, "--output", str(tmp_path)]) == 0
    table = anndata.read_h5ad(tmp_path / "S21.1.h5ad")
    check_table(table, features)
    assert table.uns["tissue"] == features.tissue
    place = table.uns["spatial"]["S21.1"]
    with open_slide(folder / "S21.1.svs") as slide:
        np.testing.assert_array_equal(place["images"]["hires"], slide.thumbnail(2048))
    assert place["scalefactors"]["tissue_hires_scalef"] == pytest.approx(2048 / 3000)
    assert place["scalefactors"]["spot_diameter_fullres"] == features.tile_size_level0
    assert [path.name for path in tmp_path.iterdir()] == ["S21.1.h5ad"]


def test_spatialdata_holds_the_same_over_the_slide(folder: Path, features: Features, tmp_path: Path) -> None:
    spatialdata = pytest.importorskip("spatialdata")
    from spatialdata.transformations import get_transformation

    for _ in range(2):  # the second one replaces the first
        [done] = export(features=folder / "ours", output=tmp_path, to="spatialdata", scores=folder / "results")
        assert done.ok, done.problem
    content = spatialdata.read_zarr(done.files[0])
    check_table(content.tables["features"], features)
    squares = content.shapes["tiles"].geometry
    assert (squares.area == features.tile_size_level0**2).all()
    np.testing.assert_array_equal(squares.bounds.to_numpy()[:, :2], features.coords)
    assert len(content.shapes["tissue"])
    image = content.images["thumbnail"]
    with open_slide(folder / "S21.1.svs") as slide:
        np.testing.assert_array_equal(image.transpose("y", "x", "c"), slide.thumbnail(2048))
    matrix = get_transformation(image, "global").to_affine_matrix(("x", "y"), ("x", "y"))
    corner = matrix @ [image.sizes["x"], image.sizes["y"], 1]
    np.testing.assert_allclose(corner[:2], [3000, 2000])
    tiles = spatialdata.match_element_to_table(content, element_name="tiles", table_name="features")[1]
    assert len(tiles) == len(features.coords)
    assert [path.name for path in tmp_path.iterdir()] == ["S21.1.zarr"]


@pytest.mark.slow
def test_squidpy_finds_neighbours_and_draws_the_scores_over_the_slide(folder: Path, tmp_path: Path) -> None:
    squidpy = pytest.importorskip("squidpy")
    import matplotlib.pyplot as plt

    export(features=folder / "ours", output=tmp_path, to="anndata", scores=folder / "results")
    table = anndata.read_h5ad(tmp_path / "S21.1.h5ad")
    squidpy.gr.spatial_neighbors(table, coord_type="generic", n_neighs=4)
    assert (table.obsp["spatial_connectivities"].sum(1) > 0).all()
    figure, axes = plt.subplots()
    squidpy.pl.spatial_scatter(table, color="score_tumour", library_id="S21.1", ax=axes)
    assert axes.images
    plt.close(figure)


@pytest.mark.slow
def test_napari_spatialdata_shows_the_slide_its_tiles_and_its_tissue(
    folder: Path, features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    spatialdata = pytest.importorskip("spatialdata")
    viewers = pytest.importorskip("napari_spatialdata")
    qt = pytest.importorskip("qtpy.QtWidgets")

    [done] = export(features=folder / "ours", output=tmp_path, to="spatialdata", scores=folder / "results")
    content = spatialdata.read_zarr(done.files[0])
    viewer = viewers.Interactive(content, headless=True)
    for number, element in enumerate(("thumbnail", "tiles", "tissue"), 1):
        viewer.add_element(element, "global")
        deadline, adding = time.monotonic() + 60, viewer._sdata_widget.worker_thread  # takes one at a time
        while (len(viewer._viewer.layers) < number or adding.isRunning()) and time.monotonic() < deadline:
            qt.QApplication.processEvents()
    layers = {layer.name: layer for layer in viewer._viewer.layers}
    assert layers.keys() == {"thumbnail", "tiles", "tissue"}
    assert len(layers["tiles"].data) == len(features.coords)
    np.testing.assert_allclose(np.ptp(layers["thumbnail"].extent.world, axis=0), [2000, 3000], rtol=2e-3)
    with suppress(KeyError):  # of napari 0.9 without OpenGL, when it takes a picture away
        viewer._viewer.close()


def test_a_slide_that_is_gone_is_exported_without_its_picture_and_with_a_word(
    folder: Path, features: Features, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_features(tmp_path / "in" / "a.h5", replace(features, slide_path=str(tmp_path / "gone.svs")))
    [done] = export(features=tmp_path / "in", output=tmp_path / "out", to="anndata")
    assert done.ok
    assert f"S21.1: without a picture: its slide is not at {tmp_path / 'gone.svs'}" in capsys.readouterr().err
    assert "spatial" not in anndata.read_h5ad(done.files[0]).uns


def test_scores_of_other_tiles_and_slides_without_scores_are_named(
    folder: Path, features: Features, tmp_path: Path
) -> None:
    write_features(tmp_path / "in" / "a.h5", replace(features, slide_id="S99"))
    [done] = export(features=tmp_path / "in", output=tmp_path / "out", to="anndata", scores=folder / "results")
    assert "has no scores of its tiles; predict it there with --explain" in done.problem
    shutil.copytree(folder / "results" / "slides" / "S21.1", tmp_path / "results" / "slides" / "S99")
    few = replace(features, slide_id="S99", features=features.features[1:], coords=features.coords[1:], blur=None)
    write_features(tmp_path / "in" / "a.h5", few)
    [done] = export(features=tmp_path / "in", output=tmp_path / "out", to="anndata", scores=tmp_path / "results")
    assert "scores of other tiles than those of the feature file" in done.problem
    assert not list((tmp_path / "out").iterdir())


def test_files_whose_coordinates_are_no_pixels_are_refused(folder: Path, tmp_path: Path) -> None:
    export(features=folder / "ours", output=tmp_path / "stamp", to="stamp")
    [done] = export(features=tmp_path / "stamp", output=tmp_path / "out", to="anndata")
    assert "holds microns; anndata needs level-0 pixels" in done.problem
    with pytest.raises(LongslideError, match="no results of `predict"):
        export(features=folder / "ours", output=tmp_path / "out", to="anndata", scores=tmp_path / "none")

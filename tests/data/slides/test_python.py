"""A slide in Python: its tissue, its tiles, what a notebook shows."""

from pathlib import Path

import longslide
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("slide") / "a.tif"
    longslide.write_synthetic_slide(file, size=(2048, 1536), mpp=0.25)
    return file


def test_tiles_are_batches_of_pixels_and_level_0_coordinates(path: Path) -> None:
    with longslide.open_slide(str(path)) as slide:
        batches = list(slide.tiles(mpp=0.5, px=128, threads=2, batch_size=7))
        coords = np.concatenate([batch.coords for batch in batches])
        assert batches[0].tiles.shape == (7, 128, 128, 3)
        assert batches[0].tiles.dtype == np.uint8
        assert (coords % 256 == 0).all()
        assert list(map(tuple, coords[:, ::-1])) == sorted(map(tuple, coords[:, ::-1])), "row by row"
        tissue = slide.tissue()
        assert tissue.mask.any()
        x, y = coords[0]
        region = slide.read_region(int(x), int(y), 0, 256, 256).reshape(128, 2, 128, 2, 3).mean((1, 3))
        assert np.abs(region - batches[0].tiles[0]).mean() < 12, "the pixels are those at the coordinates"


def test_a_data_set_gives_the_tiles_of_the_stream_to_workers(path: Path) -> None:
    data = longslide.TileDataset(str(path), mpp=0.5, px=128)
    with longslide.open_slide(path) as slide:
        batches = list(slide.tiles(mpp=0.5, px=128))
    expected = torch.from_numpy(np.concatenate([batch.tiles for batch in batches])).permute(0, 3, 1, 2)
    read = list(DataLoader(data, batch_size=16, num_workers=1))
    assert torch.equal(torch.cat([batch["tile"] for batch in read]), expected)
    assert torch.cat([batch["coords"] for batch in read]).tolist() == data.grid.coords.tolist()


def test_a_slide_shows_its_thumbnail_in_a_notebook_and_one_line_elsewhere(path: Path) -> None:
    with longslide.open_slide(path) as slide:
        assert repr(slide) == "Slide('a', 2,048 x 1,536 px, 0.25 um/px, generic-tiff)"
        assert slide._repr_html_().startswith('<img src="data:image/jpeg;base64,')


def test_features_become_tables(tmp_path: Path) -> None:
    made = longslide.Features(
        "a", np.arange(6, dtype=np.float16).reshape(2, 3), np.array([[0, 512], [512, 512]]), 512, tile_size_level0=512
    )
    longslide.write_features(str(tmp_path / "a.h5"), made)
    features = longslide.read_features(str(tmp_path / "a.h5"))
    assert repr(features) == "Features('a', 2 tiles x 3)"
    table = features.to_pandas()
    assert list(table) == ["x", "y", "column", "row", "feature_0", "feature_1", "feature_2"]
    assert table.iloc[1].tolist() == [512, 512, 1, 1, 3, 4, 5]


def test_features_become_an_anndata(tmp_path: Path) -> None:
    pytest.importorskip("anndata")
    made = longslide.Features(
        "a", np.arange(6, dtype=np.float16).reshape(2, 3), np.array([[0, 512], [512, 512]]), 512, tile_size_level0=512
    )
    content = made.to_anndata()
    assert content.X.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert content.obsm["spatial"].tolist() == [[256, 768], [768, 768]]
    content.write_h5ad(tmp_path / "a.h5ad")

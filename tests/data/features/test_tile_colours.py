"""Tiles that are alike have the same colours on every slide of a cohort."""

from pathlib import Path

import numpy as np
import pytest
from longslide import TileIndex
from longslide.data.features.feature_file import write_features
from longslide.data.features.features import Features
from longslide.data.features.tile_colours import TileColours

KINDS = 3


def cohort(folder: Path, noise: float = 0.05) -> tuple[TileIndex, dict[str, np.ndarray]]:
    """Slides of tiles of three kinds in other proportions, each tile's brightness its own: lengths differ."""
    random = np.random.default_rng(0)
    means = random.normal(size=(KINDS, 32))
    truth = {}
    for number, shares in enumerate([(0.7, 0.2, 0.1), (0.1, 0.2, 0.7), (0.8, 0.1, 0.1)]):
        kind = random.choice(KINDS, 400, p=shares)
        length = random.uniform(0.5, 20, (400, 1))
        embeddings = length * (means[kind] + noise * random.normal(size=(400, 32)))
        coords = np.stack([np.arange(400) % 20, np.arange(400) // 20], 1) * 512
        write_features(folder / f"s{number}.h5", Features("s", embeddings.astype(np.float16), coords, 512, 512, 256))
        truth[f"s{number}"] = kind
    return TileIndex.open(folder), truth


def test_clusters_are_the_kinds_of_tissue_the_largest_of_the_cohort_first(tmp_path: Path) -> None:
    index, truth = cohort(tmp_path)
    colours = TileColours.of(index, clusters=KINDS)
    order = np.argsort(-np.bincount(np.concatenate([*truth.values()])))
    for slide_id, kind in truth.items():
        assert (order[colours.clusters(slide_id)] == kind).all(), "on every slide the same number"
    assert (np.diff(colours.shares) <= 0).all()
    assert colours.shares.sum() == pytest.approx(1)


def test_components_are_those_of_the_sample_whatever_the_slide(tmp_path: Path) -> None:
    index, truth = cohort(tmp_path)
    colours = TileColours.of(index)
    of_kind = [
        np.stack([colours.components(slide_id)[kind == number].mean(0) for slide_id, kind in truth.items()])
        for number in range(KINDS)
    ]
    for one in of_kind:
        assert np.ptp(one, axis=0).max() < 25, "a kind has one colour on all slides"
    assert min(np.abs(a.mean(0) - b.mean(0)).max() for a in of_kind for b in of_kind if a is not b) > 80
    unit = index.embeddings.float().numpy() / index.norms[:, None]
    variances = np.linalg.svd(unit - unit.mean(0), compute_uv=False) ** 2
    assert colours.explained == pytest.approx(variances[:3] / variances.sum(), rel=1e-3)


def test_the_same_cohort_gives_the_same_colours(tmp_path: Path) -> None:
    index, _ = cohort(tmp_path, noise=1)
    one, two = TileColours.of(index), TileColours.of(TileIndex.open(tmp_path))
    assert (one.components("s1") == two.components("s1")).all()
    assert (one.clusters("s1") == two.clusters("s1")).all()


@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_a_cohort_of_few_or_equal_tiles_has_colours(tmp_path: Path, tiles: int) -> None:
    coords = np.stack([np.arange(tiles), np.zeros(tiles, int)], 1) * 512
    embeddings = np.ones((tiles, 8), np.float16)
    embeddings[0, 0] = 3
    write_features(tmp_path / "a.h5", Features("a", embeddings, coords, 512, 512, 256))
    colours = TileColours.of(TileIndex.open(tmp_path))
    assert colours.components("a").shape == (tiles, 3)
    assert len(set(colours.clusters("a").tolist())) == min(tiles, 2)


def test_a_number_of_clusters_without_colours_is_refused(tmp_path: Path) -> None:
    index, _ = cohort(tmp_path)
    for clusters in (1, 17):
        with pytest.raises(ValueError, match="2 to 16"):
            TileColours.of(index, clusters)

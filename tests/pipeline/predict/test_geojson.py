"""GeoJSON of tiles and regions: valid, in level-0 pixels, and exactly the union of the tiles."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longslide.pipeline.predict.geojson import regions_to_geojson, tiles_to_geojson, to_geojson


def signed_area(ring: np.ndarray) -> float:
    return float((ring[:-1, 0] * ring[1:, 1] - ring[1:, 0] * ring[:-1, 1]).sum() / 2)


def check_rfc_7946(text: str) -> list[dict]:
    """What RFC 7946 asks of a FeatureCollection of Polygons; returns the Features."""
    content = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert content["type"] == "FeatureCollection"
    for feature in content["features"]:
        assert feature["type"] == "Feature"
        assert isinstance(feature["properties"], dict)
        assert feature["geometry"]["type"] == "Polygon"
        for number, ring in enumerate(feature["geometry"]["coordinates"]):
            assert len(ring) >= 4
            assert ring[0] == ring[-1], "closed"
            assert all(len(position) == 2 for position in ring)
            assert (signed_area(np.array(ring)) > 0) == (number == 0), "outline counterclockwise, holes clockwise"
            assert len({tuple(position) for position in ring[:-1]}) == len(ring) - 1, "touches itself"
    return content["features"]


def filled(features: list[dict], size: int) -> np.ndarray:
    """How many polygons cover each pixel, by counting edges to the left of its centre."""
    count = np.zeros((size, size), int)
    for feature in features:
        inside = np.zeros((size, size), bool)
        for ring in feature["geometry"]["coordinates"]:
            for (x0, y0), (x1, y1) in itertools.pairwise(ring):
                if x0 == x1:
                    inside[min(y0, y1) : max(y0, y1), x0:] ^= True
                else:
                    assert y0 == y1, "edges are horizontal or vertical"
        count += inside
    return count


@settings(max_examples=60, deadline=None)
@given(
    mask=st.integers(1, 7).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=n, max_size=n)
    ),
    size=st.integers(2, 6),
    overlap=st.integers(0, 4),
)
def test_regions_are_exactly_the_union_of_their_tiles(mask: list[list[bool]], size: int, overlap: int) -> None:
    step = max(1, size - overlap)
    row, column = np.nonzero(mask)
    coords = np.stack([column, row], 1) * step
    edge = len(mask) * step + size
    union = np.zeros((edge, edge), bool)
    for x, y in coords:
        union[y : y + size, x : x + size] = True
    features = regions_to_geojson(coords, size, np.ones(len(coords)), 0.5, name="for", colour=(1, 2, 3))
    features = check_rfc_7946(to_geojson(features))
    np.testing.assert_array_equal(filled(features, edge), union)
    assert sum(feature["properties"]["measurements"]["tiles"] for feature in features) == len(coords)


def test_only_tiles_that_reach_the_threshold_are_in_a_region() -> None:
    coords = np.array([[0, 0], [10, 0], [20, 0], [20, 10], [50, 50]])
    scores = np.array([0.4, 0.5, 0.8, 0.2, 0.9])
    first, second = check_rfc_7946(
        to_geojson(regions_to_geojson(coords, 10, scores, 0.5, name="for x", colour=(9, 8, 7)))
    )
    corners = {tuple(point) for point in first["geometry"]["coordinates"][0]}
    assert corners == {(10, 0), (30, 0), (30, 10), (10, 10)}
    assert first["properties"]["objectType"] == "annotation"
    assert first["properties"]["classification"] == {"name": "for x", "color": [9, 8, 7]}
    assert first["properties"]["measurements"] == {"tiles": 2, "mean score": 0.65, "threshold": 0.5}
    assert second["properties"]["measurements"]["tiles"] == 1
    assert regions_to_geojson(coords, 10, scores, 2.0, name="for x", colour=(0, 0, 0)) == []


def test_pieces_that_meet_in_a_corner_are_two_regions() -> None:
    features = regions_to_geojson(np.array([[0, 0], [5, 5]]), 5, np.ones(2), 0.5, name="for", colour=(0, 0, 0))
    assert len(check_rfc_7946(to_geojson(features))) == 2


def test_a_tile_is_a_polygon_at_its_level_0_pixels_with_its_scores_as_measurements() -> None:
    coords = np.array([[1024, 512], [2048, 512]])
    scores = {"tumour": np.array([0.25, -1.5]), "normal": np.array([-0.25, 1.5])}
    first, second = check_rfc_7946(to_geojson(tiles_to_geojson(coords, 512, scores)))
    ring = np.array(first["geometry"]["coordinates"][0])
    assert ring.min(0).tolist() == [1024, 512]
    assert ring.max(0).tolist() == [1536, 1024]
    assert signed_area(ring) == 512**2
    assert first["properties"] == {"objectType": "tile", "measurements": {"tumour": 0.25, "normal": -0.25}}
    assert second["properties"]["measurements"] == {"tumour": -1.5, "normal": 1.5}

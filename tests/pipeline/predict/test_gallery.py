"""The gallery shows the strongest tiles, as the slide has them."""

from pathlib import Path

import numpy as np
import pytest
from longslide import open_slide
from longslide.data.synthetic import write_pyramid
from longslide.pipeline.predict.gallery import strongest_tiles, write_gallery
from PIL import Image


def test_the_strongest_tiles_come_first_and_only_those_above_zero() -> None:
    coords = np.stack([np.arange(6) * 10, np.zeros(6, int)], 1)
    scores = np.array([0.1, -5.0, 0.7, 0.0, 0.3, -0.2])
    assert strongest_tiles(coords, 10, scores).tolist() == [2, 4, 0]
    assert strongest_tiles(coords, 10, -scores).tolist() == [1, 5]
    assert strongest_tiles(coords, 10, scores, count=1).tolist() == [2]
    assert strongest_tiles(coords, 10, np.zeros(6)).tolist() == []


def test_tiles_that_overlap_a_stronger_one_are_left_out() -> None:
    coords = np.stack([np.arange(6) * 5, np.zeros(6, int)], 1)
    assert strongest_tiles(coords, 10, np.array([3.0, 4.0, 5.0, 2.0, 1.0, 0.5])).tolist() == [2, 0, 4]


def test_pictures_are_the_tiles_at_full_resolution(tmp_path: Path) -> None:
    picture = np.zeros((512, 768, 3), np.uint8)
    coords = np.array([[x, y] for y in (0, 256) for x in (0, 256, 512)])
    for number, (x, y) in enumerate(coords):
        picture[y : y + 256, x : x + 256] = 30 * number + 20
    write_pyramid(tmp_path / "slide.svs", picture, mpp=0.25)
    scores = np.array([0.5, -0.5, 0.1, -0.9, 0.0, 0.9])
    folder = tmp_path / "gallery"
    with open_slide(tmp_path / "slide.svs") as slide:
        gallery = write_gallery(folder, slide, coords, 256, scores)
        assert [(tile.picture, tile.x, tile.y, tile.score) for tile in gallery] == [
            ("for-1.jpg", 512, 256, 0.9),
            ("for-2.jpg", 0, 0, 0.5),
            ("for-3.jpg", 512, 0, 0.1),
            ("against-1.jpg", 0, 256, -0.9),
            ("against-2.jpg", 256, 0, -0.5),
        ]
        for tile in gallery:
            with Image.open(folder / tile.picture) as saved:
                assert saved.size == (256, 256)
                assert np.asarray(saved).mean() == pytest.approx(picture[tile.y, tile.x, 0], abs=2)
        write_gallery(folder, slide, coords, 256, np.abs(scores), count=2)
    assert sorted(path.name for path in folder.iterdir()) == ["for-1.jpg", "for-2.jpg"], "nothing of the earlier one"

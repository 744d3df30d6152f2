"""Tiles like a given one are found without approximation, in an index that follows its feature files."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from longslide import LongslideError, TileIndex
from longslide.data.features.feature_file import write_features
from longslide.data.features.features import Features


def write_slide(folder: Path, name: str, embeddings: np.ndarray, encoder: str = "vit") -> Path:
    places = np.stack([np.arange(len(embeddings)) % 7, np.arange(len(embeddings)) // 7], 1) * 512
    path = folder / f"{name}.h5"
    write_features(path, Features(name, embeddings, places, 512, 512, 256, 0, 0.5, 0.25, (9999, 9999), encoder))
    return path


def cohort(
    folder: Path, dtype: type, sizes: tuple[int, ...] = (40, 1, 300, 17), width: int = 24
) -> dict[str, np.ndarray]:
    """Embeddings around a common mean, as those of real encoders: cosines lie close together."""
    random = np.random.default_rng(0)
    mean = 3 * random.normal(size=width)
    slides = {
        f"s{number}": (mean + random.normal(size=(size, width))).astype(dtype) for number, size in enumerate(sizes)
    }
    for name, embeddings in slides.items():
        write_slide(folder, name, embeddings)
    return slides


def by_hand(
    slides: dict[str, np.ndarray], slide_id: str, tile: int, n: int, other: bool
) -> list[tuple[str, int, float]]:
    """All cosines in float64, sorted."""
    query = slides[slide_id][tile].astype(np.float64)
    found = []
    for name, embeddings in slides.items():
        for number, row in enumerate(embeddings.astype(np.float64)):
            if (name, number) != (slide_id, tile) and not (other and name == slide_id):
                found.append((name, number, row @ query / np.linalg.norm(row) / np.linalg.norm(query)))
    return sorted(found, key=lambda one: -one[2])[:n]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("other", [False, True])
def test_the_tiles_found_are_those_of_all_cosines_in_double_precision(tmp_path: Path, dtype: type, other: bool) -> None:
    slides = cohort(tmp_path, dtype)
    index = TileIndex.open(tmp_path)
    assert len(index) == 358
    assert index.embeddings.dtype.itemsize == np.dtype(dtype).itemsize
    for slide_id, tile in (("s0", 0), ("s1", 0), ("s2", 299), ("s3", 5)):
        found = index.similar(slide_id, tile, 20, other_slides=other)
        wanted = by_hand(slides, slide_id, tile, 20, other)
        assert [(one.slide_id, one.tile) for one in found] == [(name, number) for name, number, _ in wanted]
        assert np.allclose([one.similarity for one in found], [cosine for *_, cosine in wanted], atol=1e-12)
        assert all((one.x, one.y) == (one.tile % 7 * 512, one.tile // 7 * 512) for one in found)
        assert all((one.features, one.size) == (tmp_path / f"{one.slide_id}.h5", 512) for one in found)


def test_tiles_that_half_precision_cannot_tell_apart_are_in_the_right_order(tmp_path: Path) -> None:
    """Cosines that differ by less than float16 resolves: the last ones in the files are the nearest."""
    random = np.random.default_rng(1)
    base, direction = random.normal(size=(2, 256))
    rows = [base + 0.02 * (500 - number) / 500 * direction for number in range(500)]
    slides = {"a": np.array([base]).astype(np.float16), "b": np.array(rows).astype(np.float16)}
    for name, embeddings in slides.items():
        write_slide(tmp_path, name, embeddings)
    found = TileIndex.open(tmp_path).similar("a", 0, 40)
    wanted = by_hand(slides, "a", 0, 40, False)
    assert np.allclose([one.similarity for one in found], [cosine for *_, cosine in wanted], atol=1e-12, rtol=0)
    assert np.ptp([one.similarity for one in found]) < 2**-11


def test_large_embeddings_do_not_overflow_and_zeros_are_like_nothing(tmp_path: Path) -> None:
    embeddings = np.zeros((4, 64), np.float16)
    embeddings[0], embeddings[1, ::2], embeddings[3, 0] = 60_000, 30_000, 1
    write_slide(tmp_path, "a", embeddings)
    found = TileIndex.open(tmp_path).similar("a", 0)
    assert [one.tile for one in found] == [1, 3, 2]
    assert [one.similarity for one in found] == pytest.approx([0.5**0.5, 1 / 8, 0])


def test_embeddings_that_are_no_numbers_are_like_no_tile(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    embeddings = np.random.default_rng(0).normal(size=(9, 8)).astype(np.float16)
    embeddings[4, 2] = np.nan
    write_slide(tmp_path, "a", embeddings)
    found = TileIndex.open(tmp_path).similar("a", 0)
    assert "1 tile has NaN" in caplog.text
    assert next(one.similarity for one in found if one.tile == 4) == 0
    assert len(found) == 8


def test_the_index_is_made_once_and_again_when_a_file_has_changed(tmp_path: Path) -> None:
    cohort(tmp_path, np.float16)
    made: list[tuple[int, int]] = []
    TileIndex.open(tmp_path, progress=lambda *how_far: made.append(how_far))
    assert made == [(1, 4), (2, 4), (3, 4), (4, 4)]
    made.clear()
    before = TileIndex.open(tmp_path, progress=lambda *how_far: made.append(how_far))
    assert not made, "nothing has changed"
    assert before.is_current()
    write_slide(tmp_path, "s1", np.ones((3, 24), np.float16))
    assert not before.is_current()
    after = TileIndex.open(tmp_path)
    assert len(after) == len(before) + 2
    (tmp_path / "s0.h5").unlink()
    assert "s0" not in TileIndex.open(tmp_path).slide_ids
    os.utime(tmp_path / "s2.h5", ns=(time.time_ns(), time.time_ns()))
    TileIndex.open(tmp_path, progress=lambda *how_far: made.append(how_far))
    assert made, "a file was written again"
    assert len(list((tmp_path / "tile-index").iterdir())) == 2, "indexes of earlier states are removed"
    assert before.similar("s0", 0), "an index that is open stays"


def test_a_broken_file_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cohort(tmp_path, np.float16)
    (tmp_path / "s9.h5").write_bytes(b"not HDF5")
    index = TileIndex.open(tmp_path)
    assert "s9.h5: not a readable HDF5 file" in caplog.text
    assert [path.name for path, _ in index.left_out] == ["s9.h5"]
    with pytest.raises(LongslideError, match=r"s9: no tiles of this slide in the index: .*not a readable HDF5 file"):
        index.similar("s9", 0)
    assert [path.name for path, _ in TileIndex.open(tmp_path).left_out] == ["s9.h5"], "also when it is opened again"


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LongslideError, match=r"no feature files \(\.h5\) in this folder"):
        TileIndex.open(tmp_path)
    cohort(tmp_path, np.float16)
    index = TileIndex.open(tmp_path)
    with pytest.raises(LongslideError, match="s1: has no tile 1, but 1 tile"):
        index.similar("s1", 1)
    with pytest.raises(LongslideError, match="s7: no tiles of this slide"):
        index.similar("s7", 0)
    assert len(index.similar("s0", 0, 10_000)) == 357
    write_slide(tmp_path, "t", np.ones((3, 24), np.float16), encoder="another")
    with pytest.raises(LongslideError, match="tile_encoder is vit in"):
        TileIndex.open(tmp_path)
    write_slide(tmp_path, "t", np.ones((3, 25), np.float16))
    with pytest.raises(LongslideError, match="mixed width"):
        TileIndex.open(tmp_path)


def test_files_of_several_folders_are_one_index_and_a_folder_moves_with_its_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    slides = cohort(tmp_path / "a", np.float16)
    write_slide(tmp_path / "b", "other", slides["s2"][:5])
    index = TileIndex.open([tmp_path / "a" / "s0.h5", tmp_path / "a" / "s2.h5", tmp_path / "b" / "other.h5"])
    best = index.similar("other", 3, 1)[0]
    assert (best.features, best.tile, best.similarity) == (tmp_path / "a" / "s2.h5", 3, pytest.approx(1))
    TileIndex.open(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "moved")
    made: list[int] = []
    assert len(TileIndex.open(tmp_path / "moved", progress=lambda done, of: made.append(done))) == 358
    assert not made
    with pytest.raises(LongslideError, match="no feature files to compare"):
        TileIndex.open([])


def test_the_index_may_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    cohort(tmp_path / "features", np.float16)
    TileIndex.open(tmp_path / "features", cache=tmp_path / "index")
    assert {path.suffix for path in (tmp_path / "features").iterdir()} == {".h5"}
    assert {path.suffix for path in (tmp_path / "index").iterdir()} == {".npy", ".npz"}


def test_two_feature_files_of_one_slide_are_refused(tmp_path: Path) -> None:
    files = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        files.append(write_slide(tmp_path / name, "a", np.ones((2, 8), np.float16)))
    with pytest.raises(LongslideError, match=r"first/a\.h5 and .*second/a\.h5: two feature files of one slide"):
        TileIndex.open(files)

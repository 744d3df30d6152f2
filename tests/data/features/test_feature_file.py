"""Feature files: complete or not there, read back as written, and other tools' files taken for what they are."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from longslide import Features, LongslideError, read_features
from longslide.data.features.feature_file import write_features


def grid(columns: int = 5, rows: int = 4, step: int = 512) -> np.ndarray:
    return np.array([(x * step, y * step) for y in range(rows) for x in range(columns)], np.int64)


def complete() -> Features:
    rng = np.random.default_rng(0)
    return Features(
        slide_id="slide 1",
        features=rng.normal(size=(20, 8)).astype(np.float16),
        coords=grid(step=448),
        step_level0=448,
        tile_size_level0=512,
        tile_px=256,
        overlap=32,
        tile_mpp=0.5,
        slide_mpp=0.25,
        level0_size=(9000, 7000),
        encoder="uni2-h",
        weights="random seed=0",
        precision="float16",
        tissue='{"type": "FeatureCollection", "features": []}',
        tissue_method="longslide-tissue-1",
        blur=rng.random(20).astype(np.float32),
        slide_embedding=rng.normal(size=16).astype(np.float32),
        slide_encoder="gigapath",
        slide_weights="random seed=0",
        pool="mean",
        slide_path="slides/slide 1.svs",
        quickhash="abc",
        settings={"min_tissue": 0.1, "mpp_source": "file"},
    )


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    written = complete()
    write_features(tmp_path / "slide 1.h5", written)
    read = read_features(tmp_path / "slide 1.h5")
    for name, value in vars(written).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(read, name), value)
            assert getattr(read, name).dtype == value.dtype
        else:
            assert getattr(read, name) == value, name
    assert [path.name for path in tmp_path.iterdir()] == ["slide 1.h5"], "nothing temporary is left"


def test_a_look_at_a_file_leaves_the_embeddings_on_the_disk(tmp_path: Path) -> None:
    write_features(tmp_path / "a.h5", complete())
    clam = write(tmp_path / "b.h5", {"features": np.ones((20, 6), np.float32), "coords": grid()[::-1]})
    for path in (tmp_path / "a.h5", clam):
        look, whole = read_features(path, embeddings=False), read_features(path)
        assert (look.features.shape, look.features.dtype) == (whole.features.shape, whole.features.dtype)
        assert look.features.strides == (0, 0), "no memory is taken"
        assert (look.encoder, look.layout, look.tile_mpp) == (whole.encoder, whole.layout, whole.tile_mpp)
        np.testing.assert_array_equal(look.cells, whole.cells)


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    write_features(tmp_path / "a.h5", complete())
    with h5py.File(tmp_path / "a.h5") as file:
        assert set(file) == {"features", "coords", "blur", "tissue", "slide_embedding"}
        assert (file["features"].dtype, file["coords"].dtype) == (np.float16, np.int64)
        assert (file["slide_embedding"].dtype, file["blur"].dtype) == (np.float32, np.float32)
        assert dict(file["features"].attrs) == {
            "encoder": "uni2-h", "weights": "random seed=0", "precision": "float16",
        }  # fmt: skip
        coords = dict(file["coords"].attrs)
        assert (coords["patch_size"], coords["patch_size_level0"], coords["overlap"]) == (256, 512, 32)
        assert (coords["target_mpp"], coords["level0_mpp"]) == (0.5, 0.25)
        assert (coords["level0_width"], coords["level0_height"]) == (9000, 7000)
        assert file["tissue"].attrs["method"] == "longslide-tissue-1"
        assert dict(file["slide_embedding"].attrs) == {
            "encoder": "gigapath", "weights": "random seed=0", "pool": "mean",
        }  # fmt: skip
        assert {"schema", "slide_id", "slide_path", "quickhash", "software", "created"} == set(file.attrs)
        chunks = file["features"].chunks
        assert chunks is None or chunks[0] >= len(file["features"]), "never one row per chunk"


def test_a_file_of_tile_embeddings_alone_is_enough(tmp_path: Path) -> None:
    write_features(tmp_path / "a.h5", Features("a", np.zeros((20, 3), np.float32), grid(), 512))
    read = read_features(tmp_path / "a.h5")
    assert read.slide_embedding is None
    assert read.tissue is None
    assert read.slide_mpp is None


WRITE_WITH_LITTLE_ROOM = """
import resource, signal, sys
import numpy as np
from longslide import Features, LongslideError
from longslide.data.features.feature_file import write_features
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_features(sys.argv[1], Features("a", np.zeros((100_000, 8), np.float32), np.zeros((100_000, 2), np.int64), 1))
except LongslideError as error:
    print(error)
"""


def test_a_write_that_runs_out_of_room_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    write_features(tmp_path / "a.h5", complete())
    before = (tmp_path / "a.h5").read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", WRITE_WITH_LITTLE_ROOM, str(tmp_path / "a.h5")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "a.h5: cannot write it" in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]
    assert (tmp_path / "a.h5").read_bytes() == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LongslideError, match="cannot write it"):
        write_features(tmp_path / "file" / "a.h5", complete())


def write(path: Path, datasets: dict[str, Any], attributes: dict[str, dict[str, Any]] | None = None) -> Path:
    with h5py.File(path, "w") as file:
        for name, data in datasets.items():
            file.create_dataset(name, data=data)
        for name, values in (attributes or {}).items():
            (file if name == "/" else file[name]).attrs.update(values)
    return path


CELLS = np.array([(x, y) for y in range(4) for x in range(5)])


def test_trident_of_a_40x_slide_keeps_its_grid(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.h5",
        {"features": np.ones((20, 6), np.float32), "coords": grid()},
        {
            "features": {"encoder": "uni_v1"},
            "coords": {
                "patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20,
                "overlap": 0, "name": "a", "savetodir": "x", "level0_width": 9000, "level0_height": 7000,
            },
        },
    )  # fmt: skip
    read = read_features(path)
    assert (read.layout, read.encoder, read.tile_px, read.tile_size_level0) == ("trident", "uni_v1", 256, 512)
    assert read.level0_size == (9000, 7000)
    assert read.tile_mpp == 0.5, "20x, so that files of 10x are not mixed in"
    np.testing.assert_array_equal(read.cells, CELLS)


def test_an_encoder_that_trident_has_no_name_for_is_not_known(tmp_path: Path) -> None:
    datasets = {"features": np.ones((20, 6), np.float32), "coords": grid()}
    attributes = {"features": {"encoder": "None"}, "coords": {"patch_size": 256, "patch_size_level0": 512}}
    assert read_features(write(tmp_path / "a.h5", datasets, attributes)).encoder is None


def test_trident_with_overlap_has_the_step_between_tiles(tmp_path: Path) -> None:
    attributes = {"coords": {"patch_size": 256, "patch_size_level0": 512, "overlap": 128}}
    path = write(tmp_path / "a.h5", {"features": np.ones((1, 20, 6)), "coords": grid(step=256)}, attributes)
    read = read_features(path)
    assert read.layout == "trident"
    assert read.features.shape == (20, 6)
    np.testing.assert_array_equal(read.cells, CELLS)


def test_clam_says_no_tile_size_and_the_grid_is_that_of_its_coordinates(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", {"features": np.ones((20, 6), np.float32), "coords": grid(step=512)})
    read = read_features(path)
    assert (read.layout, read.step_level0, read.encoder) == ("clam", 512, None)
    np.testing.assert_array_equal(read.cells, CELLS)


def test_clam_starts_its_grid_anew_for_each_piece_of_tissue(tmp_path: Path) -> None:
    coords = np.concatenate([grid() + np.array([37, 11]), grid() + np.array([5001, 43])])
    path = write(tmp_path / "a.h5", {"features": np.ones((40, 6), np.float32), "coords": coords})
    read = read_features(path)
    assert read.step_level0 == 512
    assert len(np.unique(read.cells, axis=0)) == 40


@pytest.mark.parametrize("name", ["features", "tile_embeds"])
def test_prov_gigapath_with_a_batch_axis(name: str, tmp_path: Path) -> None:
    coords = grid(step=256).astype(np.float32)
    path = write(tmp_path / "a.h5", {name: np.ones((1, 20, 1536), np.float32), "coords": coords[None]})
    read = read_features(path)
    assert read.layout == "prov-gigapath"
    assert read.features.shape == (20, 1536)
    assert read.coords.dtype == np.int64
    np.testing.assert_array_equal(read.cells, CELLS)


@pytest.mark.parametrize("size", [{"tile_size_um": 256.0}, {"tile_size": 256.0}])
def test_stamp_has_coordinates_in_microns(size: dict[str, float], tmp_path: Path) -> None:
    attributes = {
        "stamp_version": "2.4.0", "extractor": "virchow2-abc", "unit": "um", "tile_size_px": 224, "feat_type": "tile",
    }  # fmt: skip
    coords = (CELLS * 256.0).astype(np.float32)
    path = write(tmp_path / "a.h5", {"feats": np.ones((20, 6), np.float16), "coords": coords}, {"/": attributes | size})
    read = read_features(path)
    assert (read.layout, read.encoder, read.tile_px) == ("stamp", "virchow2-abc", 224)
    assert read.tile_mpp == pytest.approx(256 / 224)
    np.testing.assert_array_equal(read.cells, CELLS)


def test_stamp_tiles_are_a_little_further_apart_than_their_size(tmp_path: Path) -> None:
    # A tile of 256 um at 0.2527 um/px is 1013.06 px: STAMP steps 1014.
    cells = np.array([(x, y) for y in range(100) for x in range(0, 300, 3)])
    coords = (cells * 1014 * 0.2527).astype(np.float32)
    attributes = {"/": {"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224}}
    read = read_features(write(tmp_path / "a.h5", {"feats": np.ones((10000, 2)), "coords": coords}, attributes))
    np.testing.assert_array_equal(read.cells, cells)


@pytest.mark.parametrize("attributes", [{}, {"tile_size": 224}])
def test_a_file_of_the_first_stamp_has_tiles_of_224_px_over_256_um(attributes: dict[str, int], tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", {"feats": np.ones((20, 6), np.float16), "coords": CELLS * 224}, {"/": attributes})
    read = read_features(path)
    assert (read.layout, read.tile_px) == ("stamp", 224)
    assert read.tile_mpp == pytest.approx(256 / 224)
    np.testing.assert_array_equal(read.cells, CELLS)


@pytest.mark.parametrize("layout", ["clam", "trident", "stamp"])
def test_tiles_come_row_by_row_whatever_order_the_file_has(layout: str, tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(20)
    features = np.arange(20, dtype=np.float32)[:, None]
    attributes: dict[str, dict[str, Any]] = {
        "clam": {},
        "trident": {"coords": {"patch_size": 256, "patch_size_level0": 512, "overlap": 0}},
        "stamp": {"/": {"unit": "um", "tile_size_um": 512.0}},
    }[layout]
    name = "feats" if layout == "stamp" else "features"
    path = write(tmp_path / "a.h5", {name: features[order], "coords": grid()[order]}, attributes)
    read = read_features(path)
    assert read.layout == layout
    np.testing.assert_array_equal(read.cells, CELLS)
    np.testing.assert_array_equal(read.features, features)


def test_trident_skips_the_first_overlap(tmp_path: Path) -> None:
    # Its first step is a whole tile, the others are a tile less the overlap: no two tiles may fall in one cell.
    position = np.array([0, 512, 960, 1408, 1856])
    coords = np.array([(x, y) for x in position for y in position])
    attributes = {"coords": {"patch_size": 256, "patch_size_level0": 512, "overlap": 32}}
    read = read_features(write(tmp_path / "a.h5", {"features": np.ones((25, 6)), "coords": coords}, attributes))
    assert read.step_level0 == 448
    np.testing.assert_array_equal(read.cells, [(x, y) for y in range(5) for x in range(5)])


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"other": np.zeros(3)}, "not a feature file: it has other"),
        ({"features": np.zeros((3, 2))}, "not a feature file"),
        ({}, "it has nothing"),
        ({"features": np.zeros((3, 2)), "coords": np.zeros((4, 2))}, "do not belong together"),
        ({"features": np.zeros(3), "coords": np.zeros((3, 2))}, "do not belong together"),
        ({"features": np.zeros((2, 2)), "coords": np.array([[0.5, 0], [256, 0]])}, "not whole level-0 pixels"),
        ({"features": np.zeros((2, 2)), "coords": np.array([[np.nan, 0], [256, 0]])}, "not whole level-0 pixels"),
        ({"features": np.zeros((2, 2)), "coords": np.array([[0, 0], [256, 300]])}, "does not say its tile size"),
        (
            {"features": np.zeros((2, 2)), "coords": np.array([[0, 0], [4096, 0]], np.float16)},
            "are float16, which rounds",
        ),
        ({"feats": np.zeros((3, 2)), "coords": np.array([[0.0, 0], [256, 0], [512, 0]])}, "extract it again"),
        ({"feats": np.zeros((2, 2)), "coords": np.array([[0.0, 0], [np.nan, 0]])}, "extract it again"),
    ],
)
def test_a_file_whose_parts_do_not_fit_is_refused_in_one_line(
    datasets: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LongslideError, match=message) as caught:
        read_features(write(tmp_path / "a.h5", datasets))
    assert "a.h5" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write_features(tmp_path / "a.h5", complete())
    whole = (tmp_path / "a.h5").read_bytes()
    for size in (0, 100, len(whole) // 2):
        (tmp_path / "a.h5").write_bytes(whole[:size])
        with pytest.raises(LongslideError, match=r"a\.h5: not a readable HDF5 file"):
            read_features(tmp_path / "a.h5")


def test_nobody_is_told_to_delete_a_file_that_is_no_feature_file(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(b"II*\0" + bytes(100))
    with pytest.raises(LongslideError, match=r"a\.svs: not a feature file; give the \.h5 file of the slide$"):
        read_features(tmp_path / "a.svs")


def test_broken_bytes_are_never_more_than_one_line(tmp_path: Path) -> None:
    write_features(tmp_path / "a.h5", complete())
    whole = (tmp_path / "a.h5").read_bytes()
    rng = np.random.default_rng(1)
    refusals = []
    for _ in range(100):
        broken = bytearray(whole)
        start = int(rng.integers(len(whole) - 60))
        broken[start : start + 60] = rng.bytes(60)
        (tmp_path / "a.h5").write_bytes(broken)
        try:
            read_features(tmp_path / "a.h5")
        except LongslideError as error:
            refusals.append(str(error))
    assert len(refusals) > 10
    assert all("a.h5: " in refusal and len(refusal.splitlines()) == 1 for refusal in refusals)


def test_everything_but_the_embeddings_can_be_read_alone(tmp_path: Path) -> None:
    write_features(tmp_path / "a.h5", complete())
    whole, rest = read_features(tmp_path / "a.h5"), read_features(tmp_path / "a.h5", embeddings=False)
    assert (rest.features.shape, rest.features.dtype) == (whole.features.shape, whole.features.dtype)
    np.testing.assert_array_equal(rest.coords, whole.coords)
    assert (rest.weights, rest.tissue, rest.settings) == (whole.weights, whole.tissue, whole.settings)


def test_a_file_that_is_not_there_or_of_a_newer_version_is_named(tmp_path: Path) -> None:
    with pytest.raises(LongslideError, match=r"a\.h5: no such feature file"):
        read_features(tmp_path / "a.h5")
    write_features(tmp_path / "a.h5", complete())
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file.attrs["schema"] = 99
    with pytest.raises(LongslideError, match="newer Longslide"):
        read_features(tmp_path / "a.h5")


def write_atlaspatch(path: Path, encoders: dict[str, np.ndarray], coords: np.ndarray) -> None:
    """As AtlasPatch 1.0 writes it: five columns, attributes of the file, a dataset for each encoder."""
    with h5py.File(path, "w") as file:
        columns = np.hstack([coords, np.full((len(coords), 2), 512), np.zeros((len(coords), 1))])
        file["coords"] = columns.astype(np.int32)
        file["passports"] = np.full(len(coords), b"a__x0_y0", "S160")
        file.attrs.update(
            {
                "patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20,
                "overlap": 0, "level0_width": 9000, "level0_height": 7000, "wsi_path": "a.svs", "num_patches": len(coords),
            }
        )  # fmt: skip
        for name, values in encoders.items():
            file[f"features/{name}"] = values


def test_a_file_of_atlaspatch_is_read_with_the_encoder_that_it_names(tmp_path: Path) -> None:
    coords = np.array([[512, 0], [0, 512], [0, 0]])
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_atlaspatch(tmp_path / "a.h5", {"uni_v1": values}, coords)
    read = read_features(tmp_path / "a.h5")
    assert (read.layout, read.encoder, read.tile_px, read.tile_size_level0) == ("atlaspatch", "uni_v1", 256, 512)
    assert read.level0_size == (9000, 7000)
    np.testing.assert_array_equal(read.cells, [[0, 0], [1, 0], [0, 1]])
    np.testing.assert_array_equal(read.features, values[[2, 0, 1]])


@pytest.mark.parametrize(("said", "mpp"), [(20, 0.5), ("40", 0.25), ("None", None), ("20x", None), (0, None)])
def test_a_magnification_that_is_no_number_is_not_known(tmp_path: Path, said: object, mpp: float | None) -> None:
    write_atlaspatch(tmp_path / "a.h5", {"uni_v1": np.zeros((1, 4), np.float32)}, np.zeros((1, 2)))
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["target_magnification"] = said
    assert read_features(tmp_path / "a.h5").tile_mpp == mpp


def test_of_several_encoders_of_atlaspatch_one_is_named(tmp_path: Path) -> None:
    coords = np.array([[0, 0], [512, 0]])
    many = {"gigapath": np.ones((2, 3), np.float32), "uni_v1": np.zeros((2, 2), np.float32)}
    write_atlaspatch(tmp_path / "a.h5", many, coords)
    with pytest.raises(LongslideError, match=r"features of gigapath, uni_v1, which is wanted is not said; name one"):
        read_features(tmp_path / "a.h5")
    with pytest.raises(LongslideError, match=r"none of resnet"):
        read_features(tmp_path / "a.h5", encoder="resnet")
    assert read_features(tmp_path / "a.h5", encoder="gigapath").features.shape == (2, 3)
    write_atlaspatch(tmp_path / "b.h5", {}, coords)
    with h5py.File(tmp_path / "b.h5", "a") as file:
        file.create_group("features")
    with pytest.raises(LongslideError, match="coordinates of AtlasPatch without features"):
        read_features(tmp_path / "b.h5")

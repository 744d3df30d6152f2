"""Feature files from outside: no other file is read through them, and no more than they hold."""

import time
import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from longslide.data.features.feature_file import read_features
from longslide.errors import LongslideError

N, DIM = 20, 8


def coords() -> np.ndarray:
    return np.stack([np.arange(N) % 5, np.arange(N) // 5], 1) * 512


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """Another file, which no one meant to share."""
    path = tmp_path / "secret.h5"
    with h5py.File(path, "w") as file:
        file["features"] = np.full((N, DIM), 7.0, np.float32)
    np.full((N, DIM), 7.0, np.float32).tofile(tmp_path / "secret.bin")
    return path


def external_link(file: h5py.File, folder: Path) -> None:
    file["features"] = h5py.ExternalLink(folder / "secret.h5", "features")


def external_storage(file: h5py.File, folder: Path) -> None:
    file.create_dataset("features", (N, DIM), "f4", external=[(str(folder / "secret.bin"), 0, N * DIM * 4)])


def virtual(file: h5py.File, folder: Path) -> None:
    layout = h5py.VirtualLayout((N, DIM), "f4")
    layout[:] = h5py.VirtualSource(folder / "secret.h5", "features", (N, DIM))
    file.create_virtual_dataset("features", layout)


def link_in_a_group(file: h5py.File, folder: Path) -> None:
    file["features"] = np.zeros((N, DIM), np.float32)
    file.create_group("more")["x"] = h5py.ExternalLink(folder / "secret.h5", "features")


def soft_link_through_an_external_one(file: h5py.File, folder: Path) -> None:
    file["outside"] = h5py.ExternalLink(folder / "secret.h5", "/")
    file["features"] = h5py.SoftLink("/outside/features")


def declared(file: h5py.File, folder: Path) -> None:
    file.create_dataset("features", (1_500_000, 1536), "f4", chunks=(1000, 1536), compression="gzip")


def declared_contiguous(file: h5py.File, folder: Path) -> None:
    file.create_dataset("features", (1_500_000, 1536), "f4")


def half_written(file: h5py.File, folder: Path) -> None:
    data = file.create_dataset("features", (N, DIM), "f4", chunks=(5, DIM))
    data[:10] = 1


def objects(file: h5py.File, folder: Path) -> None:
    data = file.create_dataset("features", (N, DIM), h5py.ref_dtype)
    data[0, 0] = file["coords"].ref


def ragged(file: h5py.File, folder: Path) -> None:
    file.create_dataset("features", (N, DIM), h5py.vlen_dtype(np.float32))


def compound(file: h5py.File, folder: Path) -> None:
    file.create_dataset("features", data=np.zeros((N, DIM), [("a", "f4"), ("b", "i8")]))


def texts(file: h5py.File, folder: Path) -> None:
    file.create_dataset("features", data=np.full((N, DIM), b"1.0"))


def a_group(file: h5py.File, folder: Path) -> None:
    file.create_group("features").create_group("uni")


def reference_as_attribute(file: h5py.File, folder: Path) -> None:
    file["features"] = np.zeros((N, DIM), np.float32)
    file["coords"].attrs["patch_size"] = file["features"].ref


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (external_link, "a link into another file"),
        (external_storage, "lie in another file"),
        (virtual, "lie in another file"),
        (link_in_a_group, "a link into another file"),
        (soft_link_through_an_external_one, "a link into another file"),
        (declared, "declares 9,216,000,000 bytes, of which the file holds 0"),
        (declared_contiguous, "declares 9,216,000,000 bytes, of which the file holds 0"),
        (half_written, "not written whole"),
        (objects, "not plain numbers"),
        (ragged, "not plain numbers"),
        (compound, "not plain numbers"),
        (texts, "not plain numbers"),
        (a_group, "not a table of numbers"),
        (reference_as_attribute, "not a plain number or text"),
    ],
)
@pytest.mark.parametrize("embeddings", [True, False])
def test_a_file_that_reaches_outside_itself_is_refused(
    make: Any, said: str, embeddings: bool, secret: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["coords"] = coords()
        make(file, tmp_path)
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(LongslideError, match=said) as refused:
        read_features(path, embeddings=embeddings)
    assert time.process_time() - began < 2
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert str(path) in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_compressed_files_soft_links_and_other_content_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    features = np.random.default_rng(0).normal(size=(N, DIM)).astype(np.float32)
    with h5py.File(path, "w") as file:
        file["coords"] = coords()
        file.create_dataset("store/features", data=features, chunks=(7, DIM), compression="gzip", shuffle=True)
        file["features"] = h5py.SoftLink("/store/features")
        file["itself"] = file["/"]
        file["notes"] = np.zeros(3, [("a", "f4"), ("b", "i8")])
        file.attrs["comment"] = "anything"
    np.testing.assert_array_equal(read_features(path).features, features)


def test_a_slide_without_tiles_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["coords"] = np.zeros((0, 2), np.int64)
        file["coords"].attrs.update({"patch_size": 256, "patch_size_level0": 512, "overlap": 0})
        file["features"] = np.zeros((0, DIM), np.float32)
    assert read_features(path).features.shape == (0, DIM)

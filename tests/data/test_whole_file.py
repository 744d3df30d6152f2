"""Files that appear whole, and what killed writers left of them."""

import os
import shutil
import time
from pathlib import Path

import pytest
from longslide.data.whole_file import _listings, remove_leftovers, temporary_name, whole_path
from longslide.errors import LongslideError


def test_leftovers_of_this_file_alone_are_removed(tmp_path: Path) -> None:
    names = [".a.h5.12.tmp", ".a.h5.999.tmp", ".b.a.h5.12.tmp", ".a.h5.x.tmp", "a.h5", "a.h5.12.tmp"]
    for name in names:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "a.h5")
    assert {path.name for path in tmp_path.iterdir()} == set(names[2:])
    remove_leftovers(tmp_path / "missing" / "a.h5")


def test_a_large_folder_is_not_listed_for_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listings = []

    def slow(folder: Path, listdir: object = os.listdir) -> list[str]:
        listings.append(folder)
        time.sleep(0.05)
        return listdir(folder)  # type: ignore[operator, no-any-return]

    monkeypatch.setattr(os, "listdir", slow)
    for number in range(100):
        remove_leftovers(tmp_path / f"{number}.h5")
    assert len(listings) == 1
    time.sleep(max(0.0, _listings[tmp_path][0] - time.monotonic()))
    (tmp_path / ".5.h5.7.tmp").touch()
    remove_leftovers(tmp_path / "5.h5")
    assert len(listings) == 2
    assert not (tmp_path / ".5.h5.7.tmp").exists()


def test_a_folder_takes_the_place_of_another_when_it_is_complete(tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    for content in ("old", "new"):
        with whole_path(store) as unfinished:
            assert unfinished.name == store.name, "libraries go by the suffix"
            unfinished.mkdir()
            (unfinished / content).touch()
            assert not (store / content).exists()
        assert os.listdir(store) == [content]

    def on_a_full_disk() -> None:
        with whole_path(store) as unfinished:
            unfinished.mkdir()
            raise OSError(28, "No space left on device")

    with pytest.raises(LongslideError, match=r"a\.zarr: cannot write it \(the disk is full\)"):
        on_a_full_disk()
    assert os.listdir(store) == ["new"]
    assert os.listdir(tmp_path) == ["a.zarr"], "nothing is left behind"


def test_who_is_killed_while_a_folder_is_replaced_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "a.zarr"
    store.mkdir()
    (store / "old").touch()
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)  # before it could remove anything
        with whole_path(store) as unfinished:
            unfinished.mkdir()
            (unfinished / "new").touch()
    assert os.listdir(store) == ["new"]
    assert temporary_name(store).is_dir()
    with whole_path(store) as unfinished:  # by a process of the same number, as in a container
        unfinished.mkdir()
    assert os.listdir(tmp_path) == ["a.zarr"]
    temporary_name(store).mkdir()
    remove_leftovers(store)
    assert os.listdir(tmp_path) == ["a.zarr"]

"""Files that appear whole, and what killed writers left of them."""

import os
import time
from pathlib import Path

import pytest
from longslide.data.whole_file import remove_leftovers


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
    time.sleep(1.1)
    (tmp_path / ".5.h5.7.tmp").touch()
    remove_leftovers(tmp_path / "5.h5")
    assert len(listings) == 2
    assert not (tmp_path / ".5.h5.7.tmp").exists()

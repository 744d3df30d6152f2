"""Tiles as PNG files: a folder for each slide, or WebDataset shards. Both appear under their names only when complete."""

import io
import json
import os
import re
import shutil
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import cv2
import numpy as np

from ...data.whole_file import remove_leftovers, temporary_name

Layout = Literal["webdataset", "png"]


def png(tile: np.ndarray) -> bytes:
    """A tile `(h, w, 3)` uint8 RGB as PNG, which loses nothing."""
    done, encoded = cv2.imencode(".png", cv2.cvtColor(tile, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 3])
    assert done
    return encoded.tobytes()


class PictureFiles(ABC):
    """The pictures of one slide. A context manager: what is not finished when it ends is removed.

    Args:
        output: The folder of the job.
        slide_id: The slide.
    """

    def __init__(self, output: Path, slide_id: str) -> None:
        self.output = output
        self.slide_id = slide_id
        self.temporary = temporary_name(output / slide_id)
        remove_leftovers(output / slide_id)  # of a process that was killed: the slide is claimed
        self.temporary.mkdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.temporary, ignore_errors=True)

    @abstractmethod
    def add(self, x: int, y: int, picture: bytes, facts: Mapping[str, Any]) -> None:
        """Add a tile: its corner in level-0 pixels, its PNG, and what goes beside it."""

    @abstractmethod
    def finish(self) -> list[str]:
        """Give the files their names, in place of earlier ones.

        Returns:
            These, within the output folder.
        """


class PngFolder(PictureFiles):
    """`<slide_id>/<x>_<y>.png`."""

    def add(self, x: int, y: int, picture: bytes, facts: Mapping[str, Any]) -> None:
        """See `PictureFiles.add`; the facts stand in the slide's JSON."""
        (self.temporary / f"{x}_{y}.png").write_bytes(picture)

    def finish(self) -> list[str]:
        """See `PictureFiles.finish`."""
        remove_pictures(self.output, self.slide_id)
        self.temporary.rename(self.output / self.slide_id)
        return [f"{self.slide_id}/"]


class WebDatasetShards(PictureFiles):
    """`<slide_id>-000000.tar`, ..., with `<slide_id>/<x>_<y>.png` and `.json` for each tile.

    Args:
        output: The folder of the job.
        slide_id: The slide.
        tiles_per_shard: Tiles of a shard.
    """

    def __init__(self, output: Path, slide_id: str, tiles_per_shard: int) -> None:
        super().__init__(output, slide_id)
        self.tiles_per_shard = tiles_per_shard
        self._tiles = 0
        self._shards: list[str] = []
        self._tar: tarfile.TarFile | None = None

    def __exit__(self, *error: object) -> None:
        if self._tar is not None:
            self._tar.fileobj.close()  # not the archive: it would be ended, perhaps on a full disk
        super().__exit__(*error)

    def add(self, x: int, y: int, picture: bytes, facts: Mapping[str, Any]) -> None:
        """See `PictureFiles.add`."""
        if self._tiles % self.tiles_per_shard == 0:
            self._end_shard()
            self._shards.append(f"{self.slide_id}-{len(self._shards):06d}.tar")
            # Open here, so that it can be flushed to the disk; USTAR names may have 255 bytes, PAX ones any number.
            file = (self.temporary / self._shards[-1]).open("wb")
            self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._tiles += 1
        assert self._tar is not None
        for suffix, content in (("png", picture), ("json", json.dumps(dict(facts)).encode())):
            member = tarfile.TarInfo(f"{self.slide_id}/{x}_{y}.{suffix}")
            member.size = len(content)
            self._tar.addfile(member, io.BytesIO(content))

    def finish(self) -> list[str]:
        """See `PictureFiles.finish`."""
        self._end_shard()
        remove_pictures(self.output, self.slide_id)
        for shard in self._shards:
            (self.temporary / shard).rename(self.output / shard)
        return self._shards

    def _end_shard(self) -> None:
        if self._tar is not None:
            file: Any = self._tar.fileobj
            self._tar.close()
            file.flush()
            os.fsync(file.fileno())
            file.close()
            self._tar = None


def remove_pictures(output: Path, slide_id: str) -> None:
    """Remove the pictures of a slide, in either layout."""
    shutil.rmtree(output / slide_id, ignore_errors=True)
    for path in output.glob("*.tar"):
        if re.fullmatch(rf"{re.escape(slide_id)}-\d{{6}}\.tar", path.name):
            path.unlink()

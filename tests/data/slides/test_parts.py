"""A slide of which a part is missing is refused by the part's name, never read as the preview that it looks like."""

import os
from pathlib import Path

import numpy as np
import pytest
from longslide.data.slides.slide import open_slide
from PIL import Image

from ..refusals import refused


def refusal(path: Path) -> str:
    message = refused(open_slide, path)
    assert str(path) in message
    return message


def preview(path: Path, kind: str = "jpeg") -> Path:
    Image.fromarray(np.full((300, 400, 3), 200, np.uint8)).save(path, format=kind)
    return path


def test_the_real_mrxs_without_its_folder_names_the_folder() -> None:
    folder = os.environ.get("LONGSLIDE_TEST_CASES")
    if not folder:
        pytest.skip("LONGSLIDE_TEST_CASES, the folder with mrxs_alone, is not set")
    assert "the folder case1/" in refusal(Path(folder) / "mrxs_alone" / "case1.mrxs")


def test_an_mrxs_names_the_folder_or_file_that_is_missing(tmp_path: Path) -> None:
    path = preview(tmp_path / "a.b.mrxs")
    assert "the folder a.b/" in refusal(path)
    (tmp_path / "a.b").mkdir()
    assert "the file a.b/Slidedat.ini" in refusal(path)
    index = (
        "[HIERARCHICAL]\nINDEXFILE = Index.dat\n[DATAFILE]\nFILE_COUNT = 2\nFILE_0 = Data0.dat\nFILE_1 = Data1.dat\n"
    )
    (tmp_path / "a.b" / "Slidedat.ini").write_bytes(b"\xef\xbb\xbf" + index.encode())
    (tmp_path / "a.b" / "Index.dat").write_bytes(b"x")
    (tmp_path / "a.b" / "Data0.dat").write_bytes(b"x")
    assert "the file a.b/Data1.dat is missing" in refusal(path)


@pytest.mark.parametrize("suffix", [".vms", ".vmu"])
def test_a_hamamatsu_index_names_the_picture_that_is_missing(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    section = "Virtual Microscope Specimen" if suffix == ".vms" else "Uncompressed Virtual Microscope Specimen"
    path.write_text(
        f"[{section}]\nNoLayers=1\nNoJpegColumns=1\nNoJpegRows=1\nImageFile=a.jpg\nMapFile=a_map.jpg\nOptimisationFile=\n"
    )
    assert "the file a.jpg is missing" in refusal(path)
    preview(tmp_path / "a.jpg")
    assert "the file a_map.jpg is missing" in refusal(path)


@pytest.mark.parametrize("suffix", [".svs", ".mrxs", ".ndpi", ".scn", ".bif", ".vms", ".vmu", ".SVS"])
@pytest.mark.parametrize("kind", ["jpeg", "png", "bmp"])
def test_a_plain_image_under_a_slides_suffix_is_refused(tmp_path: Path, suffix: str, kind: str) -> None:
    message = refusal(preview(tmp_path / f"a{suffix}", kind))
    assert "missing" in message or f"plain {kind.upper()} image" in message

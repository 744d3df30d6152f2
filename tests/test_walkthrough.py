"""The walkthrough computes what it claims, and draws what it shows."""

import re
import runpy
import shutil
from pathlib import Path

from PIL import Image, ImageChops, ImageStat

PAGE = Path(__file__).parent.parent / "docs" / "walkthrough.md"


def test_every_claim_of_the_walkthrough_holds_and_its_pictures_are_what_its_blocks_draw(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    draw = runpy.run_path(str(PAGE.parent / "notebook.py"))["draw"]
    drawn = draw(Path(shutil.copy(PAGE, tmp_path)))
    assert {picture.name for picture in drawn} == {
        "patterns.png",
        "causal.png",
        "seconds.png",
        "slide.png",
        "gathered.png",
    }
    for picture in drawn:
        with Image.open(picture) as new, Image.open(PAGE.parent / "images" / picture.name) as shown:
            assert new.size == shown.size
            small = [image.convert("L").resize((32, 32)) for image in (new, shown)]  # letters differ by a pixel
            [difference] = ImageStat.Stat(ImageChops.difference(*small)).mean
            assert picture.name == "seconds.png" or difference < 2, picture.name


def test_every_picture_of_the_walkthrough_is_there() -> None:
    pictures = re.findall(r"\]\((images/[^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert len(pictures) == 8
    assert all((PAGE.parent / picture).is_file() for picture in pictures)

"""The walkthrough computes what it claims."""

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "walkthrough.md"


def test_every_block_of_the_walkthrough_runs_and_every_claim_in_it_holds() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)
    assert len(blocks) > 15


def test_the_pictures_of_the_walkthrough_are_there() -> None:
    pictures = re.findall(r"\]\((images/[^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert len(pictures) == 4
    assert all((PAGE.parent / picture).is_file() for picture in pictures)

"""The picture of a terminal shows what a command said, when it said it."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
SVG = "{http://www.w3.org/2000/svg}"


def record(tmp_path: Path, command: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(DOCS / "record_terminal.py"), str(tmp_path / "picture.svg"), command]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


def test_a_recording_has_every_line_in_order_and_at_its_time(tmp_path: Path) -> None:
    assert record(tmp_path, "echo 'a < b'; sleep 1; echo last").returncode == 0
    root = ElementTree.parse(tmp_path / "picture.svg").getroot()
    lines = [text.text for text in root.iter(f"{SVG}text")][1:]
    assert lines == ["$ echo 'a < b'; sleep 1; echo last", "a < b", "last"]
    [style] = [element.text for element in root.iter(f"{SVG}style")]
    begins = [float(share) for share in re.findall(r"@keyframes l\d+\{0%,([\d.]+)%", style)]
    [length] = {float(seconds) for seconds in re.findall(r"animation:move ([\d.]+)s", style)}
    assert begins[0] == 0
    assert 0.9 < (begins[2] - begins[1]) * length / 100 < 2.5, "a second lies between the two"


def test_a_command_that_fails_leaves_no_picture(tmp_path: Path) -> None:
    failed = record(tmp_path, "echo no; exit 3")
    assert failed.returncode == 1
    assert "ended with status 3" in failed.stderr
    assert not (tmp_path / "picture.svg").exists()


def test_the_recording_in_the_readme_is_one_of_the_demo_and_takes_a_minute() -> None:
    text = (DOCS / "images" / "demo.svg").read_text(encoding="utf-8")
    [shown] = re.findall(r"<title>longslide demo: \d+ seconds(?:, shown ([\d.]+) times as fast)?</title>", text)
    assert float(shown or 1) < 3, "the README promises a few minutes"
    assert "What to do next" in text
    [seconds] = set(re.findall(r"animation:move ([\d.]+)s", text))
    assert float(seconds) <= 61
    assert "images/demo.svg" in (DOCS.parent / "README.md").read_text(encoding="utf-8")

"""Pages of the documentation are notebooks, and what they do works."""

import base64
import json
import re
import runpy
from pathlib import Path

import matplotlib
import pytest

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOKS = ("notebook-embed", "notebook-train", "notebook-explain")


def make(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """The cells of the notebook of a page."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["notebook.py", str(page)])
    runpy.run_path(str(DOCS / "notebook.py"), run_name="__main__")
    content = json.loads((folder / f"{page.stem}.ipynb").read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    return content["cells"]


@pytest.mark.slow
def test_the_three_notebooks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("agg")
    for name in NOTEBOOKS:
        names: dict[str, object] = {}
        for cell in make(DOCS / f"{name}.md", tmp_path, monkeypatch):
            if cell["cell_type"] == "code":
                exec(compile(str(cell["source"]), f"{name}, {cell['id']}", "exec"), names)
        matplotlib.pyplot.close("all")
    assert (tmp_path / "features" / "qc" / "index.html").is_file()
    assert (tmp_path / "runs" / "abmil" / "report.html").is_file()
    assert (tmp_path / "comparison" / "comparison.html").is_file()
    assert (tmp_path / "results" / "slides" / "new" / "tiles.geojson").is_file()


@pytest.mark.parametrize("name", [*NOTEBOOKS, "walkthrough"])
def test_a_notebook_has_all_of_its_page_in_its_order(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    cells = make(DOCS / f"{name}.md", tmp_path, monkeypatch)
    code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    assert code == [block.strip() for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:  # a notebook is one file that can be moved: Jupyter finds no pictures by a path of the disk
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", str(cell["source"])):
            [attachment] = cell["attachments"][picture.removeprefix("attachment:")].values()
            assert base64.b64decode(attachment) == (DOCS / "images" / picture.removeprefix("attachment:")).read_bytes()
        for link in re.findall(r"\]\(([^)#:]+\.md)", str(cell["source"])):
            assert (tmp_path / link).is_file()

"""Make a Jupyter notebook of a page of the documentation: its Python blocks become cells of code, the rest cells of text.

python docs/notebook.py docs/walkthrough.md          # writes walkthrough.ipynb into the current folder
python docs/notebook.py --draw docs/walkthrough.md   # runs the blocks and writes the pictures right below them
"""

import base64
import json
import os
import re
import sys
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
PICTURE = re.compile(r"!\[([^\]]*)\]\((images/([^)]+))\)")
DRAWN = re.compile(rf"\s*{PICTURE.pattern}\n")
"""A picture right below a block: what the block draws."""


def notebook(page: Path, target: Path) -> dict[str, object]:
    """A notebook (nbformat 4.5) of a page in Markdown, which holds the page's pictures.

    Args:
        page: The page.
        target: The folder in which the notebook is to lie: other pages are linked from there.
    """
    parts = BLOCK.split(page.read_text(encoding="utf-8"))
    cells: list[dict[str, object]] = []
    for number, part in enumerate(parts):
        cell: dict[str, object] = {"id": f"cell-{number}", "metadata": {}}
        if number % 2:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": [], "source": part.strip()}
        else:
            text = DRAWN.sub("", part, count=1) if number and DRAWN.match(part) else part
            pictures = {name: page.parent / path for _, path, name in PICTURE.findall(text)}
            if pictures:
                cell["attachments"] = {name: _attachment(path) for name, path in pictures.items()}
            text = PICTURE.sub(r"![\1](attachment:\3)", text)
            text = re.sub(r"\]\((\w[\w-]*\.md)", rf"]({os.path.relpath(page.parent, target)}/\1", text)
            cell |= {"cell_type": "markdown", "source": text.strip()}
        if cell["source"]:
            cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def _attachment(picture: Path) -> dict[str, str]:
    kind = {".png": "image/png", ".jpg": "image/jpeg", ".svg": "image/svg+xml"}[picture.suffix]
    return {kind: base64.b64encode(picture.read_bytes()).decode()}


def draw(page: Path) -> list[Path]:
    """Run a page's blocks, and write the pictures of which each is a `figure` in a block.

    Returns:
        The pictures.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    parts = BLOCK.split(page.read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    drawn = []
    for number in range(1, len(parts), 2):
        exec(compile(parts[number], f"{page.name}, block {number // 2}", "exec"), names)
        figure, below = names.pop("figure", None), DRAWN.match(parts[number + 1])
        if bool(below) != isinstance(figure, Figure):
            sys.exit(f"{page.name}, block {number // 2}: a picture has its place right below the block that draws it")
        if below and isinstance(figure, Figure):
            drawn.append(page.parent / below[2])
            figure.savefig(drawn[-1], dpi=120 if figure.get_figwidth() < 12 else None)
    return drawn


def main() -> None:
    """Write the notebooks, or the pictures, of the pages that are named."""
    pages = [Path(name) for name in sys.argv[1:] if name != "--draw"]
    if not pages:
        sys.exit(__doc__)
    for page in pages:
        if "--draw" in sys.argv:
            print(*draw(page), sep="\n")
            continue
        target = Path(page.stem + ".ipynb")
        target.write_text(json.dumps(notebook(page, Path.cwd()), indent=1), encoding="utf-8")
        print(target)


if __name__ == "__main__":
    main()

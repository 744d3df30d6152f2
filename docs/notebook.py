"""Make a Jupyter notebook of a page of the documentation: its Python blocks become cells of code, the rest cells of text.

python docs/notebook.py docs/walkthrough.md        # writes walkthrough.ipynb into the current folder
"""

import json
import re
import sys
from pathlib import Path


def notebook(page: str, folder: Path) -> dict[str, object]:
    """A notebook (nbformat 4.5) of a page in Markdown.

    Args:
        page: The page's text.
        folder: Where the page lies: its pictures are named from there.
    """
    page = re.sub(r"\]\((images/[^)]+)\)", lambda match: f"]({(folder / match[1]).resolve()})", page)
    cells: list[dict[str, object]] = []
    for number, part in enumerate(re.split(r"^```python\n(.*?)^```\n", page, flags=re.DOTALL | re.MULTILINE)):
        if not part.strip():
            continue
        cell: dict[str, object] = {"id": f"cell-{number}", "metadata": {}, "source": part.strip()}
        if number % 2:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
        else:
            cell["cell_type"] = "markdown"
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def main() -> None:
    """Write the notebooks of the pages that are named."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for name in sys.argv[1:]:
        page = Path(name)
        target = Path(page.stem + ".ipynb")
        target.write_text(
            json.dumps(notebook(page.read_text(encoding="utf-8"), page.parent), indent=1), encoding="utf-8"
        )
        print(target)


if __name__ == "__main__":
    main()

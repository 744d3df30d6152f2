"""HTML pages that stand alone: one file with its style and pictures inside, no network; and the figures beside it as files.

A `Page` is built from top to bottom out of a few parts (facts, headings, notes, tables, pictures), the same for every page;
the parts are the macros of `templates/macros.html`, the frame is `templates/page.html`.
"""

import base64
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...data.table import csv_of_frame
from ...data.whole_file import write_whole
from ...version import __version__
from .figure_files import OUTLINES, drawn, write_vectors

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

FIGURES = "figures"
"""The folder of the figures, beside the page."""

Cell = str | tuple[str, str]
"""A text, or a text and the small print below it."""


class Table(NamedTuple):
    """A table of a page; `numeric` are the columns that are right-aligned."""

    columns: list[str]
    rows: list[list[Cell]]
    numeric: list[str]


class Picture(NamedTuple):
    """A figure of a page.

    Attributes:
        figure: The figure, of matplotlib.
        points: What is drawn, as a table: `figures/<name>.csv`.
        alt: What it shows, in words; its files are named so.
        caption: What is written below.
    """

    figure: "Figure"
    points: "pd.DataFrame"
    alt: str
    caption: str = ""


class Page:
    """A page as it is put together.

    Args:
        title: Its title.
        subtitle: The line below.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        import jinja2

        self.title, self.subtitle = title, subtitle
        self._environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
        )
        self._macros: Any = self._environment.get_template("macros.html").module
        self._parts: list[str] = []
        self._styles: list[str] = []
        self._pictures: list[Picture] = []

    def facts(self, facts: Sequence[tuple[str, str, str]]) -> None:
        """The numbers at the top: name, value and small print each."""
        self._parts.append(self._macros.facts(facts))

    def heading(self, text: str, level: int = 2) -> None:
        """A heading."""
        self._parts.append(self._macros.heading(text, level))

    def note(self, *sentences: str) -> None:
        """A paragraph of small print; nothing if no sentence says anything."""
        if any(sentences):
            self._parts.append(self._macros.note(" ".join(filter(None, sentences))))

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(self._macros.text(text))

    def warning(self, text: str) -> None:
        """What must not be overlooked; nothing if the text is empty."""
        if text:
            self._parts.append(self._macros.warning(text))

    def table(self, table: Table | None) -> None:
        """A table, if there is one."""
        if table is not None:
            self._parts.append(self._macros.table(*table))

    def code(self, text: str) -> None:
        """Text as it is in a file."""
        self._parts.append(self._macros.code(text))

    def pictures(self, pictures: Sequence[Picture]) -> None:
        """Figures side by side, if there are any."""
        if pictures:
            shown = [(figure_uri(picture.figure), picture.alt, picture.caption.strip()) for picture in pictures]
            self._parts.append(self._macros.figures(shown))
            self._pictures += pictures
            for picture in pictures:
                picture.figure.set_layout_engine(None)  # it is laid out: its files are only drawn

    @contextmanager
    def details(self, summary: str) -> Iterator[None]:
        """What is added inside is folded up."""
        before, self._parts = self._parts, []
        try:
            yield
        finally:
            inside, self._parts = self._parts, before
        self._parts.append(self._macros.details(summary, self._joined(inside)))

    def template(self, name: str, **content: Any) -> None:
        """A part with a template of its own in `templates/`; a name that it lacks is an error."""
        from markupsafe import Markup

        self._parts.append(Markup(self._environment.get_template(name).render(**content)))

    def style(self, name: str) -> None:
        """A style sheet in `templates/` for such a part."""
        self._styles.append(Path(__file__).with_name("templates").joinpath(name).read_text(encoding="utf-8"))

    def write(self, path: Path) -> Path:
        """Write the page, and its figures into `figures/` beside it: each as PDF, SVG and a CSV of its points.

        Args:
            path: The HTML file; replaced if it is there, and never seen half written.

        Returns:
            `path`.

        Raises:
            LongslideError: A file cannot be written.
        """
        taken: set[str] = set()
        for picture in self._pictures:
            taken.add(name := _file_name(picture.alt, taken))
            write_picture(path.parent / FIGURES / name, picture)
        text = self._environment.get_template("page.html").render(
            title=self.title,
            subtitle=self.subtitle,
            style=self._joined(self._styles),
            content=self._joined(self._parts),
            figures=FIGURES if self._pictures else "",
            version=__version__,
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
        write_whole(path, text.encode(), "folder")
        return path

    @staticmethod
    def _joined(parts: Sequence[str]) -> str:
        from markupsafe import Markup

        return Markup("\n").join(map(Markup, parts))


def figure_uri(figure: "Figure") -> str:
    """A matplotlib figure as a data URI of an SVG: sharp at any size and in print."""
    return "data:image/svg+xml;base64," + base64.b64encode(drawn(figure, "svg", OUTLINES)).decode()


def write_picture(path: Path, picture: Picture) -> None:
    """Write a figure as PDF and SVG, whose text a drawing program can edit, and its points as CSV.

    Args:
        path: Its files, without their suffixes.
        picture: The figure.

    Raises:
        LongslideError: A file cannot be written.
    """
    write_vectors(path, picture.figure)
    write_whole(path.with_name(f"{path.name}.csv"), csv_of_frame(picture.points), "folder")


def _file_name(text: str, taken: Collection[str]) -> str:
    """A name for files that shows what is in them, and is no other's: not on a disk that ignores case either."""
    name = re.sub(r"[^\w.-]+", "-", text).strip("-").lower() or "figure"
    number = 1
    while (found := name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return found

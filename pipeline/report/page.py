"""HTML pages that stand alone: one file with its style and pictures inside, no script, no network.

A page is a Jinja template in `templates/` that extends `page.html` (the frame and the style of all pages) and may use the
parts in `macros.html` (tables, figures, facts).
"""

import base64
import io
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...data.whole_file import write_whole
from ...version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Picture(NamedTuple):
    """A picture of a page, for the macro `figure`.

    Attributes:
        uri: Data URI.
        alt: What it shows, in words.
        caption: What is written below.
    """

    uri: str
    alt: str
    caption: str = ""


def write_page(path: Path, template: str, *, title: str, **content: Any) -> Path:
    """Fill a template and write the page.

    Args:
        path: The HTML file; replaced if it is there, and never seen half written.
        template: File name in `templates/`.
        title: Title of the page.
        **content: What the template names. A name that is missing is an error.

    Returns:
        `path`.

    Raises:
        LongslideError: The file cannot be written.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    text = environment.get_template(template).render(title=title, version=__version__, made=made, **content)
    write_whole(path, text.encode(), "folder")
    return path


def figure_uri(figure: "Figure") -> str:
    """A matplotlib figure as a data URI of an SVG: sharp at any size and in print."""
    import matplotlib

    content = io.BytesIO()
    # Text as outlines, so that it looks the same everywhere; no metadata, so that the same figure gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "longslide"}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


def picture(figure: "Figure", alt: str, caption: str = "") -> Picture:
    """A matplotlib figure as a picture of a page."""
    return Picture(figure_uri(figure), alt, caption.strip())

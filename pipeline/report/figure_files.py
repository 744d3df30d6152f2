"""matplotlib figures as files whose text is text."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...data.whole_file import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EDITABLE: dict[str, Any] = {"svg.fonttype": "none", "pdf.fonttype": 42, "image.composite_image": False}
"""Settings of SVG and PDF: text is text, pictures that lie on one another stay apart, for a drawing program."""

OUTLINES: dict[str, Any] = {"svg.fonttype": "path"}
"""Settings of an SVG that looks the same everywhere."""


def drawn(figure: "Figure", kind: Literal["svg", "pdf", "png"], settings: dict[str, Any] = EDITABLE) -> bytes:
    """A figure as the content of a file; the same figure gives the same bytes.

    Args:
        figure: The figure.
        kind: The format.
        settings: Further settings of matplotlib.
    """
    import matplotlib

    content = io.BytesIO()
    # No date and no random ids.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[kind]
    with matplotlib.rc_context({"svg.hashsalt": "longslide"} | settings):
        figure.savefig(content, format=kind, metadata=metadata)
    return content.getvalue()


def write_vectors(path: Path, figure: "Figure") -> None:
    """Write a figure as SVG and PDF.

    Args:
        path: Its files, without their suffixes.
        figure: The figure.

    Raises:
        LongslideError: A file cannot be written.
    """
    kinds: tuple[Literal["svg", "pdf"], ...] = ("svg", "pdf")
    for kind in kinds:
        write_whole(path.with_name(f"{path.name}.{kind}"), drawn(figure, kind), "folder")

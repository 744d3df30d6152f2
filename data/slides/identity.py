"""Which slide something was made of: another one of the same file name must never be taken for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import printable

if TYPE_CHECKING:
    from .slide import Slide


@dataclass(frozen=True)
class SlideIdentity:
    """A slide file as it was when something was made of it; None for what was not recorded.

    Attributes:
        path: The file, absolute.
        quickhash: Identity of its image data: `Slide.quickhash`.
        size: Its size in bytes.
        modified: When it was last written, in nanoseconds since 1970.
    """

    path: str | None = None
    quickhash: str | None = None
    size: int | None = None
    modified: int | None = None

    @classmethod
    def of(cls, slide: "Slide") -> "SlideIdentity":
        """Of an open slide."""
        path = slide.path.absolute()
        now = path.stat()
        return cls(printable(str(path)), slide.quickhash, now.st_size, now.st_mtime_ns)

    def mismatch(self, path: Path) -> str | None:
        """Why a slide file is not the one recorded here; None if it is, or nothing was recorded.

        A file that was not touched since is not opened. One that has moved is known by its image data; one written again at
        its place may have been damaged before, somewhere that the quickhash does not cover.

        Raises:
            LongslideError: The file has moved, and cannot be opened to compare.
        """
        if self.path is None:
            return None
        in_place = self.path == printable(str(path.absolute())) or Path(self.path).resolve() == path.resolve()
        try:
            now = path.stat()
        except OSError:  # the slide is away: its path is all there is to compare
            return None if in_place else f"made of another slide, {self.path}"
        if in_place and self.size is not None and self.modified is not None:
            # Whole microseconds: some file servers keep no more.
            same = (self.size, self.modified // 1000) == (now.st_size, now.st_mtime_ns // 1000)
            return None if same else "made before the slide file was written again"
        if self.quickhash is None:
            return None if in_place else f"made of another slide, {self.path}"
        if self.size is not None and self.size != now.st_size:
            return f"made of another slide, {self.path}"
        from .slide import open_slide  # only here: feature files are read where no slide is

        with open_slide(path) as slide:
            return None if slide.quickhash == self.quickhash else f"made of another slide, {self.path}"

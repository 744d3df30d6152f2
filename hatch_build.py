"""The link that an editable install imports: `.editable/longslide`, the repository whatever its folder is called."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EditableLink(BuildHookInterface):
    """Type checkers follow a folder on the path, not a hook of the import system; and new files are seen at once."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make the link, for editable wheels."""
        link = Path(self.root, ".editable", "longslide")
        if version == "editable" and not link.exists():
            link.parent.mkdir(exist_ok=True)
            link.symlink_to("..", target_is_directory=True)

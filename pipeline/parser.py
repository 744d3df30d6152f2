"""Options as users type them, and one line for what they get wrong. Built on jsonargparse; nothing here imports torch."""

import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from ..errors import LongslideError

set_parsing_settings(instantiate_subclass_spec_in_any=False)  # the Trainer's options stay as they are until it is built


class OptionParser(ArgumentParser):
    """A parser for which `--tile-px` and `--tile_px` are one option, and a bare `--overwrite` sets a bool."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add an option under its name with dashes."""
        if kwargs.get("type") is bool:
            kwargs |= {"nargs": "?", "const": True}
        names = (name.replace("_", "-") if name.startswith("--") else name for name in args)
        return super().add_argument(*names, **kwargs)

    def parse_args(self, args: Sequence[str], **kwargs: Any) -> Any:  # type: ignore[override]
        """Parse the words of a command line."""
        return super().parse_args([self._as_added(word) for word in args], **kwargs)

    def _as_added(self, word: str) -> str:
        """A word with its option's name as it was added; what follows the name of a dictionary or a class is Python's."""
        if not word.startswith("--"):
            return word
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        known = name
        while known not in self._option_string_actions and "." in known:
            known = known.rpartition(".")[0]
        return known + name[len(known) :].replace("-", "_") + equals + value

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The groups of options first, then the options without a group."""
        positional, ungrouped, *groups = self._action_groups
        self._action_groups = [positional, *groups, ungrouped]
        try:
            return super().format_help(*args, **kwargs)
        finally:
            self._action_groups = [positional, ungrouped, *groups]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """One line, instead of the usage of all options and a paragraph on types; exit status 2, or an error in Python."""
        if not self.exit_on_error:
            raise LongslideError(one_line(message)) from ex
        print(f"{self.prog}: {one_line(message)}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def one_line(message: str) -> str:
    """What jsonargparse says of a mistake, in the words of the command line."""
    value = re.search(r'key "(\S+)":.*(?:Given|Got) value: (.*)', message, re.DOTALL)
    if value is not None:
        choices = re.search(r"Literal\[([^]]*)\]", message)
        is_list = re.search(r"\b[Ll]ist\[", message) and not value[2].startswith("[")
        message = f"{_option(value[1])} cannot be {value[2]}" + (f", but {choices[1]}" if choices else "")
        if is_list and not choices:
            message += f", but a list such as [{value[2].strip()}]"
    elif "does not support item assignment" in message:  # `slides: a.svs` in a YAML file
        message = "slides must be a list in a YAML file: `slides: [a.svs]`"
    elif missing := re.search(r"arguments are required: (.*)", message):
        message = f"{', '.join(_option(name) for name in missing[1].split(', '))} must be given"
    return " ".join(message.split()).rstrip(".")


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"

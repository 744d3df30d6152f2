"""YAML files from outside: plain types alone, and no more of them than the file has."""

from pathlib import Path
from typing import Any

import yaml

from .errors import LongslideError

MOST_VALUES = 1_000_000
"""Values that a file may stand for when its aliases are written out: a few lines of them can stand for billions."""


def read_yaml(path: Path, what: str) -> Any:
    """Read a YAML file.

    Args:
        path: The file.
        what: What it is, such as `tile encoder`, for the messages.

    Returns:
        What is in it, in plain types.

    Raises:
        LongslideError: No such file, not YAML, or one whose aliases stand for more than `MOST_VALUES` values.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return _load(text)
    except FileNotFoundError:
        raise LongslideError(f"{path}: no such {what} file") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise LongslideError(f"{path}{place}: not YAML: {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise LongslideError(f"{path}: not a readable YAML file ({reason})") from error


def _load(text: str) -> Any:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"its aliases stand for more than {MOST_VALUES:,} values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Values that a node stands for, each alias counted as often as it is used."""
    if id(node) in known:
        if known[id(node)] < 0:
            raise yaml.YAMLError("an alias stands for something that it is itself a part of")
        return known[id(node)]
    known[id(node)] = -1
    inside = []
    if isinstance(node, yaml.MappingNode):
        inside = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inside = node.value
    known[id(node)] = 1 + sum(_values(part, known) for part in inside)
    return known[id(node)]

"""Task files of prov-gigapath: YAML with `setting`, `label_dict` and `max_tiles`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import LongslideError
from ...task import TaskKind
from ...yaml_file import read_yaml

_SETTINGS: dict[str, TaskKind] = {
    "binary": "binary",
    "multi_class": "multiclass",
    "multi_label": "multilabel",
    "continuous": "regression",
}


@dataclass(frozen=True)
class TaskFile:
    """What such a file says.

    Attributes:
        kind: Kind of task.
        label: Label columns; those of `label_dict` for `multilabel`, `label` otherwise.
        classes: Class names in the order of their numbers; values that share a number are one class, `a/b`.
        renamed: Value in the table -> class name, where the two differ.
        max_tiles: Tiles of a slide that are used.
    """

    kind: TaskKind
    label: tuple[str, ...] = ("label",)
    classes: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    max_tiles: int | None = None


def read_task_file(path: Path) -> TaskFile:
    """Read a task file.

    Args:
        path: The YAML file. `shuffle_tiles` is not heeded: the order of the tiles is part of a slide encoder's input.

    Raises:
        LongslideError: Not such a file.
    """
    content: Any = read_yaml(path, "task")
    if not isinstance(content, dict):
        raise LongslideError(f"{path}: not a task file; expected `setting` and `label_dict`")
    setting = str(content.get("setting", "multi_class"))
    if setting not in _SETTINGS:
        raise LongslideError(f"{path}: `setting` {setting!r} is none of {', '.join(_SETTINGS)}")
    kind = _SETTINGS[setting]
    max_tiles = content.get("max_tiles")
    if max_tiles is not None and (not isinstance(max_tiles, int) or max_tiles < 1):
        raise LongslideError(f"{path}: `max_tiles` {max_tiles!r} must be a whole number above 0")
    if kind == "regression":
        return TaskFile(kind, max_tiles=max_tiles)
    numbers = content.get("label_dict")
    if not isinstance(numbers, dict) or not numbers or not all(isinstance(n, int) for n in numbers.values()):
        raise LongslideError(f"{path}: no `label_dict` that gives each label its number")
    values: dict[int, list[str]] = {}
    for value, number in numbers.items():
        values.setdefault(number, []).append(str(value))
    names = {number: "/".join(values[number]) for number in sorted(values)}
    classes = tuple(names.values())
    if kind == "multilabel":
        return TaskFile(kind, label=classes, classes=classes, max_tiles=max_tiles)
    renamed = tuple((value, names[number]) for number in names for value in values[number] if value != names[number])
    return TaskFile("binary" if len(classes) == 2 else kind, classes=classes, renamed=renamed, max_tiles=max_tiles)

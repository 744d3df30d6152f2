"""The facts of an encoder as a YAML file, checked against the types of its dataclass. Without torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from jsonargparse import ArgumentError, ArgumentParser

from ..errors import LongslideError
from ..registry import plain_numbers
from ..yaml_file import read_yaml

if TYPE_CHECKING:  # where jsonargparse's types are Any
    PositiveInt = int
    NonNegativeInt = int
    PositiveFloat = float
    Share = float
else:
    from jsonargparse.typing import ClosedUnitInterval as Share  # noqa: F401
    from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt  # noqa: F401

Spec = TypeVar("Spec")

Shown = Literal["code", "number", "not shown"]
"""What our code of a published model was held against: its own code, run beside ours, or a number that was published."""


def read_spec(path: Path, spec: type[Spec], what: str) -> Spec:
    """Read a YAML file whose keys are the fields of a dataclass.

    Args:
        path: The file.
        spec: The dataclass.
        what: What the file describes, such as `tile encoder`, for the messages.

    Raises:
        LongslideError: No such file, not YAML, or a key that is unknown, missing or of the wrong type.
    """
    content = read_yaml(path, what)
    parser = ArgumentParser(exit_on_error=False)
    known = parser.add_class_arguments(spec)
    if not isinstance(content, dict):
        raise LongslideError(f"{path}: a {what} is a mapping with the keys {', '.join(known)}.")
    if unknown := [str(key) for key in content if key not in known]:
        raise LongslideError(f"{path}: unknown key {', '.join(unknown)}; known are {', '.join(known)}.")
    if missing := sorted({action.dest for action in parser._actions if action.required} - content.keys()):
        raise LongslideError(f"{path}: missing key {', '.join(missing)}.")
    try:
        values = vars(parser.instantiate(parser.parse_object(content)))
        return spec(**{key: plain_numbers(value) for key, value in values.items()})
    except ArgumentError as error:
        reason = " ".join(str(error).replace('Parser key "', "").replace('":', ":").split())
        raise LongslideError(f"{path}: {reason}.") from error
    except ValueError as error:
        raise LongslideError(f"{path}: {error}.") from error

"""The one exception a user's mistake raises."""

import re

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, marks that reverse the direction of text, and bytes that are no UTF-8, as Python keeps them."""


class LongslideError(Exception):
    """Something a user can put right: the message says what was wrong, with which file, and what to do.

    The command line prints the message alone; any other exception is a bug and keeps its traceback.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


def printable(text: str) -> str:
    r"""A text, such as the name of a file, that can be written anywhere: `\x1b` for an escape, `\udce9` for a byte."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def is_printable(text: str) -> bool:
    """Whether `printable` leaves a text of one line as it is."""
    return "\n" not in text and _UNPRINTABLE.search(text) is None


def refuse_newer(path: object, schema: int, known: int) -> None:
    """Refuse a file of a later version of its layout.

    Args:
        path: The file.
        schema: The version that it says.
        known: The latest one that is known here.

    Raises:
        LongslideError: It is later.
    """
    if schema > known:
        raise LongslideError(f"{path}: written by a newer Longslide (schema {schema}); update Longslide")

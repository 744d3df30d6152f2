"""What a user is told whose input is refused: one line."""

from collections.abc import Callable
from typing import Any

import pytest
from longslide.errors import LongslideError


def refused(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The message of a call that is refused."""
    with pytest.raises(LongslideError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message

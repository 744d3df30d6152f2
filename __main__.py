"""`python -m longslide` is `longslide`."""

import sys

from .pipeline.cli import command_line

sys.exit(command_line())

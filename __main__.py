"""`python -m longslide` is `longslide`."""

import sys

from .pipeline.cli import main

sys.exit(main())

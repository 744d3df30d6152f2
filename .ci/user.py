"""A user's script: `.ci/run` checks its types outside the clone, so that what users are given keeps its types."""

from pathlib import Path
from typing import assert_type

import longslide

with longslide.open_slide("a.svs") as slide:
    assert_type(slide, longslide.Slide)
    assert_type(slide.dimensions, tuple[int, int])
assert_type(longslide.read_features("features/a.h5"), longslide.Features)
assert_type(longslide.write_synthetic_slide("a.svs"), Path)
longslide.embed(["slides/"], output="features/", tile_encoder="uni2-h")
encoder = longslide.create_slide_encoder("gigapath", checkpoint="slide_encoder.pth")

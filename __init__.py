"""Longslide: whole-slide images to slide-level predictions.

The public functions are loaded when first used, so that `import longslide` and `longslide --help` do not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .data.features import Features as Features
    from .data.features import read_features as read_features
    from .data.slide import Slide as Slide
    from .data.slide import open_slide as open_slide
    from .data.synthetic import write_synthetic_slide as write_synthetic_slide
    from .errors import LongslideError as LongslideError
    from .evaluation import evaluate as evaluate
    from .models.dilated_attention import dilated_attention as dilated_attention
    from .models.slide_encoder import create_slide_encoder as create_slide_encoder
    from .models.tile_encoder import create_tile_encoder as create_tile_encoder
    from .pipeline.compare import compare as compare
    from .pipeline.doctor import doctor as doctor
    from .pipeline.embed import embed as embed
    from .pipeline.explain import explain as explain
    from .pipeline.predict import predict as predict

__version__ = "0.1.0"

_HOME = {
    "Features": ".data.features",
    "read_features": ".data.features",
    "Slide": ".data.slide",
    "open_slide": ".data.slide",
    "write_synthetic_slide": ".data.synthetic",
    "LongslideError": ".errors",
    "dilated_attention": ".models.dilated_attention",
    "create_slide_encoder": ".models.slide_encoder",
    "create_tile_encoder": ".models.tile_encoder",
    "evaluate": ".evaluation",
    "compare": ".pipeline.compare",
    "doctor": ".pipeline.doctor",
    "embed": ".pipeline.embed",
    "explain": ".pipeline.explain",
    "predict": ".pipeline.predict",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'longslide' has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)

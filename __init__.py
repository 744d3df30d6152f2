"""Longslide: whole-slide images to slide-level predictions.

The public functions are loaded when first used, so that `import longslide` and `longslide --help` do not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from .data.features.feature_file import Features as Features
    from .data.features.feature_file import read_features as read_features
    from .data.slides.base import SlideReader as SlideReader
    from .data.slides.slide import Slide as Slide
    from .data.slides.slide import open_slide as open_slide
    from .data.synthetic import write_synthetic_slide as write_synthetic_slide
    from .data.tissue.base import Tissue as Tissue
    from .data.tissue.base import TissueSegmenter as TissueSegmenter
    from .errors import LongslideError as LongslideError
    from .evaluation import evaluate as evaluate
    from .models.aggregators.base import Aggregator as Aggregator
    from .models.aggregators.registry import AggregatorChoice as AggregatorChoice
    from .models.slide_encoder.dilated_attention import dilated_attention as dilated_attention
    from .models.slide_encoder.encoder import create_slide_encoder as create_slide_encoder
    from .models.tile_encoder.encoder import TileEncoder as TileEncoder
    from .models.tile_encoder.encoder import create_tile_encoder as create_tile_encoder
    from .models.tile_encoder.spec import TileEncoderSpec as TileEncoderSpec
    from .pipeline.embed.doctor import doctor as doctor
    from .pipeline.embed.embed import embed as embed
    from .pipeline.export import export as export
    from .pipeline.predict.explain import explain as explain
    from .pipeline.predict.predict import predict as predict
    from .pipeline.report.compare import compare as compare
    from .registry import register as register

_HOME = {
    "Features": ".data.features.feature_file",
    "read_features": ".data.features.feature_file",
    "Slide": ".data.slides.slide",
    "SlideReader": ".data.slides.base",
    "Tissue": ".data.tissue.base",
    "TissueSegmenter": ".data.tissue.base",
    "Aggregator": ".models.aggregators.base",
    "AggregatorChoice": ".models.aggregators.registry",
    "register": ".registry",
    "open_slide": ".data.slides.slide",
    "write_synthetic_slide": ".data.synthetic",
    "LongslideError": ".errors",
    "dilated_attention": ".models.slide_encoder.dilated_attention",
    "create_slide_encoder": ".models.slide_encoder.encoder",
    "create_tile_encoder": ".models.tile_encoder.encoder",
    "TileEncoder": ".models.tile_encoder.encoder",
    "TileEncoderSpec": ".models.tile_encoder.spec",
    "export": ".pipeline.export",
    "evaluate": ".evaluation",
    "compare": ".pipeline.report.compare",
    "doctor": ".pipeline.embed.doctor",
    "embed": ".pipeline.embed.embed",
    "explain": ".pipeline.predict.explain",
    "predict": ".pipeline.predict.predict",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'longslide' has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)

"""Longslide: whole-slide images to slide-level predictions.

Every public name is loaded when first used, so that `import longslide` and `longslide --help` do not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from .data.cohort.augmentation import Augmentation as Augmentation
    from .data.cohort.datamodule import BagDataModule as BagDataModule
    from .data.cohort.options import DataOptions as DataOptions
    from .data.features.feature_file import read_features as read_features
    from .data.features.feature_file import write_features as write_features
    from .data.features.features import Features as Features
    from .data.features.tile_index import SimilarTile as SimilarTile
    from .data.features.tile_index import TileIndex as TileIndex
    from .data.slides.base import SlideReader as SlideReader
    from .data.slides.slide import Slide as Slide
    from .data.slides.slide import open_slide as open_slide
    from .data.synthetic import write_synthetic_slide as write_synthetic_slide
    from .data.tiles.dataset import TileDataset as TileDataset
    from .data.tiles.stream import TileBatch as TileBatch
    from .data.tiles.stream import TileStream as TileStream
    from .data.tissue.base import Tissue as Tissue
    from .data.tissue.base import TissueSegmenter as TissueSegmenter
    from .errors import LongslideError as LongslideError
    from .evaluation import evaluate as evaluate
    from .models.aggregators.base import Aggregator as Aggregator
    from .models.aggregators.base import split_bags as split_bags
    from .models.aggregators.registry import AggregatorChoice as AggregatorChoice
    from .models.classifier.checkpoint import load_classifier as load_classifier
    from .models.classifier.classifier import SlideClassifier as SlideClassifier
    from .models.classifier.options import ClassifierOptions as ClassifierOptions
    from .models.classifier.options import OptimiserOptions as OptimiserOptions
    from .models.slide_encoder.dilated_attention import dilated_attention as dilated_attention
    from .models.slide_encoder.encoder import SlideEncoder as SlideEncoder
    from .models.slide_encoder.encoder import create_slide_encoder as create_slide_encoder
    from .models.slide_encoder.longnet import LongNet as LongNet
    from .models.slide_encoder.mae_options import DecoderOptions as DecoderOptions
    from .models.slide_encoder.mae_options import PretrainingOptions as PretrainingOptions
    from .models.slide_encoder.published import PublishedSlideEncoder as PublishedSlideEncoder
    from .models.slide_encoder.sequence_parallel import SequenceParallelStrategy as SequenceParallelStrategy
    from .models.slide_encoder.spec import list_slide_encoders as list_slide_encoders
    from .models.tile_encoder.encoder import TileEncoder as TileEncoder
    from .models.tile_encoder.encoder import create_tile_encoder as create_tile_encoder
    from .models.tile_encoder.spec import TileEncoderSpec as TileEncoderSpec
    from .models.tile_encoder.spec import list_tile_encoders as list_tile_encoders
    from .pipeline.attention_map.attention_map import AttentionMap as AttentionMap
    from .pipeline.attention_map.attention_map import attention_map as attention_map
    from .pipeline.batch.result import SlideResult as SlideResult
    from .pipeline.demo import demo as demo
    from .pipeline.doctor.doctor import doctor as doctor
    from .pipeline.doctor.label_check import LabelCheck as LabelCheck
    from .pipeline.doctor.machine_check import DiskCheck as DiskCheck
    from .pipeline.doctor.machine_check import EncoderCheck as EncoderCheck
    from .pipeline.doctor.slide_check import SlideCheck as SlideCheck
    from .pipeline.embed.embed import embed as embed
    from .pipeline.export.export import ExportedFeatures as ExportedFeatures
    from .pipeline.export.export import export as export
    from .pipeline.export.slide_encoder import ExportedEncoder as ExportedEncoder
    from .pipeline.merge import merge as merge
    from .pipeline.predict.explain import Explanation as Explanation
    from .pipeline.predict.explain import explain as explain
    from .pipeline.predict.predict import predict as predict
    from .pipeline.predict.prediction import Prediction as Prediction
    from .pipeline.report.compare import ComparedRun as ComparedRun
    from .pipeline.report.compare import compare as compare
    from .pipeline.report.report import ReportResult as ReportResult
    from .pipeline.report.report import report as report
    from .pipeline.report.run_folder import Run as Run
    from .pipeline.report.run_folder import read_run as read_run
    from .pipeline.tiles.tiles import tiles as tiles
    from .pipeline.train.crossval import crossval as crossval
    from .pipeline.train.fit import fit as fit
    from .pipeline.train.pretrain import PretrainedEncoder as PretrainedEncoder
    from .pipeline.train.pretrain import pretrain as pretrain
    from .pipeline.train.sweep import sweep as sweep
    from .pipeline.train.test import test as test
    from .pipeline.view.view import ViewResult as ViewResult
    from .pipeline.view.view import view as view
    from .registry import register as register
    from .task import Task as Task

_HOME = {
    "Augmentation": ".data.cohort.augmentation",
    "BagDataModule": ".data.cohort.datamodule",
    "DataOptions": ".data.cohort.options",
    "Features": ".data.features.features",
    "read_features": ".data.features.feature_file",
    "write_features": ".data.features.feature_file",
    "SimilarTile": ".data.features.tile_index",
    "TileIndex": ".data.features.tile_index",
    "SlideReader": ".data.slides.base",
    "Slide": ".data.slides.slide",
    "open_slide": ".data.slides.slide",
    "write_synthetic_slide": ".data.synthetic",
    "TileDataset": ".data.tiles.dataset",
    "TileBatch": ".data.tiles.stream",
    "TileStream": ".data.tiles.stream",
    "Tissue": ".data.tissue.base",
    "TissueSegmenter": ".data.tissue.base",
    "LongslideError": ".errors",
    "evaluate": ".evaluation",
    "Aggregator": ".models.aggregators.base",
    "split_bags": ".models.aggregators.base",
    "AggregatorChoice": ".models.aggregators.registry",
    "load_classifier": ".models.classifier.checkpoint",
    "SlideClassifier": ".models.classifier.classifier",
    "ClassifierOptions": ".models.classifier.options",
    "OptimiserOptions": ".models.classifier.options",
    "dilated_attention": ".models.slide_encoder.dilated_attention",
    "SlideEncoder": ".models.slide_encoder.encoder",
    "create_slide_encoder": ".models.slide_encoder.encoder",
    "LongNet": ".models.slide_encoder.longnet",
    "DecoderOptions": ".models.slide_encoder.mae_options",
    "PretrainingOptions": ".models.slide_encoder.mae_options",
    "PublishedSlideEncoder": ".models.slide_encoder.published",
    "SequenceParallelStrategy": ".models.slide_encoder.sequence_parallel",
    "list_slide_encoders": ".models.slide_encoder.spec",
    "TileEncoder": ".models.tile_encoder.encoder",
    "create_tile_encoder": ".models.tile_encoder.encoder",
    "TileEncoderSpec": ".models.tile_encoder.spec",
    "list_tile_encoders": ".models.tile_encoder.spec",
    "AttentionMap": ".pipeline.attention_map.attention_map",
    "attention_map": ".pipeline.attention_map.attention_map",
    "SlideResult": ".pipeline.batch.result",
    "demo": ".pipeline.demo",
    "doctor": ".pipeline.doctor.doctor",
    "LabelCheck": ".pipeline.doctor.label_check",
    "DiskCheck": ".pipeline.doctor.machine_check",
    "EncoderCheck": ".pipeline.doctor.machine_check",
    "SlideCheck": ".pipeline.doctor.slide_check",
    "embed": ".pipeline.embed.embed",
    "ExportedFeatures": ".pipeline.export.export",
    "export": ".pipeline.export.export",
    "ExportedEncoder": ".pipeline.export.slide_encoder",
    "merge": ".pipeline.merge",
    "Explanation": ".pipeline.predict.explain",
    "explain": ".pipeline.predict.explain",
    "predict": ".pipeline.predict.predict",
    "Prediction": ".pipeline.predict.prediction",
    "ComparedRun": ".pipeline.report.compare",
    "compare": ".pipeline.report.compare",
    "ReportResult": ".pipeline.report.report",
    "report": ".pipeline.report.report",
    "Run": ".pipeline.report.run_folder",
    "read_run": ".pipeline.report.run_folder",
    "tiles": ".pipeline.tiles.tiles",
    "crossval": ".pipeline.train.crossval",
    "sweep": ".pipeline.train.sweep",
    "fit": ".pipeline.train.fit",
    "PretrainedEncoder": ".pipeline.train.pretrain",
    "pretrain": ".pipeline.train.pretrain",
    "test": ".pipeline.train.test",
    "ViewResult": ".pipeline.view.view",
    "view": ".pipeline.view.view",
    "register": ".registry",
    "Task": ".task",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'longslide' has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)

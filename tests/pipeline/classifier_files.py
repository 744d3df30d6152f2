"""Small classifiers as checkpoint files, and the tile encoder whose features they read."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from longslide.data.features.cache import FeatureCache
from longslide.data.features.feature_file import read_features
from longslide.data.features.statistics import FeatureStatistics
from longslide.data.features.survey import survey_features
from longslide.models.aggregators.registry import AggregatorChoice
from longslide.models.classifier.checkpoint import load_classifier
from longslide.models.classifier.classifier import SlideClassifier, TrainingFacts
from longslide.models.classifier.options import ClassifierOptions
from longslide.task import Task

ENCODER = """
name: tiny
architecture: vit_tiny_patch16_224
timm_args: {img_size: 32, depth: 2, embed_dim: 48, num_heads: 3}
dim: 48
resize: 32
interpolation: bicubic
crop: 32
mean: [0.5, 0.5, 0.5]
std: [0.5, 0.5, 0.5]
pooling: cls
precision: float32
tile_mpp: 0.5
tile_px: 64
licence: none
gated: false
paper: none
hub_id: null
"""

BINARY = Task("binary", ("label",), ("normal", "tumour"))


def write_classifier(
    path: Path,
    features: Path,
    task: Task = BINARY,
    seed: int = 0,
    aggregator: str | AggregatorChoice = "abmil",
    checkpoint: Path | None = None,
    **preprocessing: Any,
) -> SlideClassifier:
    """Save a classifier for these features, of random weights but for the slide encoder of a checkpoint.

    `preprocessing` overrides what the features say of themselves.
    """
    survey = survey_features(sorted(features.glob("*.h5")), FeatureCache(), quiet=True)
    torch.manual_seed(seed)
    facts = TrainingFacts(task, survey.dim, preprocessing=survey.preprocessing.to_dict() | preprocessing)
    if aggregator == "abmil":
        aggregator = AggregatorChoice("abmil", {"width": 16, "attention_width": 8})
    options = ClassifierOptions(aggregator, checkpoint)
    classifier = SlideClassifier(facts, options).eval()
    classifier.use_training_features(FeatureStatistics.of(survey.moments).to_dict())
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": classifier.state_dict(), "longslide": classifier.describe()}, path)
    return classifier


def expected_probability(home: Path, slide_id: str, checkpoint: str = "best.ckpt") -> np.ndarray:
    """What a classifier says of a feature file, without `predict`."""
    features = read_features(home / "features" / f"{slide_id}.h5")
    classifier = load_classifier(home / checkpoint)
    one_bag = torch.tensor([0, len(features.coords)], dtype=torch.int32)
    with torch.no_grad():
        outputs = classifier(torch.from_numpy(features.features), torch.from_numpy(features.cells), one_bag)
        return classifier.predict(outputs)["probability"][0].numpy()

"""Predictions in, numbers that can be believed out: metrics with intervals, calibration, paired comparison."""

from .comparison import compare_predictions as compare_predictions
from .evaluate import evaluate as evaluate

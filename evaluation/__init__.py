"""Predictions in, numbers that can be believed out: metrics with intervals, calibration, paired comparison."""

"""Predictions for new slides, and their explanations."""

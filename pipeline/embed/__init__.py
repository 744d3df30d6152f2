"""Slides to feature files."""

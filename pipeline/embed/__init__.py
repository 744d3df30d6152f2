"""Slides to feature files, and the check before it."""

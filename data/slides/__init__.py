"""Slide files: opening and reading them, microns per pixel, tables of slides."""

"""Slides in, tensors out: reading, tissue, grid, tile stream, feature files, slide tables, synthetic slides."""

"""Slides in, tensors out: reading, tissue, grid, tile stream, feature files, slide tables, cohorts, splits, bags, synthetic
slides."""

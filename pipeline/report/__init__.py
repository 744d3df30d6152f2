"""Pages: of predictions, of runs, of comparisons."""

"""What every job over many slides shares: results, the summary, claims, progress."""

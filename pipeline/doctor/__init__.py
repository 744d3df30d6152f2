"""The check before a long run: slides, labels, weights, this machine."""

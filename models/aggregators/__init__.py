"""Bags of tile embeddings to one vector per bag."""

"""Bags of tile embeddings to one vector a bag."""

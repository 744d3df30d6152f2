"""Tiles to embeddings: pretrained vision transformers."""

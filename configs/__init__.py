"""YAML only: one file per tile encoder, slide encoder and training recipe."""

"""YAML only: one file per tile encoder and slide encoder."""

"""Tensors in, tensors out: dilated attention, LongNet, slide encoders, tile encoders."""

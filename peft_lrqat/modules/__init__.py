"""Layers over the tensors that a format stores: what merging leaves in a model."""

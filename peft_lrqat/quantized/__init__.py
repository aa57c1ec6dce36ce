"""Checkpoints that other tools quantized: read as integers, to train on or to store in another format."""

from .load import load_quantized

__all__ = ["load_quantized"]

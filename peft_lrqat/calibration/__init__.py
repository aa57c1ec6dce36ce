"""GPTQ (arXiv 2210.17323) as a start for LR-QAT."""

from .preprocess import preprocess_gptq

__all__ = ["preprocess_gptq"]

"""Starts for LR-QAT that calibration text makes: GPTQ (arXiv 2210.17323), block-wise training (arXiv 2407.11062)."""

from .blockwise import preprocess_blockwise
from .preprocess import preprocess_gptq

__all__ = ["preprocess_blockwise", "preprocess_gptq"]

"""What is done to a float model before it is trained: with calibration text GPTQ (arXiv 2210.17323) and block-wise
training (arXiv 2407.11062), without any rotations (arXiv 2404.00456)."""

from .blockwise import preprocess_blockwise
from .preprocess import preprocess_gptq
from .rotation import preprocess_rotation

__all__ = ["preprocess_blockwise", "preprocess_gptq", "preprocess_rotation"]

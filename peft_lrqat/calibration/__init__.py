"""What is done to a float model before it is trained: with calibration text GPTQ (arXiv 2210.17323) and block-wise
training (arXiv 2407.11062), without any rotations (arXiv 2404.00456); and to an adapter, its fixed scales of inputs."""

from .blockwise import preprocess_blockwise
from .preprocess import preprocess_gptq
from .rotation import preprocess_rotation
from .static_scales import calibrate_activations

__all__ = ["calibrate_activations", "preprocess_blockwise", "preprocess_gptq", "preprocess_rotation"]

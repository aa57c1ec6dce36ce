"""What is done before training. To a float model: GPTQ (arXiv 2210.17323) and block-wise training (arXiv 2407.11062),
which take calibration text, and rotations (arXiv 2404.00456), which take none. To an adapter: the fixed scales of its
inputs.
"""

from .blockwise import preprocess_blockwise
from .preprocess import preprocess_gptq
from .rotation import preprocess_rotation
from .static_scales import calibrate_activations

__all__ = ["calibrate_activations", "preprocess_blockwise", "preprocess_gptq", "preprocess_rotation"]

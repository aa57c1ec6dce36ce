"""The few operations that cost time: plain PyTorch references, Triton kernels, and `torch.library` over both."""

from .library import quantized_linear, trained_scale
from .select import use_kernels

__all__ = ["quantized_linear", "trained_scale", "use_kernels"]

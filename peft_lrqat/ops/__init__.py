"""The few operations that cost time: plain PyTorch references, Triton kernels, and `torch.library` over both."""

from .dispatch import use_kernels
from .linear import quantized_linear, trained_scale

__all__ = ["quantized_linear", "trained_scale", "use_kernels"]

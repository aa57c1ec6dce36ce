"""The few operations that cost time: plain PyTorch references, registered with `torch.library`."""

from .library import quantized_linear, snap_scale_ste

__all__ = ["quantized_linear", "snap_scale_ste"]

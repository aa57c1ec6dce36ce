"""LR-QAT (arXiv 2406.06385): low-rank adapters inside the rounding of a downcast, frozen base."""

from .config import LRQATConfig
from .layer import LRQATLayer, LRQATLinear
from .model import LRQATModel

__all__ = ["LRQATConfig", "LRQATLayer", "LRQATLinear", "LRQATModel"]

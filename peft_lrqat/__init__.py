"""peft-lrqat: quantization-aware training of LLMs as an ordinary PEFT method.

Importing this package registers its tuner types with PEFT; everything else is PEFT's and TRL's own API.
"""

from ._version import __version__
from .checkpoint.export import can_export, export
from .gptq import preprocess_gptq
from .grid import Grid
from .lowbit_sr import LowBitAdamW, LowBitSRConfig, LowBitSRLayer, LowBitSRModel
from .lrqat import LRQATConfig, LRQATLayer, LRQATModel
from .quantized import load_quantized
from .registration import register
from .training.optim import create_lrqat_optimizer

__all__ = [
    "Grid",
    "LRQATConfig",
    "LRQATLayer",
    "LRQATModel",
    "LowBitAdamW",
    "LowBitSRConfig",
    "LowBitSRLayer",
    "LowBitSRModel",
    "__version__",
    "can_export",
    "create_lrqat_optimizer",
    "export",
    "load_quantized",
    "preprocess_gptq",
]

register("lrqat", config_cls=LRQATConfig, model_cls=LRQATModel, prefix=LRQATModel.prefix)
register("lowbitsr", config_cls=LowBitSRConfig, model_cls=LowBitSRModel, prefix=LowBitSRModel.prefix)

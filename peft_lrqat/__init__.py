"""peft-lrqat: quantization-aware training of LLMs as an ordinary PEFT method.

Importing this package registers its tuner types with PEFT; everything else is PEFT's and TRL's own API.
"""

from ._version import __version__
from .calibration import calibrate_activations, preprocess_blockwise, preprocess_gptq, preprocess_rotation
from .checkpoint.adopt import adopt_own
from .checkpoint.export import can_export, export
from .checkpoint.load import load_quantized
from .distillation import Distillation, distillation_loss, store_logits
from .grid import Grid
from .modules.generation import keep_in_generate, kept_weights, limit_kept_weights
from .monitor import QuantizationCallback
from .registration import before_injection, register
from .tuners.lowbit_sr import LowBitAdamW, LowBitSRConfig, LowBitSRLayer, LowBitSRModel
from .tuners.lrqat import LRQATConfig, LRQATLayer, LRQATModel
from .tuners.lrqat.optim import create_lrqat_optimizer

__all__ = [
    "Distillation",
    "Grid",
    "LRQATConfig",
    "LRQATLayer",
    "LRQATModel",
    "LowBitAdamW",
    "LowBitSRConfig",
    "LowBitSRLayer",
    "LowBitSRModel",
    "QuantizationCallback",
    "__version__",
    "calibrate_activations",
    "can_export",
    "create_lrqat_optimizer",
    "distillation_loss",
    "export",
    "kept_weights",
    "limit_kept_weights",
    "load_quantized",
    "preprocess_blockwise",
    "preprocess_gptq",
    "preprocess_rotation",
    "store_logits",
]

register("lrqat", config_cls=LRQATConfig, model_cls=LRQATModel, prefix=LRQATModel.prefix)
register("lowbitsr", config_cls=LowBitSRConfig, model_cls=LowBitSRModel, prefix=LowBitSRModel.prefix)
before_injection(adopt_own)
keep_in_generate()

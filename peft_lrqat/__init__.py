"""peft-lrqat: quantization-aware training of LLMs as an ordinary PEFT method.

Importing this package registers its tuner types with PEFT; everything else is PEFT's and TRL's own API.

    LRQATConfig, LowBitSRConfig      the two methods: for `get_peft_model`, or a TRL trainer's `peft_config`
    create_lrqat_optimizer           optimizers: scales in a group of their own,
    LowBitAdamW                      and packed codes with compact state
    Distillation, store_logits,      training with the probabilities of a teacher
    distillation_loss
    QuantizationCallback             what training does to the integers, in a Trainer's log
    CudaGraphCallback, cuda_graphs   steps with less Python
    load_quantized                   starting from a quantized checkpoint,
    preprocess_gptq,                 or from one that calibration text has made,
    preprocess_blockwise
    preprocess_rotation,             before activations are rounded
    calibrate_activations
    export, can_export               writing GPTQ, GGUF, compressed-tensors ... from what was trained
    kept_weights,                    memory for speed while a model generates
    limit_kept_weights
    Grid                             the integers that a weight may take
    LRQATModel, LRQATLayer,          what `get_peft_model` makes
    LowBitSRModel, LowBitSRLayer

In the examples of the docstrings, `base` is a float model of transformers, `model` is one with adapters, `tokenizer` is
its tokenizer, `texts` is a list of strings, and `dataset` has a column "text" with such strings.
"""

from ._version import __version__
from .calibration import calibrate_activations, preprocess_blockwise, preprocess_gptq, preprocess_rotation
from .checkpoint.adopt import adopt_own
from .checkpoint.export import can_export, export
from .checkpoint.load import load_quantized
from .distillation import Distillation, distillation_loss, store_logits
from .graphs import CudaGraphCallback, cuda_graphs
from .grid import Grid
from .modules.generation import keep_in_generate, kept_weights, limit_kept_weights
from .monitor import QuantizationCallback
from .peft_hooks import (
    before_injection,
    before_loading,
    before_loading_a_file,
    before_saving,
    before_saving_a_model,
)
from .registration import register
from .tuners.common.adapter_file import check_method_of_file, check_options_of_file, check_savable
from .tuners.common.extras import warn_of_adapters_inside
from .tuners.lowbit_sr import LowBitAdamW, LowBitSRConfig, LowBitSRLayer, LowBitSRModel
from .tuners.lrqat import LRQATConfig, LRQATLayer, LRQATModel
from .tuners.lrqat.optim import create_lrqat_optimizer

__all__ = [
    "CudaGraphCallback",
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
    "cuda_graphs",
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
before_saving(check_savable)
before_saving_a_model(warn_of_adapters_inside)
before_loading(check_method_of_file)
before_loading_a_file(check_options_of_file)
keep_in_generate()

"""Low-bit SR: integer weights trained directly, with stochastic rounding (DQT, arXiv 2412.04787)."""

from .config import LowBitSRConfig
from .layer import LowBitSRLayer, LowBitSRLinear
from .model import LowBitSRModel
from .optim import LowBitAdamW
from .tensor import LowBitTensor

__all__ = ["LowBitAdamW", "LowBitSRConfig", "LowBitSRLayer", "LowBitSRLinear", "LowBitSRModel", "LowBitTensor"]

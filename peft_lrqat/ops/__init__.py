"""The few operations that cost time, listed below: plain PyTorch references, Triton kernels, `torch.library` over both.

One scheme for all of them. An operation's file holds the public function and, where a model's graph runs through it,
its registration with `torch.library` (schema, fake implementation, autograd), and says where its reference is:

    linear.py, low_bit.py           reference.py; kernels/weight.py, backward.py, low_bit_weight.py
    experts.py                      reference_experts.py; kernels/experts.py
    embedding.py                    the file itself; no kernel
    activations.py                  reference_inputs.py; kernels/inputs.py
    static_inputs.py                reference_inputs.py; kernels/static_inputs.py
    kv_cache.py                     reference_cache.py; kernels/cache.py
    low_bit_step.py                 reference_step.py; kernels/low_bit_step.py, second_moment.py

A reference and its kernel have one name, one signature and one result (`kernels/__init__.py` lists the pairs, a test
compares them), so an operation only chooses between them: `kernels_for(x) or reference`. `dispatch.py` decides which
runs, `stored_base.py` and `factors.py` say how the frozen weight and the adapter become numbers that every device
computes alike.
"""

from .activations import round_activations
from .dispatch import use_kernels
from .embedding import quantized_embedding
from .experts import expert_linear, expert_weights
from .linear import quantized_linear, trained_scale
from .low_bit import low_bit_linear, mean_code
from .low_bit_step import step_codes

__all__ = [
    "expert_linear",  # y = x W^T, tokens by the experts that they were sent to
    "expert_weights",  # W^ of a mixture's experts, the adapter inside the rounding
    "low_bit_linear",  # y = x W^T over packed codes that are trained themselves
    "mean_code",  # mean |q| over the weights that share a scale
    "quantized_embedding",  # rows of W^, the adapter inside the rounding
    "quantized_linear",  # y = x W^T + bias, the adapter inside the rounding
    "round_activations",  # a layer's input on a grid, as an engine rounds it
    "step_codes",  # one AdamW step on packed codes, which ends in stochastic rounding
    "trained_scale",  # s0 and its learned change, snapped to what a checkpoint stores
    "use_kernels",  # not an operation: switches the kernels on or off
]

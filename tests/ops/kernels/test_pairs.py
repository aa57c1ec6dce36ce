"""Design: a reference and its kernel have one name, one signature and one contract."""

import inspect

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

from peft_lrqat.ops import (
    kernels,
    latent,
    reference,
    reference_cache,
    reference_experts,
    reference_inputs,
    reference_step,
)

REFERENCES = (reference, reference_cache, reference_experts, reference_inputs, reference_step, latent)


@pytest.mark.parametrize("name", kernels.__all__)
def test_a_kernel_has_its_references_signature(name):
    module = next(m for m in REFERENCES if hasattr(m, name))
    kernel, plain = (inspect.signature(getattr(m, name), eval_str=True) for m in (kernels, module))
    assert kernel == plain

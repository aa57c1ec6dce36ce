"""Design: a reference and its kernel have one name, one signature and one contract."""

import inspect

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

from peft_lrqat.ops import kernels, reference, reference_step


@pytest.mark.parametrize("name", kernels.__all__)
def test_a_kernel_has_its_references_signature(name):
    pair = kernels, reference_step if name == "low_bit_update" else reference
    kernel, plain = (inspect.signature(getattr(module, name), eval_str=True) for module in pair)
    assert kernel == plain

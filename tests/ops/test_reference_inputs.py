"""The rules by which engines round inputs: what transformers' own code makes of them, bit for bit."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from peft_lrqat.ops.reference_inputs import ACTIVATION_RULES, rounded_inputs

WIDTH = 45


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "group_size"), [(8, -1), (4, -1), (8, 9), (4, 5)])
def test_compressed_tensors_rounds_so_itself(bits: int, group_size: int, dtype: torch.dtype):
    x = (torch.randn(2, 5, WIDTH) * torch.tensor([0.01, 1, 300, 1, 0]).view(1, 5, 1)).to(dtype)
    shared = {"strategy": "token"} if group_size < 0 else {"strategy": "group", "group_size": group_size}
    args = QuantizationArgs(num_bits=bits, symmetric=True, dynamic=True, **shared)
    scale, zero_point = compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
    expected = fake_quantize(x, scale, zero_point, args)
    assert torch.equal(rounded_inputs(x, "compressed-tensors", bits, group_size), expected)


def test_every_group_has_a_scale_of_its_own():
    for rule in ACTIVATION_RULES:
        x = torch.randn(2, 3, WIDTH)
        parts = [rounded_inputs(part, rule, 4, -1) for part in x.split(9, dim=-1)]
        assert torch.equal(rounded_inputs(x, rule, 4, 9), torch.cat(parts, -1))

"""AWQ's packing, against a packer that is not this package's."""

from __future__ import annotations

import pytest
import torch

from peft_lrqat.formats import awq, reading
from tests.quantized_files import Spec, pack


def test_codes_and_zero_points_come_out_in_their_order():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (64, 32), generator=generator)
    zero = torch.randint(-8, 8, (64, 2), generator=generator)
    scale = torch.rand(64, 2, generator=generator).half() + 0.1
    stored = pack(codes, scale, zero, Spec("awq", 4, 16, symmetric=False))
    scheme = awq.schemes({"group_size": 16, "zero_point": True, "version": "GEMM"}, {})("any")
    assert awq.shape(scheme, {name: tuple(t.shape) for name, t in stored.items()}, stored.__getitem__) == (64, 32)
    weight = reading.read(scheme, stored, 64, 32, "any")
    assert torch.equal(weight.codes, codes.to(torch.int8))
    assert torch.equal(weight.zero_point, zero.to(torch.int8))
    assert torch.equal(weight.scale, scale.float())


@pytest.mark.parametrize("config", [{"bits": 8}, {"version": "gemv"}, {"version": "marlin"}])
def test_other_kinds_are_refused_by_name(config: dict):
    with pytest.raises(ValueError, match='"gemm" with 4 bits can be read'):
        awq.schemes(config, {})

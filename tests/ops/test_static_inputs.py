"""Inputs rounded with a fixed scale: compressed-tensors' own numbers, and LSQ's gradients."""

import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from peft_lrqat.ops.static_inputs import LearnedScale, round_learned, round_static, static_scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_tensors_rounds_so_itself(dtype: torch.dtype):
    x, scale = (3 * torch.randn(2, 5, 45)).to(dtype), torch.tensor([0.0195])
    scale = static_scale(scale.log2(), "auto")
    args = QuantizationArgs(num_bits=8, symmetric=True, dynamic=False, strategy="tensor")
    expected = fake_quantize(x, scale.to(dtype), None, args)
    assert torch.equal(round_static(x, scale, 8), expected)
    assert float(expected.max()) < float(x.max())  # something was clipped


def test_the_gradients_are_lsqs():
    x = torch.tensor([0.26, -0.9, 30.0, -40.0], requires_grad=True)
    log2 = torch.tensor([math.log2(0.25)], requires_grad=True)
    y = round_learned(x, LearnedScale(log2, "fp32", 8))
    assert y.tolist() == [0.25, -1.0, 30.0, -32.0]
    dx, dlog2 = torch.autograd.grad(y, [x, log2], torch.tensor([1.0, 2.0, 3.0, 5.0]))
    assert dx.tolist() == [1, 2, 3, 0]
    slopes = [1 - 1.04, -4 + 3.6, 0, -128]  # round(x / a) - x / a, or the end of the grid
    dscale = sum(g * s for g, s in zip([1, 2, 3, 5], slopes, strict=True))
    torch.testing.assert_close(dlog2, torch.tensor([dscale * 0.25 * math.log(2)]))


def test_the_scale_is_one_that_a_checkpoint_stores():
    for number in (-5.03, 0.7):
        log2 = torch.tensor([number], requires_grad=True)
        scale = static_scale(log2, "auto")
        assert torch.equal(scale.bfloat16().float(), scale)
        torch.testing.assert_close(scale, log2.detach().exp2(), rtol=2**-8, atol=0)
        learned, x = LearnedScale(log2, "auto", 8), torch.tensor([1e6, 3.0])
        assert torch.equal(round_learned(x, learned), round_static(x, scale, 8))
        # straight through the snapping: that of the end of the grid, times d scale / d log2
        y = round_learned(x[:1], learned)
        assert torch.autograd.grad(y, log2)[0].tolist() == pytest.approx((127 * scale * math.log(2)).tolist())


def test_compiled_it_is_the_same():
    """What torch.compile sees of it are operations: its own code would compute in fp32 where the dtype is bf16."""
    x, log2 = torch.randn(8, 45).bfloat16().requires_grad_(), torch.tensor([-5.03], requires_grad=True)
    weight, found, seen = torch.randn(8, 45).bfloat16(), [], set()

    def rounded(x: torch.Tensor, log2: torch.Tensor) -> torch.Tensor:
        return round_learned(x, LearnedScale(log2, "auto", 8))

    def look(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        seen.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    for run in (rounded, torch.compile(rounded, backend=aot_autograd(fw_compiler=look), fullgraph=True)):
        y = run(x, log2)
        found.append([y, *torch.autograd.grad(y, [x, log2], weight)])
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(compiled, eager)
    assert {f"peft_lrqat.{name}.default" for name in ("round_static", "round_static_backward")} <= seen
    assert not {"aten.div.Tensor", "aten.round.default"} & seen


def test_the_operations_are_registered_well():
    x, scale = torch.randn(3, 8).requires_grad_(), torch.tensor([0.25])
    ops = torch.ops.peft_lrqat
    for scale_dtype in (None, "auto"):
        torch.library.opcheck(ops.round_static.default, (x.detach(), scale, 8, scale_dtype))
        for need_scale in (True, False):
            arguments = (x.detach(), x.detach(), scale, 8, scale_dtype, True, need_scale)
            torch.library.opcheck(ops.round_static_backward.default, arguments)

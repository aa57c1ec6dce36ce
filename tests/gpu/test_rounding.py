"""A GPU rounds inputs, keys and values as a CPU does."""

import pytest
import torch

from peft_lrqat.ops import use_kernels
from peft_lrqat.ops.activations import Activations, round_activations
from peft_lrqat.ops.kv_cache import CacheRounding, round_states
from peft_lrqat.ops.shared_inputs import round_shared
from peft_lrqat.ops.static_inputs import LearnedScale, round_learned

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_gpu_rounds_keys_and_values_as_a_cpu_does(dtype, kernels):
    for length, size in ((5, 48), (33, 80), (64, 128), (7, 256), (2, 512)):
        states = torch.randn(2, length, 3, size).transpose(1, 2).to(dtype)
        for rounding in (
            CacheRounding(8, "transformers", size),
            CacheRounding(4, "transformers", 16),
            CacheRounding(8, "vllm"),
            CacheRounding(4, "vllm"),
        ):
            with use_kernels(kernels):
                found = round_states(states.cuda(), rounding)
            assert torch.equal(found.cpu(), round_states(states, rounding)), (size, rounding)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_gpu_rounds_with_a_fixed_scale_as_a_cpu_does(dtype, kernels):
    for shape in ((3, 5, 45), (4, 64, 1024)):
        x, dy, found = 2 * torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), []
        for device in ("cuda", "cpu"):
            given, log2 = (t.to(device).requires_grad_() for t in (x, torch.tensor([-6.03])))
            with use_kernels(kernels and device == "cuda"):
                y = round_learned(given, LearnedScale(log2, "auto", 8))
                found.append([t.cpu() for t in (y, *torch.autograd.grad(y, [given, log2], dy.to(device)))])
        (y, dx, dlog2), (y2, dx2, dlog22) = found
        assert torch.equal(y, y2)
        assert torch.equal(dx, dx2)
        torch.testing.assert_close(dlog2, dlog22, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kernels", [True, False])
def test_a_fixed_scale_is_never_read_back(kernels):
    """A training step of it makes the CPU wait for nothing."""
    x, log2 = torch.randn(64, 128, device="cuda", requires_grad=True), torch.tensor([-5.0], device="cuda")
    log2.requires_grad_()

    def step():
        round_learned(x, LearnedScale(log2, "auto", 8)).sum().backward()

    with use_kernels(kernels):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_cuda_graphs_and_streams_round_what_they_are_given():
    """Layers share the rounding of an input within one graph, and with nobody outside of it."""
    x, how = torch.randn(1, 4, 64, device="cuda", dtype=torch.bfloat16), Activations("vllm")
    layers = [torch.nn.Linear(64, 1), torch.nn.Linear(64, 1)]

    def captured(*layers: torch.nn.Module) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            return graph, [round_shared(x, how, layer) for layer in layers]

    first, second = [round_shared(x, how, layer) for layer in layers]
    assert first is second
    with torch.cuda.stream(torch.cuda.Stream()):
        assert round_shared(x, how, torch.nn.Linear(64, 1)) is not second
    torch.cuda.synchronize()
    graphs = [captured(*which) for which in (layers, layers[:1], layers[1:])]
    if hasattr(torch._C._CUDAGraph, "get_currently_capturing_graph"):  # of newer versions of torch
        assert graphs[0][1][0] is graphs[0][1][1]
    x.copy_(torch.randn_like(x))
    for graph, found in reversed(graphs):
        graph.replay()
        assert all(torch.equal(y, round_activations(x, how)) for y in found)

"""Low-bit SR trained on a GPU: merging changes nothing there, and steps are those of a CPU."""

import pytest
import torch

from peft_lrqat import LowBitAdamW
from tests.low_bit_weights import weight
from tests.merged import check_merged
from tests.models import low_bit, tiny, tokens, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LOW_BIT = [{"bits": 8}, {"bits": 4, "group_size": 16}, {"bits": 1.58, "group_size": 0}]


@pytest.mark.parametrize("config", LOW_BIT, ids=str)
def test_low_bit_sr_on_a_gpu(config, tmp_path):
    ids = tokens(2, 32).cuda()
    model = low_bit(tiny(dtype=torch.bfloat16).cuda(), **config)
    losses = train(model, ids, steps=8, lr=1e-2, kind=LowBitAdamW)
    assert losses[-1] < losses[0]
    check_merged(model, ids, tmp_path)


@pytest.mark.parametrize("state", ["8bit", "factored"])
def test_steps_in_backward_are_the_ordinary_ones_on_a_gpu(state):
    """Which are given gradients that were cast to fp32."""
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        base = tiny(dtype=torch.bfloat16, hidden_size=512, intermediate_size=1536).cuda()
        base.set_attn_implementation("eager")  # the gradients of the default one differ from run to run
        model = low_bit(base, bits=4)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = LowBitAdamW(parameters, lr=1e-3, state=state, fused_backward=fused)
        for seed in range(3):
            ids = tokens(2, 32, seed=seed).cuda()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        # in the order of the weights: states are made in that of their gradients
        held = [t for p in parameters for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
        found.append([p.packed for p in parameters] + (held if state == "8bit" else []))
    if state == "8bit":
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    else:  # torch may sum the norms of bf16 rows in another order than those of fp32
        same = [(a == b).float().mean() for a, b in zip(*found, strict=True)]
        assert min(same) > 0.99


def test_a_step_in_a_cuda_graph_is_refused():
    p = torch.nn.Parameter(weight(4, -1, (64, 256)).cuda())
    optimizer = LowBitAdamW([p])
    p.grad = torch.ones(64, 256, device="cuda")
    optimizer.step()
    with pytest.raises(RuntimeError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.parametrize("group_size", [-1, 0, 128, 25])
def test_ternary_scales_follow_on_a_gpu_as_on_a_cpu(group_size):
    """By the kernel, eager and as a CUDA graph, which waits for nothing, and by torch."""
    from peft_lrqat.ops import kernels, latent

    start = weight(1.58, group_size, (2050, 5600 if group_size == 25 else 5632))
    codes, lr = torch.randint(-127, 128, start.shape, dtype=torch.int8), torch.tensor(0.01)
    mean = latent.mean_magnitude(start.packed, codes, start.scale, start.grid, start.shape[1])
    c, expected = mean.float() * (torch.rand(mean.shape) + 0.5), start.scale.clone()
    latent.follow_magnitude(start.packed, codes, expected, c, lr, start.grid)
    packed, codes, c, lr = (t.cuda() for t in (start.packed, codes, c, lr))
    for module in (kernels, latent):
        assert torch.equal(
            module.mean_magnitude(packed, codes, start.scale.cuda(), start.grid, start.shape[1]).cpu(), mean
        )
        scale = start.scale.cuda()
        before = module.follow_magnitude(packed, codes, scale, c, lr, start.grid)
        assert torch.equal(before.cpu(), start.scale)
        assert torch.equal(scale.cpu(), expected)
    graph, scale = torch.cuda.CUDAGraph(), start.scale.cuda()
    with torch.cuda.graph(graph):
        kernels.follow_magnitude(packed, codes, scale, c, lr, start.grid)
    assert torch.equal(scale.cpu(), start.scale)
    graph.replay()
    assert torch.equal(scale.cpu(), expected)

"""LR-QAT trained on a GPU: merging changes nothing there, and a CPU makes the same integers of it."""

import pytest
import torch
from peft import LoraRuntimeConfig

from peft_lrqat.ops import use_kernels
from peft_lrqat.tuners.lrqat.experts import LRQATExpertLinear
from tests.merged import check_merged
from tests.mixtures import mixture, on_experts
from tests.models import adapted, logits, tiny, tokens, train
from tests.problems import assert_close, ours, problem, results

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LRQAT = [
    {"bits": bits, "group_size": group_size, "symmetric": symmetric, "downcast": downcast}
    for bits, group_size, symmetric, downcast in (
        (4, -1, True, "fx8"),
        (4, -1, True, "int"),
        (4, 16, False, "int"),
        (3, 16, True, "int"),
        (2, 16, False, "int"),
        (8, -1, True, "int"),
    )
]
LRQAT += [{"bits": 4, "group_size": -1, "kv_bits": bits} for bits in (8, 4)]
LRQAT += [{"bits": 4, "group_size": group_size, "r": 0} for group_size in (16, -1)]
LRQAT += [{"bits": 2, "group_size": 16, "symmetric": False, "r": 0}]
LRQAT += [{"bits": 4, "group_size": 16, "learn_scales": "channel", "r": 0}]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("config", LRQAT, ids=str)
def test_lrqat_on_a_gpu(config, dtype, tmp_path):
    ids = tokens(2, 32).cuda()
    model = adapted(tiny(dtype=dtype).cuda(), **config)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    losses = train(model, ids, steps=4, lr=2e-2)
    assert losses[-1] < losses[0]
    model.gradient_checkpointing_disable()
    integers = {name: layer.grid_tensor() for name, layer in model.named_modules() if hasattr(layer, "grid_tensor")}
    model.cpu()  # a laptop merges the adapter to the same integers
    for name, layer in model.named_modules():
        if name in integers:
            assert torch.equal(layer.grid_tensor().codes, integers[name].codes.cpu()), name
    check_merged(model.cuda(), ids, tmp_path)


@pytest.mark.parametrize("learn_scales", [True, "channel"])
@pytest.mark.parametrize("group_size", [16, -1])
def test_rank_0_is_rank_1_with_factors_that_are_never_trained(group_size, learn_scales):
    """Output, gradients of inputs and of scales, and what is merged."""
    found = []
    for options in ({"r": 0}, {"r": 1, "downcast": "int"}):
        options |= {"bits": 4, "group_size": group_size, "learn_scales": learn_scales}
        model = adapted(tiny(dtype=torch.bfloat16).cuda(), **options)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_scale_shift" in name)
        layer = model.get_base_model().model.layers[0].mlp.up_proj
        torch.manual_seed(0)
        layer.lora_scale_shift["default"].weight.data.normal_(std=0.1)
        x = torch.randn(37, layer.in_features, device="cuda", dtype=torch.bfloat16).requires_grad_()
        y = layer(x)
        gradients = torch.autograd.grad(y.square().sum(), [x, layer.lora_scale_shift["default"].weight])
        layer.merge()
        assert torch.equal(layer(x), y)
        found.append((y, *gradients, layer.base_layer.weight_packed, layer.base_layer.weight_scale))
    (y, dx, dshift, *merged), (other_y, other_dx, other_dshift, *others) = found
    assert torch.equal(y, other_y)
    assert torch.equal(dx, other_dx)
    assert_close(dshift, other_dshift)  # a kernel for each rank, which may sum otherwise
    assert all(map(torch.equal, merged, others))


@pytest.mark.parametrize("learn_scales", [True, "channel"])
def test_experts_on_a_gpu(learn_scales, monkeypatch):
    """Trained in parts of the stack, merged in one; and a CPU makes the same integers of the adapter."""
    from peft_lrqat.ops.kernels import experts

    monkeypatch.setattr(experts, "PART_BYTES", 2 * 32 * 32 * 2)  # two experts
    ids = tokens(2, 32).cuda()
    model = on_experts(mixture(torch.bfloat16).cuda(), learn_scales=learn_scales, downcast="int")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    losses = train(model, ids, steps=4, lr=2e-2)
    assert losses[-1] < losses[0]
    model.gradient_checkpointing_disable()
    stacks = [name for name, layer in model.named_modules() if isinstance(layer, LRQATExpertLinear)]
    integers = {name: model.get_submodule(name).grid_tensor() for name in stacks}
    model.cpu()
    for name, found in integers.items():
        assert torch.equal(model.get_submodule(name).grid_tensor().codes, found.codes.cpu()), name
    model.cuda()
    seen = logits(model, ids)
    assert torch.equal(logits(model.merge_and_unload(), ids), seen)


@pytest.mark.parametrize("config", LRQAT, ids=str)
def test_a_gpu_converts_what_lies_on_the_cpu_to_the_same_integers(config):
    here = adapted(tiny(dtype=torch.bfloat16), **config)
    runtime = LoraRuntimeConfig(ephemeral_gpu_offload=True)
    there = adapted(tiny(dtype=torch.bfloat16), **config, runtime_config=runtime)
    for name, value in there.base_model.model.named_parameters():
        assert value.device.type == "cpu", name
    expected, found = here.base_model.state_dict(), there.base_model.state_dict()
    for name in expected:
        assert "lora_A" in name or torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("group_size", [32, -1])
def test_launches_by_position_and_through_triton_are_the_same(group_size, monkeypatch):
    from peft_lrqat.ops.kernels import launch

    made, init = [], launch.Launch.__init__
    monkeypatch.setattr(launch.Launch, "__init__", lambda self, *args: made.append(self) or init(self, *args))
    # a shape of its own, so that nothing is compiled yet; shares of clipped entries would be added in any order
    p = problem(4, group_size, False, "int", clip="none", rows=83, cols=352, shape=(37,)).to(torch.bfloat16).there()
    with use_kernels(True):
        with monkeypatch.context() as forced:
            forced.setattr(launch, "takes_known_order", lambda launcher: False)
            through_triton = [results(ours(p), p) for _ in range(2)]
        assert made
        assert not any(one.compiled for one in made)
        by_position = [results(ours(p), p) for _ in range(2)]  # the first one notes what was compiled
    assert all(one.compiled for one in made), "a Triton not known yet: read its launcher, then add it to launch.py"
    for found in (*through_triton[1:], *by_position):
        for name, value in through_triton[0].items():
            assert torch.equal(found[name], value), name

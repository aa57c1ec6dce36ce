"""Trained on a GPU: merging changes nothing there, and a CPU loads the same integers. Skipped without a GPU."""

import pytest
import torch
from peft import LoraRuntimeConfig
from transformers import AutoModelForCausalLM

from peft_lrqat import LowBitAdamW, kept_weights, limit_kept_weights
from peft_lrqat.ops import use_kernels
from peft_lrqat.ops.kv_cache import CacheRounding, round_states
from peft_lrqat.tuners.lrqat.experts import LRQATExpertLinear
from tests.mixtures import mixture, on_experts
from tests.models import adapted, logits, low_bit, tiny, tokens, train
from tests.problems import ours, problem, results

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
LOW_BIT = [{"bits": 8}, {"bits": 4, "group_size": 16}, {"bits": 1.58, "group_size": 0}]


def check_merged(model, ids, folder):
    """Trained == merged on the GPU; saved, the CPU has the same integers, scales and floats."""
    seen = logits(model, ids)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, ids), seen)
    merged.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    there = loaded.state_dict()
    opened = any("zero_point" in name for name in merged.state_dict())  # by transformers, while it loads
    for name, value in merged.state_dict().items():
        assert opened or torch.equal(there[name], value.cpu()), name
    assert torch.equal(logits(loaded, ids.cpu()), logits(merged.cpu(), ids.cpu()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_gpu_rounds_keys_and_values_as_a_cpu_does(dtype):
    states = torch.randn(2, 5, 3, 48).transpose(1, 2).to(dtype)
    for rounding in (
        CacheRounding(8, "transformers", 48),
        CacheRounding(4, "transformers", 16),
        CacheRounding(8, "vllm"),
        CacheRounding(4, "vllm"),
    ):
        assert torch.equal(round_states(states.cuda(), rounding).cpu(), round_states(states, rounding)), rounding


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


@pytest.mark.parametrize("config", LOW_BIT, ids=str)
def test_low_bit_sr_on_a_gpu(config, tmp_path):
    ids = tokens(2, 32).cuda()
    model = low_bit(tiny(dtype=torch.bfloat16).cuda(), **config)
    losses = train(model, ids, steps=8, lr=1e-2, kind=LowBitAdamW)
    assert losses[-1] < losses[0]
    check_merged(model, ids, tmp_path)


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


@pytest.mark.parametrize("make", [adapted, low_bit], ids=["lrqat", "lowbit_sr"])
def test_generating_keeps_dense_weights_and_frees_them(make):
    model = make(tiny(dtype=torch.bfloat16).cuda(), bits=4, group_size=16).eval()
    ids, stream = tokens(2, 8).cuda(), torch.cuda.Stream()
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "output_logits": True}
    for generating in (model, model.merge_and_unload()):

        def generate(limit, generating=generating):
            limit_kept_weights(limit)
            return torch.stack(generating.generate(input_ids=ids, return_dict_in_generate=True, **settings).logits)

        expected = generate(0)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        assert torch.equal(generate(None), expected)
        assert torch.cuda.memory_allocated() == before
        with torch.cuda.stream(stream):
            assert torch.equal(generate(None), expected)
        limit_kept_weights(None)

        graph, x = torch.cuda.CUDAGraph(), torch.randn(1, 1, 32, device="cuda", dtype=torch.bfloat16)
        layer = generating.get_submodule(
            next(name for name, _ in generating.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
        )
        with torch.no_grad(), kept_weights(generating):
            expected = layer(x)
            with torch.cuda.graph(graph):
                captured = layer(x)
        torch.empty(2**24, device="cuda").fill_(float("nan"))  # where the kept weight was
        graph.replay()
        assert torch.equal(captured, expected)


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

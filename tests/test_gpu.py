"""Trained on a GPU: merging changes nothing there, and a CPU loads the same integers. Skipped without a GPU."""

import copy
import functools
import gc
from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraRuntimeConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_lrqat import CudaGraphCallback, LowBitAdamW, cuda_graphs, kept_weights, limit_kept_weights
from peft_lrqat.ops import staging, use_kernels
from peft_lrqat.ops.activations import Activations, round_activations
from peft_lrqat.ops.kv_cache import CacheRounding, round_states
from peft_lrqat.ops.shared_inputs import round_shared
from peft_lrqat.ops.static_inputs import LearnedScale, round_learned
from peft_lrqat.tuners.common.frozen import FrozenWeight
from peft_lrqat.tuners.lrqat.experts import LRQATExpertLinear
from tests.graphs import trained
from tests.low_bit_weights import weight
from tests.mixtures import mixture, on_experts
from tests.models import adapted, logits, low_bit, tiny, tokens, train
from tests.problems import ours, problem, results
from tests.trainer import arguments, counting_text, losses, word_tokenizer

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

    start = weight(1.58, group_size, (2050, 5600 if group_size == 25 else 5632)).to("cpu")
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


class TestOffload:
    """`offload_base`: bases come from pinned memory, on a stream of their own."""

    @staticmethod
    def pair(kind: str, **options: Any) -> list[PeftModel]:
        found = []
        for offload in (False, True):
            torch.manual_seed(0)
            if kind == "mixture":
                base = mixture(torch.bfloat16, num_hidden_layers=4, hidden_size=256, moe_intermediate_size=128)
                model = on_experts(base, group_size=32, r=8, offload_base=offload, **options)
            else:
                base = tiny("llama", dtype=torch.bfloat16, num_hidden_layers=4, hidden_size=256, intermediate_size=512)
                model = adapted(base, group_size=32, init_lora_weights=False, offload_base=offload, **options)
            found.append(model.cuda())
        return found

    @staticmethod
    def step(model: PeftModel, ids: torch.Tensor, lag: Any = None) -> list[torch.Tensor]:
        """Logits and gradients; `lag` is called before attention and experts."""
        blocks = [m for name, m in model.named_modules() if name.endswith(("self_attn", "mlp"))] if lag else []
        handles = [block.register_forward_pre_hook(lambda *_: lag()) for block in blocks]
        model.train()
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        found = [out.logits.detach(), *[p.grad for p in model.parameters() if p.requires_grad]]
        model.zero_grad(set_to_none=True)
        for handle in handles:
            handle.remove()
        return found

    @pytest.mark.parametrize("late", ["neither", "copies", "products"])
    @pytest.mark.parametrize("reentrant", [None, False, True], ids=str)
    @pytest.mark.parametrize("kind", ["mixture", "linear layers"])
    def test_no_number_changes_whoever_is_late(self, kind: str, reentrant: bool | None, late: str, monkeypatch):
        here, there = self.pair(kind)
        ids = tokens(2, 24).cuda()
        for base in (m for m in there.modules() if isinstance(m, FrozenWeight)):
            assert base.device.type == "cuda"
            assert base.base.is_pinned()
            assert base.scale0_bits.is_pinned()
        if reentrant is not None:
            for model in (here, there):
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
                model.enable_input_require_grads()
        lag = None
        if late == "copies":
            at_once = staging.BesideStream.copy

            def slow(self, pairs, after):
                with torch.cuda.stream(self._side):
                    for moment in after:
                        self._side.wait_event(moment)
                    for there, _ in pairs:
                        there.fill_(77)  # what is read too early is wrong
                    torch.cuda._sleep(2_000_000)
                return at_once(self, pairs, after)

            monkeypatch.setattr(staging.BesideStream, "copy", slow)
        if late == "products":
            lag = functools.partial(torch.cuda._sleep, 200_000)
        expected, again = self.step(here, ids), self.step(here, ids)
        for _ in range(2):
            found = self.step(there, ids, lag)
            assert torch.equal(found[0], expected[0])
            for mine, one, other in zip(found, expected, again, strict=True):
                if torch.equal(one, other):  # atomic sums differ from run to run
                    assert torch.equal(mine, one)
                else:
                    torch.testing.assert_close(mine, one, rtol=2e-2, atol=1e-3 * one.abs().max().item())

    def test_two_blocks_of_the_base_are_on_the_gpu(self):
        here, there = self.pair("mixture", downcast="int")
        ids = tokens(2, 24).cuda()
        sizes = [0, 0, 0, 0]
        for base in (m for m in there.modules() if isinstance(m, FrozenWeight)):
            sizes[base.block] += base.base.nbytes + base.scale0_bits.nbytes
        del there
        held = []
        for model in (here, self.pair("mixture", downcast="int")[1]):
            gc.collect()
            self.step(model, ids)
            self.step(model, ids)
            held.append(sum(base.nbytes for base in model.parameters() if base.is_cuda))
        assert held[0] - held[1] == sum(sizes)
        (buffers,) = next(m for m in model.modules() if isinstance(m, FrozenWeight)).schedule._buffers.values()
        assert 2 * max(sizes) <= sum(b.memory.nbytes for b in (buffers._last, buffers._other)) < 2.1 * max(sizes)

    def test_it_moves_merges_and_generates(self):
        here, there = self.pair("mixture")
        ids = tokens(2, 24).cuda()
        expected = logits(here, ids)
        with torch.inference_mode():
            assert torch.equal(there(input_ids=ids).logits, expected)
        kept = [model.generate(input_ids=ids[:1], max_new_tokens=4, do_sample=False) for model in (here, there)]
        assert torch.equal(*kept)
        copied = copy.deepcopy(there)
        assert torch.equal(logits(copied, ids), expected)
        assert all(m.base.is_pinned() for m in copied.modules() if isinstance(m, FrozenWeight))
        del copied
        there.cpu()
        logits(there, ids.cpu())
        there.cuda()
        assert torch.equal(logits(there, ids), expected)
        mine, others = (model.merge_and_unload().state_dict() for model in (there, here))
        assert mine.keys() == others.keys()
        assert all(torch.equal(mine[name], others[name]) for name in mine)

    def test_a_cuda_graph_is_refused(self):
        _, there = self.pair("linear layers")
        layer = there.base_model.model.model.layers[0].self_attn.q_proj
        x = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            layer(x)
            with pytest.raises(RuntimeError, match="offload_base"), torch.cuda.graph(torch.cuda.CUDAGraph()):
                layer(x)


GRAPHED = {
    "fx8": {},
    "int4 in groups": {"downcast": "int", "group_size": 32},
    "channel scales": {"downcast": "int", "group_size": 32, "learn_scales": "channel"},
    "rounded inputs": {"act_bits": 8},
    "rounded cache": {"kv_bits": 8, "kv_rule": "vllm"},
}


class TestCudaGraphs:
    """Blocks as CUDA graphs: the numbers of training without them."""

    @staticmethod
    def make(kind: str, layers: int = 3) -> Any:
        torch.manual_seed(0)
        if kind == "mixture":
            return on_experts(mixture(torch.bfloat16, hidden_size=256, moe_intermediate_size=128), group_size=32).cuda()
        base = tiny(
            dtype=torch.bfloat16,
            num_hidden_layers=layers,
            hidden_size=256,
            intermediate_size=512,
            num_attention_heads=4,
        )
        if kind == "LoRA":
            return get_peft_model(base.cuda(), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        return adapted(base.cuda(), **GRAPHED[kind])

    @staticmethod
    def check(found: list[torch.Tensor], expected: list[torch.Tensor], again: list[torch.Tensor]) -> None:
        for i, (mine, one, other) in enumerate(zip(found, expected, again, strict=True)):
            if torch.equal(one, other):  # atomic sums differ from run to run
                assert torch.equal(mine, one), (i, (mine - one).abs().max(), one.abs().max())
            else:
                print(f"{i} differs from run to run by {(one - other).abs().max():.2g}")
                torch.testing.assert_close(mine, one, rtol=2e-2, atol=1e-2 * one.abs().max().item())

    @pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "no autocast"])
    @pytest.mark.parametrize("kind", ["LoRA", *GRAPHED, "mixture"])
    def test_losses_and_gradients_are_those_without(self, kind: str, autocast: bool):
        shapes = ((2, 64), (2, 64), (2, 64), (1, 96), (2, 64), (1, 96), (1, 96))
        runs = [trained(self.make(kind), graphs, shapes, autocast) for graphs in (False, False, True)]
        (expected, _), (again, _), (found, counts) = runs
        print(kind, counts)
        self.check(found, expected, again)
        if kind != "mixture":
            assert counts == {"recorded": 6, "replayed": 36, "ordinary": 6}

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_either_kind_of_checkpointing(self, reentrant: bool):
        how = {"use_reentrant": reentrant}
        runs = [trained(self.make("fx8"), graphs, checkpointing=how) for graphs in (False, False, True)]
        self.check(runs[2][0], runs[0][0], runs[1][0])

    def test_all_blocks_share_memory(self):
        held = []
        for layers in (2, 6):
            model = self.make("int4 in groups", layers).train()
            model.gradient_checkpointing_enable()
            ids = tokens(2, 64).cuda()
            with cuda_graphs(model):
                for _ in range(3):
                    model(input_ids=ids, labels=ids).loss.backward()
                torch.cuda.synchronize()
                pools = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0)]
                held.append(sum(s["total_size"] - s["allocated_size"] for s in pools))  # without cuBLAS' workspaces
            del model
            gc.collect()
            torch.cuda.empty_cache()
        assert 0 < held[1] <= 1.1 * held[0]

    def test_a_block_that_waits_runs_without(self):
        def waiting(model: Any) -> Any:
            mlp = model.base_model.model.model.layers[1].mlp
            before = mlp.forward
            mlp.forward = lambda x: before(x) * (1.0 if x.sum().item() < 1e9 else 2.0)
            return model

        runs = [trained(waiting(self.make("fx8")), graphs) for graphs in (False, False, True)]
        self.check(runs[2][0], runs[0][0], runs[1][0])
        assert runs[2][1] == {"recorded": 2, "replayed": 14, "ordinary": 2 + 8}

    def test_a_saved_adapter_goes_on(self, tmp_path):
        def goes_on(graphs: bool) -> list[torch.Tensor]:
            model = self.make("int4 in groups")
            first, _ = trained(model, graphs)
            model.save_pretrained(tmp_path / str(graphs))
            base = tiny(
                dtype=torch.bfloat16,
                num_hidden_layers=3,
                hidden_size=256,
                intermediate_size=512,
                num_attention_heads=4,
            )
            model = PeftModel.from_pretrained(base.cuda(), tmp_path / str(graphs), is_trainable=True)
            return [*first, *trained(model, graphs)[0]]

        expected, again, found = goes_on(False), goes_on(False), goes_on(True)
        self.check(found, expected, again)

    @pytest.mark.parametrize("packing", [True, False])
    def test_through_a_trainer(self, packing: bool, tmp_path):
        sft = pytest.importorskip("trl")

        def run(callbacks: list) -> list[float]:
            model = self.make("int4 in groups")
            options = {
                "max_length": 32,
                "packing": packing,
                "packing_strategy": "wrapped",
                "use_cpu": False,
                "bf16": True,
            }
            args = arguments(tmp_path, sft.SFTConfig, **options, gradient_accumulation_steps=2)
            trainer = sft.SFTTrainer(
                model, args, train_dataset=counting_text(), processing_class=word_tokenizer(), callbacks=callbacks
            )
            trainer.train()
            return losses(trainer)

        assert run([]) == run([CudaGraphCallback()])

"""Low-bit SR in blocks that are replayed as graphs: the integers of training without them, with a recorder for CPUs."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from peft_lrqat import calibrate_activations
from peft_lrqat.modules import block_graphs
from peft_lrqat.modules.block_graphs import BlockGraphs
from peft_lrqat.modules.block_recording import BlockGraph
from peft_lrqat.ops.narrow_gradient import NarrowGradient
from peft_lrqat.tuners.lowbit_sr import LowBitTensor
from tests.graphs import RunsAgain, attached, checkpointed, equal
from tests.low_bit_graphs import loss_of, low_bit_weights, optimizer_of, run, several_forwards
from tests.lowbit_sr import integers
from tests.models import low_bit, tiny, tokens


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(block_graphs, "recorder_for", lambda device: RunsAgain())


def fixed_scales(**options) -> nn.Module:
    model = low_bit(tiny("qwen3"), act_bits=8, act_scale="static", **options)
    calibrate_activations(model, [tokens()])
    return model


def second_adapter() -> nn.Module:
    model = low_bit(tiny(), bits=4)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("other")
    return model


def norms_and_embeddings() -> nn.Module:
    model = low_bit(tiny(), bits=4, modules_to_save=["embed_tokens", "input_layernorm"])
    assert any(p.requires_grad for name, p in model.named_parameters() if "input_layernorm" in name)
    return model


MODELS = {
    "4 bits": lambda: low_bit(tiny(), bits=4),
    "8 bits, growing": lambda: low_bit(tiny(), bits=8, grow_scales=True),
    "2 bits, no base": lambda: low_bit(tiny(), bits=2, keep_base=False),
    "bf16 model": lambda: low_bit(tiny(dtype=torch.bfloat16), bits=4),
    "bf16 model, ternary": lambda: low_bit(tiny(dtype=torch.bfloat16), bits=1.58),
    "learned scales": lambda: low_bit(tiny(), bits=4, group_size=16, learn_scales=True),
    "BitNet": lambda: low_bit(tiny(), bits=1.58, group_size=0, act_bits=8, export_format="bitnet"),
    "ternary forward": lambda: low_bit(tiny(), bits=8, forward_bits=1.58, learn_scales=True),
    "rounded inputs": lambda: low_bit(tiny("qwen3"), bits=8, act_bits=8),
    "fixed scales of inputs": lambda: fixed_scales(bits=8),
    "error feedback": lambda: low_bit(tiny(), bits=4, error_feedback=True),
    "rounded cache": lambda: low_bit(tiny(), bits=4, kv_bits=8),
    "GPT-2": lambda: low_bit(tiny("gpt2"), bits=4),
    "a second adapter": second_adapter,
    "norms and embeddings": norms_and_embeddings,
    "norms of a bf16 model": lambda: low_bit(tiny("qwen3", dtype=torch.bfloat16), bits=4, modules_to_save=["norm"]),
}


def with_and_without(make, optimizer, **how) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[str, int]]:
    expected_model = checkpointed(make())
    expected = run(expected_model, optimizer(expected_model), **how)
    model = make()
    graphs = attached(model)
    found = run(model, optimizer(model), **how)
    graphs.detach()
    return found, expected, graphs.counts


@pytest.mark.parametrize("fused", [True, False], ids=["in backward", "in step"])
@pytest.mark.parametrize("name", MODELS)
def test_integers_are_those_of_training_without(name, fused):
    found, expected, counts = with_and_without(MODELS[name], lambda m: optimizer_of(m, fused_backward=fused))
    assert equal(found, expected)
    assert counts == {"recorded": 4, "replayed": 8, "ordinary": 4}


@pytest.mark.parametrize(
    "options", [{}, {"state": "factored"}, {"latent_weights": True}, {"betas": (0.0, 0.98)}], ids=str
)
@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
def test_gradients_that_accumulate(options, told):
    how = {"fused_backward": told, **({"gradient_accumulation_steps": 3} if told else {}), **options}
    found, expected, counts = with_and_without(MODELS["bf16 model"], lambda m: optimizer_of(m, **how), accumulate=3)
    assert equal(found, expected)
    assert counts["replayed"] == 32


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_any_optimizer(kind):
    def make(model):
        return kind([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    found, expected, counts = with_and_without(MODELS["4 bits"], make)
    assert equal(found, expected)
    assert counts["replayed"] == 8


def test_products_that_are_made_late(monkeypatch):
    """As those of 2048 tokens and more."""
    monkeypatch.setattr("peft_lrqat.ops.low_bit._LATE_TOKENS", 1)
    found, expected, _ = with_and_without(MODELS["bf16 model"], lambda m: optimizer_of(m, fused_backward=True))
    assert equal(found, expected)


@pytest.mark.parametrize("fused", [True, False], ids=["in backward", "in step"])
@pytest.mark.parametrize("name", ["4 bits", "learned scales", "rounded inputs"])
def test_under_autocast(name, fused):
    how = {"fused_backward": fused}
    found, expected, _ = with_and_without(MODELS[name], lambda m: optimizer_of(m, **how), autocast=True)
    assert equal(found, expected)


def test_scales_that_have_doubled():
    def growing():
        model = MODELS["8 bits, growing"]()
        for weight in low_bit_weights(model):
            weight.stream[1] = 62  # grows after the second step
            codes = torch.full(weight.shape, 127, dtype=torch.int8)
            weight.packed.copy_(LowBitTensor.from_codes(codes, weight.scale, weight.grid, 0).packed)
        return model

    found, expected, counts = with_and_without(growing, lambda m: optimizer_of(m, fused_backward=True))
    assert equal(found, expected)
    assert counts == {"recorded": 4, "replayed": 8, "ordinary": 4}
    before = [weight.scale for weight in low_bit_weights(growing())]
    assert not equal([t for t in found if t.shape == before[0].shape][: len(before)], before)


# -- whose gradients they are


def prepared(graphs: bool, optimizer=None, model: nn.Module | None = None) -> tuple[nn.Module, BlockGraphs | None]:
    """A bf16 model whose blocks are recorded, with an optimizer whose steps are in backward."""
    model = MODELS["bf16 model"]() if model is None else model
    attach = attached(model) if graphs else None
    if attach is None:
        checkpointed(model)
    model.optimizer = optimizer_of(model, fused_backward=True) if optimizer is None else optimizer(model)
    for seed in range(2):
        loss_of(model, seed).backward()
        model.optimizer.step()
        model.optimizer.zero_grad()
    return model, attach


def test_an_optimizer_in_backward_reads_the_graphs_own_memory(monkeypatch):
    model, graphs = prepared(True)
    from peft_lrqat.tuners.lowbit_sr import optim

    seen, step_codes = [], optim.step_codes
    monkeypatch.setattr(optim, "step_codes", lambda *args: (seen.append(args[3]), step_codes(*args))[1])
    loss_of(model).backward()
    memory = {t.data_ptr() for t in graphs._results.values()}
    assert len(seen) == 14
    assert all(grad.data_ptr() in memory and grad.dtype == torch.bfloat16 for grad in seen)


def test_a_recording_has_one_gradient_at_a_time(monkeypatch):
    """Where it cannot be written to where it belongs: before it is known, and where it is not taken at once."""
    for optimizer in (None, not_fused):
        made: list[weakref.ref] = []

        def watched(self, place, grad, put_away=BlockGraph._put_away, made=made):
            assert not any(one() is not None for one in made)
            values = grad.held if isinstance(grad, NarrowGradient) else grad
            if place not in self._grads or values is not self._grads[place]:
                made.append(weakref.ref(values))
            return put_away(self, place, grad)

        with monkeypatch.context() as patched:
            patched.setattr(BlockGraph, "_put_away", watched)
            model, _ = prepared(True, optimizer)
            loss_of(model).backward()
        assert len(made) == (14 if optimizer is None else 3 * 14)


def told_of_three(model: nn.Module):
    return optimizer_of(model, fused_backward=True, gradient_accumulation_steps=3)


def not_fused(model: nn.Module):
    return optimizer_of(model, fused_backward=False)


@pytest.mark.parametrize(("backwards", "optimizer"), [(1, None), (1, not_fused), (3, told_of_three), (3, not_fused)])
def test_several_forwards_before_their_backwards(backwards, optimizer):
    """As DPO does. The gradient of the first use of a weight waits until that of the last is there."""
    runs = []
    for graphs in (True, False):
        model, _ = prepared(graphs, optimizer)
        runs.append([*several_forwards(model, backwards), *integers(model)])
    assert equal(*runs)


@pytest.mark.parametrize("graphs", [True, False])
def test_a_second_backward_after_a_step_in_backward_is_an_error(graphs):
    model, _ = prepared(graphs)
    with pytest.raises(RuntimeError, match="in place between forward and backward"):
        several_forwards(model, 3)


def sharing() -> nn.Module:
    model = MODELS["bf16 model"]()
    layers = model.get_base_model().model.layers
    layers[1].mlp.up_proj = layers[0].mlp.up_proj
    layers[1].mlp.gate_proj = layers[1].mlp.up_proj  # twice in a block, too
    layers[1].mlp.down_proj = layers[0].mlp.down_proj
    return model


@pytest.mark.parametrize("optimizer", [None, not_fused])
def test_weights_that_blocks_share(optimizer):
    runs = []
    for graphs in (True, False):
        model, _ = prepared(graphs, optimizer, sharing())
        found = []
        for seed in range(4):
            found.append(loss_of(model, seed).detach())
            loss_of(model, seed).backward()
            model.optimizer.step()
            model.optimizer.zero_grad()
        runs.append([*found, *integers(model)])
    assert equal(*runs)


@pytest.mark.parametrize("optimizer", [None, not_fused])
def test_weights_that_a_loss_uses_too(optimizer):
    """Its part of a weight's gradient comes after all blocks, or before."""
    runs = []
    for graphs in (True, False):
        model, _ = prepared(graphs, optimizer)
        for first in (True, False):
            decay = sum((p**2).sum() for p in low_bit_weights(model)) if first else 0
            loss = loss_of(model, 5)
            decay = decay if first else sum((p**2).sum() for p in low_bit_weights(model))
            (loss + 0.01 * decay).backward()
            model.optimizer.step()
            model.optimizer.zero_grad()
        runs.append(integers(model))
    assert equal(*runs)


@pytest.mark.parametrize("optimizer", [None, not_fused])
def test_gradients_that_somebody_keeps_do_not_change(optimizer):
    runs = []
    for graphs in (True, False):
        model, _ = prepared(graphs, optimizer)
        weights = low_bit_weights(model)
        kept: dict[int, torch.Tensor] = {}
        handles = [p.register_hook(partial(kept.__setitem__, i)) for i, p in enumerate(weights)]
        loss_of(model, 5).backward()
        for handle in handles:
            handle.remove()
        model.optimizer.step()
        model.optimizer.zero_grad()
        asked = torch.autograd.grad(loss_of(model, 6), weights)
        loss_of(model, 7).backward()
        grads = [*(kept[i] for i in range(14)), *asked]
        runs.append([torch.zeros(grad.shape) + grad for grad in grads])
    assert equal(*runs)


def test_a_backward_may_be_repeated():
    model, _ = prepared(True, not_fused)
    loss = loss_of(model, 5)
    loss.backward(retain_graph=True)
    weights = low_bit_weights(model)
    first = [p.grad for p in weights]
    kept = [grad.clone() for grad in first]
    assert not any(isinstance(grad, NarrowGradient) for grad in first)
    model.zero_grad(set_to_none=True)
    loss_of(model, 6).backward()
    model.zero_grad(set_to_none=True)
    loss.backward()
    assert equal(first, kept)
    assert equal([p.grad for p in weights], kept)


def test_gradients_that_nobody_takes():
    """The optimizer that steps in backward is gone."""
    runs = []
    for graphs in (True, False):
        model, _ = prepared(graphs)
        loss = loss_of(model, 5)
        del model.optimizer
        gc.collect()
        loss.backward()
        grads = [p.grad for p in low_bit_weights(model)]
        model.zero_grad(set_to_none=True)
        loss_of(model, 6).backward()
        loss_of(model, 7).backward()
        assert {type(grad) for grad in grads} == {torch.Tensor}
        runs.append([*grads, *[p.grad for p in low_bit_weights(model)]])
    assert equal(*runs)


def test_data_parallel_processes_exchange_their_gradients():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        runs = []
        for graphs in (True, False):
            model, _ = prepared(graphs, not_fused)
            numbers = []

            def double(state, bucket, numbers=numbers):
                numbers.append(bucket.buffer().numel())
                future = torch.futures.Future()
                future.set_result(bucket.buffer() * 2)
                return future

            spread = nn.parallel.DistributedDataParallel(model)
            spread.register_comm_hook(None, double)
            ids = tokens(2, 16)
            for _ in range(3):
                spread(input_ids=ids, labels=ids).loss.backward()
            assert sum(numbers) == 3 * sum(p.numel() for p in model.parameters() if p.requires_grad)
            grads = [p.grad.clone() for p in low_bit_weights(model)]
            model.optimizer.step()
            runs.append([*grads, *integers(model)])
        assert equal(*runs)
    finally:
        dist.destroy_process_group()


# -- what changes


@pytest.mark.parametrize("name", ["packed", "scale"])
def test_integers_that_are_written_before_backward_are_noticed(name):
    model, _ = prepared(True)
    loss = loss_of(model)
    weight = low_bit_weights(model)[3]
    weight.write(name, getattr(weight, name).clone())
    with pytest.raises(RuntimeError, match="between forward and backward"):
        loss.backward()


def test_loaded_integers_are_used():
    """They are written where the graphs read."""
    runs = []
    for graphs in (True, False):
        model, attach = prepared(graphs)
        saved = {name: t.clone() for name, t in model.state_dict().items()}
        loss_of(model, 5).backward()
        model.optimizer.step()
        model.load_state_dict(saved)
        runs.append([loss_of(model, 5).detach(), *integers(model)])
        if attach is not None:
            assert attach.counts["recorded"] == 2
    assert equal(*runs)


def other_words(model):
    for weight in low_bit_weights(model):
        weight.packed = weight.packed.clone()


def other_scales(model):
    for weight in low_bit_weights(model):
        weight.scale = weight.scale * 2


def moved(model):
    for module in model.modules():
        if hasattr(module, "lowbitsr_weight"):
            for entry in module.lowbitsr_weight.values():
                entry.weight = nn.Parameter(entry.weight.detach().clone())


def not_at_once(model):
    model.optimizer = optimizer_of(model)


def frozen(model):
    for layer in model.get_base_model().model.layers:
        layer.mlp.requires_grad_(False)


@pytest.mark.parametrize("change", [other_words, other_scales, moved, not_at_once, frozen])
def test_what_changes_is_recorded_anew(change):
    runs = []
    for graphs in (True, False):
        model, attach = prepared(graphs)
        change(model)
        found = [loss_of(model, 5)]
        found[0].backward()
        for seed in (6, 7, 8):
            model.optimizer.step()
            model.optimizer.zero_grad()
            found.append(loss_of(model, seed))
            found[-1].backward()
        runs.append([*[loss.detach() for loss in found], *integers(model)])
        if attach is not None:
            assert attach.counts["recorded"] == 4
    assert equal(*runs)


def test_the_base_of_an_adapter_and_a_copy_of_the_model():
    runs = []
    for graphs in (True, False):
        model, _ = prepared(graphs)
        with model.disable_adapter():
            found = [loss_of(model, 5).detach()]
            with torch.no_grad():
                found.append(loss_of(model, 5))
        other = copy.deepcopy(model)
        for one in (model, other, model):
            loss = loss_of(one, 6)
            loss.backward()
            found.append(loss.detach())
            one.optimizer.step()
            one.zero_grad()
        runs.append([*found, *integers(model), *integers(other)])
    assert equal(*runs)


def test_nothing_outlives_its_recording():
    def alive() -> int:
        gc.collect()
        return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())

    model = checkpointed(MODELS["bf16 model"]())
    optimizer = optimizer_of(model, fused_backward=True)
    model_and_state = 0
    graphs = BlockGraphs(model)
    for seed in range(6):
        if seed == 3:
            model_and_state = alive()
            graphs.attach()
        optimizer._scalars = type(optimizer._scalars)()  # which keeps those of some steps
        loss_of(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert graphs.counts["replayed"] == 4
    # x, the output and its gradient, the gradient of x; rotary tables and a mask; the gradients of a block's weights
    assert alive() - model_and_state <= len(graphs._buffers) * 2 + len(graphs._results)
    there = [weakref.ref(model), *map(weakref.ref, model.parameters())]
    graphs.detach()
    assert alive() == model_and_state
    del model, graphs, optimizer
    gc.collect()
    assert [ref() for ref in there if ref() is not None] == []

"""What is recorded of a block, with a recorder for CPUs: the numbers of ordinary checkpointing, to the last bit."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from peft_lrqat import calibrate_activations
from peft_lrqat.modules import block_graphs
from peft_lrqat.modules.block_graphs import BlockGraphs
from tests.graphs import RunsAgain, attached, checkpointed, equal, lora, lrqat, step, trained
from tests.mixtures import mixture, on_experts
from tests.models import tiny, tokens


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(block_graphs, "recorder_for", lambda device: RunsAgain())


def fixed_scales() -> nn.Module:
    model = lrqat("qwen3", act_bits=8, act_scale="static")
    calibrate_activations(model, [tokens()])
    return model


MODELS = {
    "LoRA": lora,
    "LR-QAT": lambda: lrqat(),
    "LR-QAT in groups, rounded cache": lambda: lrqat(group_size=16, downcast="int", kv_bits=8),
    "LR-QAT, rank 0": lambda: lrqat(r=0, group_size=16),
    "LR-QAT, norms": lambda: lrqat(r=0, modules_to_save=["norm"]),
    "LR-QAT, rounded inputs": lambda: lrqat("qwen3", act_bits=8),
    "LR-QAT, fixed scales of inputs": fixed_scales,
    "two kinds of attention": lambda: lora(tiny("gemma3")),
    "GPT-2": lambda: lora(tiny("gpt2"), fan_in_fan_out=True),
    "experts": lambda: on_experts(mixture(), range_method="minmax"),
}


@pytest.mark.parametrize(
    ("name", "autocast"), [*((name, True) for name in MODELS), ("LoRA", False), ("LR-QAT", False)], ids=str
)
def test_losses_and_gradients_are_those_of_checkpointing(name, autocast):
    shapes = ((2, 16), (1, 12), (2, 16))
    model = MODELS[name]()
    (found, counts), (expected, _) = (
        trained(copy.deepcopy(model), graphs, shapes, autocast) for graphs in (True, False)
    )
    assert equal(found, expected)
    assert counts == {"recorded": 4, "replayed": 8, "ordinary": 4}


def test_reentrant_checkpointing_too():
    how = {"use_reentrant": True}
    expected, _ = trained(lora(), False, checkpointing=how)
    found, counts = trained(lora(), True, checkpointing=how)
    assert equal(found, expected)
    assert counts["replayed"] == 14


def test_everything_may_be_trained():
    expected, _ = trained(tiny(), False)
    found, counts = trained(tiny(), True)
    assert equal(found, expected)
    assert counts["replayed"] == 14


def test_several_forwards_before_their_backwards():
    """As DPO does; masks differ, so the buffers are filled anew."""
    ids = [tokens(2, 16, seed=seed) for seed in range(3)]
    masks = [(torch.arange(16) < n).long().expand(2, 16) for n in (10, 14, 16)]

    def run(model):
        for _ in range(3):
            given = zip(ids, masks, strict=True)
            losses = [model(input_ids=i, attention_mask=m, labels=i).loss for i, m in given]
            for loss in losses:
                loss.backward()
        return [*losses, *[p.grad for p in model.parameters() if p.grad is not None]]

    expected, model = run(checkpointed(lora())), lora()
    graphs = attached(model)
    assert equal(run(model), expected)
    assert graphs.counts["replayed"] > 8


def test_a_backward_may_be_repeated_and_its_gradients_are_nobody_elses():
    model = lora()
    attached(model)
    for _ in range(2):
        step(model)
    ids = tokens(2, 16)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward(retain_graph=True)
    first = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    kept = {name: grad.clone() for name, grad in first.items()}
    model.zero_grad(set_to_none=True)
    step(model, tokens(2, 16, seed=5))
    loss.backward()
    for name, p in model.named_parameters():
        if name in first:
            assert torch.equal(first[name], kept[name])
            assert torch.equal(p.grad, kept[name])


def test_second_derivatives_are_refused():
    """Also of named inputs, for which torch would leave the blocks out without a word."""
    model = lora()
    attached(model)
    for _ in range(2):
        step(model)
    ids = tokens(2, 16)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(RuntimeError, match="asks for second derivatives"):
        torch.autograd.grad(model(input_ids=ids, labels=ids).loss, parameters, create_graph=True)


def test_weights_that_change_before_backward_are_noticed():
    model = lora()
    attached(model)
    for _ in range(2):
        step(model)
    ids = tokens(2, 16)
    loss = model(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1)
    with pytest.raises(RuntimeError, match="between forward and backward"):
        loss.backward()


def test_hooks_on_parameters_run_once():
    def run(model):
        p = next(p for p in model.parameters() if p.requires_grad)
        p.register_hook(lambda grad: grad * 2)
        arrived = []
        p.register_post_accumulate_grad_hook(arrived.append)
        found = [one for _ in range(3) for one in step(model)]
        assert len(arrived) == 3
        return found

    model = lora()
    graphs = attached(model)
    assert equal(run(model), run(checkpointed(lora())))
    assert graphs.counts["replayed"] == 4


def test_data_parallel_processes_exchange_their_gradients():
    """DDP hangs its hooks on the nodes that sum gradients, and averages as soon as a bucket is full."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:

        def run(model, graphs):
            averaged = []

            def double(state, bucket):
                averaged.append(bucket.buffer().numel())
                future = torch.futures.Future()
                future.set_result(bucket.buffer() * 2)
                return future

            if graphs:
                attached(model)
            spread = nn.parallel.DistributedDataParallel(checkpointed(model) if not graphs else model)
            spread.register_comm_hook(None, double)
            found = [one for _ in range(3) for one in step(spread)]
            assert sum(averaged) == 3 * sum(p.numel() for p in model.parameters() if p.requires_grad)
            return found

        assert equal(run(lora(), True), run(lora(), False))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["LoRA", "LR-QAT", "GPT-2"])
def test_nothing_that_a_block_computes_outlives_its_recording(name):
    """Neither in forward nor in recomputation; and without graphs the model is gone with its last reference."""

    def alive() -> int:
        gc.collect()
        return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())

    model = checkpointed(MODELS[name]())
    step(model)
    before = alive()
    graphs = BlockGraphs(model)
    graphs.attach()
    for _ in range(3):
        step(model)
    assert graphs.counts["replayed"] == 4
    # x, the output and its gradient, the gradient of x; rotary tables and a mask; the gradients of a block's parameters
    count = len(graphs._buffers) * 2 + len(graphs._results)
    assert alive() - before <= count
    there = [weakref.ref(model), *map(weakref.ref, model.parameters())]
    graphs.detach()
    assert alive() == before
    del model, graphs
    gc.collect()
    assert [ref() for ref in there if ref() is not None] == []


def test_saved_tensors_may_be_moved_elsewhere():
    """As activation offloading does: in a replay, the input of each block, and nothing inside."""
    model, moved = lora(), []
    graphs = attached(model)

    def away(tensor):
        moved.append(tensor)
        return tensor.clone()

    expected = step(checkpointed(lora()))
    for _ in range(3):
        moved.clear()
        with torch.autograd.graph.saved_tensors_hooks(away, lambda t: t):
            found = step(model)
    assert equal(found, expected)
    assert graphs.counts["replayed"] == 4
    assert sum(t.shape == (2, 16, 32) for t in moved) < 10

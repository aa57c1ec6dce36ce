"""Blocks as graphs, with a recorder for CPUs: the numbers of ordinary checkpointing, to the last bit."""

import copy
import gc
import pickle
import re
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_lrqat.modules import block_graphs
from peft_lrqat.modules.block_graphs import LIMIT, BlockGraphs
from tests.graphs import RunsAgain, trained
from tests.mixtures import mixture, on_experts
from tests.models import adapted, tiny, tokens


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(block_graphs, "recorder_for", lambda device: RunsAgain())


@pytest.fixture
def warnings(monkeypatch):
    found: list[str] = []
    monkeypatch.setattr(block_graphs.logger, "warning", found.append)
    return found


def lora(base=None, **options):
    torch.manual_seed(0)
    return get_peft_model(base or tiny(), LoraConfig(**{"target_modules": "all-linear", "r": 4, **options}))


def lrqat(family="llama", **options):
    return adapted(tiny(family), range_method="minmax", **options)  # the search would take most of a test's time


def equal(found, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


def attached(model: nn.Module) -> BlockGraphs:
    graphs = BlockGraphs(checkpointed(model))
    graphs.attach()
    return graphs


def step(model: nn.Module, ids: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Loss and gradients, which are taken away."""
    ids = tokens(2, 16) if ids is None else ids
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = [loss.detach(), *[p.grad for p in model.parameters() if p.grad is not None]]
    model.zero_grad(set_to_none=True)
    return found


MODELS = {
    "LoRA": lora,
    "LR-QAT": lambda: lrqat(),
    "LR-QAT in groups, rounded cache": lambda: lrqat(group_size=16, downcast="int", kv_bits=8),
    "LR-QAT, rounded inputs": lambda: lrqat("qwen3", act_bits=8),
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
    model = lora()
    attached(model)
    for _ in range(2):
        step(model)
    ids = tokens(2, 16)
    loss = model(input_ids=ids, labels=ids).loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.sum() for g in grads).backward()


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


def test_a_switched_adapter_and_moved_weights_are_recorded_anew():
    def two():
        model = lora()
        model.add_adapter("other", LoraConfig(target_modules="all-linear", r=8, init_lora_weights=False))
        return checkpointed(model)

    def run(model):
        found = []
        for name in ("default", "default", "other", "other", "default", "default"):
            model.set_adapter(name)
            found += step(model)
        for p in model.parameters():
            p.data = p.data.clone() + 0.01
        for _ in range(3):
            found += step(model)
        with torch.no_grad(), model.disable_adapter():
            found.append(model(input_ids=tokens()).logits)
        return [*found, *step(model)]

    expected, model = run(two()), two()
    graphs = attached(model)
    assert equal(run(model), expected)
    assert graphs.counts == {"recorded": 8, "replayed": 12, "ordinary": 8}


def test_what_changes_again_and_again_ends_the_graphs(warnings):
    model = lora()
    graphs = attached(model)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    for turn in range(2 * LIMIT + 4):
        layer.scaling["default"] = float(turn // 2 + 1)
        step(model)
    assert graphs.counts["recorded"] == LIMIT + 1
    assert ["mlp.up_proj.scaling" in text and "again and again" in text for text in warnings] == [True]


def test_a_bounded_number_of_shapes(warnings):
    model = lora()
    graphs = attached(model)
    for length in range(4, 4 + LIMIT + 2):
        for _ in range(2):
            step(model, tokens(1, length))
    assert graphs.counts["recorded"] == 2 * LIMIT
    assert ["pad_to_multiple_of" in text for text in warnings] == [True]
    expected = step(checkpointed(lora()), tokens(1, 4 + LIMIT))
    assert equal(step(model, tokens(1, 4 + LIMIT)), expected)


def test_shapes_that_never_come_twice_are_told(warnings):
    model = lora()
    graphs = attached(model)
    for length in range(1, 8 * LIMIT + 2):
        model(input_ids=tokens(1, length))
    assert graphs.counts["recorded"] == 0
    assert len(warnings) == 1


# -- what runs without graphs


class Block(GradientCheckpointingLayer):
    """A block of a model that does one thing more, which a graph could not."""

    def __init__(self, also) -> None:
        super().__init__()
        self.linear, self.also = nn.Linear(4, 4), also
        self.kept = [self.linear.weight]

    def forward(self, x, **options):
        return self.also(self, self.linear(x), options)


class Stack(nn.Module):
    def __init__(self, also) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(also) for _ in range(2)])
        for block in self.blocks:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = lambda f, *a: torch.utils.checkpoint.checkpoint(
                f, *a, use_reentrant=False
            )

    def forward(self, x, **options):
        for block in self.blocks:
            x = block(x, **options)
            x = x if isinstance(x, torch.Tensor) else x["x"]
        return x


def draws(block, y, options):
    return torch.nn.functional.dropout(y, 0.5)


def writes(block, y, options):
    options["mask"].mul_(1)
    return y


def a_dictionary(block, y, options):
    return {"x": y}


def an_object(block, y, options):
    return {"x": y}.items().mapping


def kept_elsewhere(block, y, options):
    return y + block.kept[0].sum()


def detached(block, y, options):
    return y.detach()


def fails(block, y, options):
    if block.kept[0] is not block.linear.weight:  # a stand-in: it is tried
        raise RuntimeError("out of luck")
    return y


@pytest.mark.parametrize(
    ("also", "words"),
    [
        (draws, "it draws random numbers"),
        (writes, "it writes to its input"),
        (a_dictionary, "it returns a dict"),
        (an_object, "it returns a mappingproxy"),
        (kept_elsewhere, "keeps elsewhere too"),
        (detached, "nothing that it returns depends on"),
        (fails, "recording it failed: RuntimeError: out of luck"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_graph_runs_as_ever(also, words, warnings):
    def run(model):
        torch.manual_seed(7)
        found = []
        for _ in range(3):
            x = torch.ones(2, 4, requires_grad=True)
            y = model(x, mask=torch.ones(2, 4))
            if y.requires_grad:
                y.sum().backward()
            found += [y.detach(), *[p.grad.clone() for p in [x, *model.parameters()] if p.grad is not None]]
        return found

    expected, model = run(Stack(also).train()), Stack(also).train()
    graphs = BlockGraphs(model)
    graphs.attach()
    assert equal(run(model), expected)
    assert graphs.counts["replayed"] == 0
    assert [words in text for text in warnings] == [True]


def test_a_cache_is_not_recorded(warnings):
    model = Stack(lambda block, y, options: y).train()
    graphs = BlockGraphs(model)
    graphs.attach()
    for _ in range(3):
        model(torch.ones(2, 4), cache=object()).sum().backward()
    assert graphs.counts["replayed"] == 0
    assert "it is given a object" in warnings[0]


def test_a_hook_inside_is_named_and_runs(warnings):
    model, seen = lora(), []
    graphs = attached(model)
    model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: seen.append(1))
    for _ in range(3):
        step(model)
    assert len(seen) == 6  # forward and recomputation
    assert "'mlp' (LlamaMLP) has a hook" in warnings[0]
    assert graphs.counts["replayed"] == 2  # of the other block


def test_hooks_of_all_modules_run():
    model, seen = lora(), []
    graphs = attached(model)
    for _ in range(3):
        step(model)
    before = graphs.counts["replayed"]
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: seen.append(module))
    try:
        step(model)
    finally:
        handle.remove()
    assert model.get_base_model().model.layers[1].mlp in seen
    step(model)
    assert graphs.counts["replayed"] == before + 2


def test_tensors_on_another_device_are_not_recorded(warnings):
    model = Stack(lambda block, y, options: y).train()
    graphs = BlockGraphs(model)
    graphs.attach()
    for _ in range(3):
        model(torch.ones(2, 4), scale=torch.ones((), device="meta")).sum().backward()
    assert graphs.counts["replayed"] == 0
    assert "it is given a tensor on meta" in warnings[0]


def test_values_that_change_without_a_version_are_seen():
    def scaled(block, y, options):
        return y * options["scale"]

    model, scale = Stack(scaled).train(), torch.ones(2, 4)
    graphs = BlockGraphs(model)
    graphs.attach()
    found = []
    for factor in (1, 1, 2, 2):
        scale.data.mul_(factor)
        y = model(torch.ones(2, 4), scale=scale)
        found.append(y.detach())
        expected = model.eval()(torch.ones(2, 4), scale=scale)
        model.train()
        assert torch.equal(y, expected)
        y.sum().backward()
    assert graphs.counts["replayed"] == 6


def test_a_hook_that_comes_later_runs():
    model, seen = lora(), []
    attached(model)
    for _ in range(3):
        step(model)
    model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: seen.append(1))
    for _ in range(3):
        step(model)
    assert len(seen) == 6


def test_without_gradients_nothing_is_replayed():
    model = lora()
    graphs = attached(model)
    for _ in range(3):
        with torch.no_grad():
            model(input_ids=tokens())
    assert graphs.counts == {"recorded": 0, "replayed": 0, "ordinary": 0}


def test_an_ordinary_error_of_a_block_is_raised():
    def fails_always(block, y, options):
        raise KeyError("as ever")

    model = Stack(fails_always).train()
    BlockGraphs(model).attach()
    with pytest.raises(KeyError, match="as ever"):
        model(torch.ones(2, 4))


# -- attaching


def test_detaching_leaves_what_was_there():
    model = checkpointed(lora())
    layers = model.get_base_model().model.layers
    before = [layer._gradient_checkpointing_func for layer in layers]
    graphs = BlockGraphs(model)
    graphs.attach()
    assert all(layer._gradient_checkpointing_func is not one for layer, one in zip(layers, before, strict=True))
    again = BlockGraphs(model)  # of a training that failed, the blocks are still there
    again.attach()
    graphs.detach()
    step(model)
    assert again.counts["ordinary"] == 2
    again.detach()
    assert [layer._gradient_checkpointing_func for layer in layers] == before


def test_whoever_switches_checkpointing_anew_is_attached_to_again():
    model = lora()
    graphs = attached(model)
    for _ in range(2):
        step(model)
    checkpointed(model)
    step(model)
    assert graphs.counts["replayed"] == 2
    graphs.attach()
    step(model)
    assert graphs.counts["replayed"] == 4


def test_copies_of_the_model_have_no_graphs():
    model = lora()
    graphs = attached(model)
    for _ in range(2):
        step(model)
    counts = dict(graphs.counts)
    expected = step(checkpointed(lora()))
    assert equal(step(copy.deepcopy(model)), expected)
    function = model.get_base_model().model.layers[0]._gradient_checkpointing_func
    assert pickle.loads(pickle.dumps(function)).func is torch.utils.checkpoint.checkpoint
    assert graphs.counts == counts


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: lora().train(), "gradient checkpointing is off. Switch it on"),
        (lambda: nn.Linear(4, 4), "Linear has none"),
        (
            lambda: checkpointed(lora(lora_dropout=0.1)),
            "model.layers.0' cannot be a CUDA graph: 'self_attn.q_proj.lora_dropout",
        ),
        (lambda: checkpointed(lora(tiny(attention_dropout=0.1))), "`attention_dropout=0.1`"),
        (lambda: spread(checkpointed(lora())), "all blocks on one GPU, but they lie on cpu, meta"),
        (lambda: selective(lora()), "checkpointed selectively"),
    ],
    ids=["off", "none", "dropout", "attention dropout", "devices", "selective"],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        BlockGraphs(make())


def spread(model):
    model.get_base_model().model.layers[1].to("meta")
    return model


def selective(model):
    how = {"use_reentrant": False, "context_fn": lambda: None}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    return model.train()

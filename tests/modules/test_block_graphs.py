"""Which blocks are replayed as graphs, and when: with a recorder for CPUs."""

import copy
import pickle
import re

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_lrqat.modules import block_graphs
from peft_lrqat.modules.block_graphs import LIMIT, BlockGraphs
from tests.graphs import RunsAgain, attached, checkpointed, equal, lora, step
from tests.models import tiny, tokens


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(block_graphs, "recorder_for", lambda device: RunsAgain())


@pytest.fixture
def warnings(monkeypatch):
    found: list[str] = []
    monkeypatch.setattr(block_graphs.logger, "warning", found.append)
    return found


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

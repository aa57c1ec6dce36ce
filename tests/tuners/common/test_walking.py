"""Walks through an adapted model find what torch's find, in the same order."""

from __future__ import annotations

from types import ModuleType

import pytest
from torch import nn
from transformers import PreTrainedModel

from peft_lrqat.tuners.common.frozen import FrozenWeight
from peft_lrqat.tuners.common.walking import QuickWalks
from tests.models import tiny


class Tree(QuickWalks):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
        self.shared = self.first[1]
        self.nothing = None
        self.last = Own()


class Own(nn.Module):
    """Names its modules otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def named_modules(self, memo=None, prefix="", remove_duplicate=True):
        yield f"{prefix}.own", self.inner


def torchs(module: nn.Module, *args, **kwargs) -> list[tuple[str, nn.Module]]:
    return list(nn.Module.named_modules(module, *args, **kwargs))


@pytest.mark.parametrize("remove_duplicate", [True, False])
@pytest.mark.parametrize("prefix", ["", "outer"])
def test_names_and_order_are_torchs(prefix: str, remove_duplicate: bool):
    tree = Tree()
    options = {"prefix": prefix, "remove_duplicate": remove_duplicate}
    found = list(tree.named_modules(**options))
    assert found == torchs(tree, **options)
    assert any(name.endswith("last.own") for name, _ in found)
    memos = [{tree.first[0]}, {tree.first[0]}]
    assert list(tree.named_modules(memos[0], **options)) == torchs(tree, memos[1], **options)
    assert memos[0] == memos[1]
    assert not list(tree.named_modules({tree}))


def test_a_circle_ends():
    tree = Tree()
    tree.first[1].append(tree.first)
    assert list(tree.named_modules()) == torchs(tree)
    assert tree.num_parameters() == 3 * 6


def test_what_is_replaced_on_the_way_is_found_as_torch_finds_it():
    trees = [Tree(), Tree()]
    for walk, tree in zip((QuickWalks.named_modules, nn.Module.named_modules), trees, strict=True):
        names = []
        for name, module in walk(tree):
            names.append((name, type(module)))
            if name == "first.0":
                tree.first[0], tree.first[1] = nn.Sequential(nn.Tanh()), nn.Tanh()
        tree.found = names
    assert trees[0].found == trees[1].found
    assert ("first.1", nn.Tanh) in trees[0].found


def test_an_adapted_model_is_walked_through_alike(method: ModuleType, base: PreTrainedModel):
    model = method.random_adapter(base)
    assert list(model.base_model.named_modules()) == torchs(model.base_model)
    assert [name for name, _ in model.named_modules()][1:] == [
        f"base_model{'.' if name else ''}{name}" for name, _ in torchs(model.base_model)
    ]


@pytest.mark.parametrize("tie", [True, False])
def test_weights_are_counted_however_they_are_stored(method: ModuleType, tie: bool):
    floats = tiny("llama", tie=tie)
    expected = {e: floats.num_parameters(exclude_embeddings=e) for e in (True, False)}
    model = method.random_adapter(floats, bits=2)
    beside = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad)
    for module in model.modules():
        if isinstance(module, FrozenWeight):
            beside += sum(p.numel() for name, p in module.named_parameters() if name not in ("base", "bias"))
    assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for exclude, count in expected.items():
        assert model.num_parameters(exclude_embeddings=exclude) == count + beside


def test_a_model_that_is_not_transformers_is_counted_too():
    tree = Tree()
    assert tree.num_parameters() == 3 * 6
    tree.first.requires_grad_(False)
    assert tree.num_parameters(only_trainable=True) == 6
    table = nn.Embedding(3, 2)
    tree.table, tree.output = table, nn.Linear(2, 3, bias=False)
    tree.output.weight = table.weight
    assert tree.num_parameters(exclude_embeddings=True) == 3 * 6
    assert tree.num_parameters() == 4 * 6

"""Inputs of a wrong width or dtype: an error as torch's own layers raise it, from layers of every kind."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_lrqat import LowBitSRConfig, LRQATConfig
from peft_lrqat.ops.dispatch import use_kernels

WIDTH, ROWS = 32, 8


def adapter(config: LRQATConfig | LowBitSRConfig, layer: nn.Module | None = None) -> nn.Module:
    """A model of one adapted layer."""
    layer = nn.Linear(WIDTH, ROWS, bias=getattr(config, "export_format", None) != "bitnet") if layer is None else layer
    return get_peft_model(nn.ModuleDict({"a": layer}), config)


def lrqat(**options) -> LRQATConfig:
    return LRQATConfig(**{"r": 2, "group_size": -1, "range_method": "minmax", "target_modules": ["a"], **options})


def lowbit(**options) -> LowBitSRConfig:
    return LowBitSRConfig(**{"range_method": "minmax", "target_modules": ["a"], **options})


ADAPTED: dict[str, Callable[[], nn.Module]] = {
    "lrqat": lambda: adapter(lrqat()),
    "lrqat, groups": lambda: adapter(lrqat(group_size=8, downcast="int")),
    "lrqat, int8": lambda: adapter(lrqat(act_bits=8)),
    "lowbit": lambda: adapter(lowbit()),
    "lowbit, 4 bits": lambda: adapter(lowbit(bits=4, group_size=8)),
    "lowbit, int8": lambda: adapter(lowbit(act_bits=8)),
    "lowbit, bitnet": lambda: adapter(lowbit(bits=1.58, group_size=0, act_bits=8)),
    "lowbit, no base": lambda: adapter(lowbit(keep_base=False)),
}


@functools.cache
def layers() -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, make in ADAPTED.items():
        found[name] = make().base_model.model["a"]
        found[f"{name}, merged"] = make().merge_and_unload()["a"]
    found["base"] = ADAPTED["lrqat"]().base_model.model["a"].base_layer
    for config in (lrqat(), lowbit()):
        found[f"{config.method}, Conv1D"] = adapter(config, Conv1D(ROWS, WIDTH)).base_model.model["a"]
    return found


@pytest.fixture(scope="module", params=list(layers()))
def layer(request: pytest.FixtureRequest) -> nn.Module:
    return layers()[request.param]


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(
    "x",
    [torch.ones(2, WIDTH - 1), torch.ones(2, 3, WIDTH // 2), torch.ones(WIDTH + 8), torch.ones(())],
    ids=lambda x: str(tuple(x.shape)),
)
def test_another_width(layer: nn.Module, x: torch.Tensor, kernels: bool):
    with pytest.raises(RuntimeError):
        nn.Linear(WIDTH, ROWS)(x)
    with use_kernels(kernels), pytest.raises(RuntimeError, match=rf"in_features={WIDTH}.*must be {WIDTH}"):
        layer(x)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_another_dtype(layer: nn.Module, dtype: torch.dtype):
    x = torch.ones(2, WIDTH).to(dtype)
    with pytest.raises(RuntimeError):
        nn.Linear(WIDTH, ROWS)(x)
    for autocast in (False, True):
        with torch.autocast("cpu", enabled=autocast), pytest.raises(RuntimeError, match="must be of a float dtype"):
            layer(x)


def test_what_fits_is_computed_in_its_own_dtype(layer: nn.Module):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(2, 3, WIDTH).to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert y.shape == (2, 3, ROWS)
        assert y.isfinite().all()


@pytest.mark.parametrize("name", ["lrqat", "lowbit"])
def test_compiled_and_without_the_adapter(name: str):
    model = ADAPTED[name]()
    layer: nn.Module = model.base_model.model["a"]
    compiled = torch.compile(copy.deepcopy(layer), backend="eager", dynamic=True)
    assert compiled(torch.ones(2, WIDTH)).shape == (2, ROWS)
    for call in (compiled, lambda x: layer(x, adapter_names=["default", "__base__"])):
        with pytest.raises(RuntimeError, match=f"must be {WIDTH}"):
            call(torch.ones(2, WIDTH // 2))
        with pytest.raises(RuntimeError, match="must be of a float dtype"):
            call(torch.ones(2, WIDTH, dtype=torch.int64))
    with model.disable_adapter(), pytest.raises(RuntimeError, match=f"must be {WIDTH}"):
        layer(torch.ones(2, WIDTH // 2))


@pytest.mark.parametrize("ids", [torch.ones(2), torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.int16)])
def test_embeddings_take_indices(ids: torch.Tensor):
    table = nn.Embedding(12, 8)
    with pytest.raises(RuntimeError):
        table(ids)
    model = adapter(lrqat(), table)
    for layer in (model.base_model.model["a"], model.merge_and_unload()["a"]):
        with pytest.raises(RuntimeError, match=r"dtype|scalar type"):
            layer(ids)
        assert torch.equal(layer(torch.tensor([3, 11], dtype=torch.int32)), layer(torch.tensor([3, 11])))


def test_embeddings_take_no_other_rows():
    model = adapter(lrqat(), nn.Embedding(12, 8))
    for layer in (model.base_model.model["a"], model.merge_and_unload()["a"]):
        for wrong in (12, -1):
            with pytest.raises(IndexError):
                layer(torch.tensor([0, wrong]))

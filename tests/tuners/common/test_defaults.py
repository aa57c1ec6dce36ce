"""torch's defaults of dtype and device are for what users make: adapters and optimizers do not depend on them."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from peft_lrqat import LowBitAdamW
from tests import low_bit_weights
from tests.models import tiny


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("options", [{}, {"learn_scales": True}], ids=str)
def test_conversion_and_training_are_the_same(method: ModuleType, default_dtype: torch.dtype, options: dict):
    found: list[list[torch.Tensor]] = []
    start: dict[str, torch.Tensor] = {}
    for dtype in (torch.float32, default_dtype):
        model = tiny(num_hidden_layers=1)
        torch.set_default_dtype(dtype)
        model = method.adapt(model, **{**method.GRID, **options}).train()
        ours = {name: value.clone() for name, value in model.state_dict().items()}
        start = start or ours
        # PEFT draws LoRA's first factor in the default dtype
        assert all(torch.equal(value, start[name]) for name, value in ours.items() if "lora_A" not in name)
        model.load_state_dict(start)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = LowBitAdamW(trained, lr=1.3e-2)
        for _ in range(3):
            model(input_ids=method.IDS, labels=method.IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        state = [v for p in trained for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
        found.append([*model.state_dict().values(), *state])
    for expected, one in zip(*found, strict=True):
        assert one.dtype == expected.dtype
        assert torch.equal(one, expected)


def test_an_optimizer_counts_steps_where_nobody_waits_for_them():
    """`torch.set_default_device("cuda")` is for the tensors of a model."""
    p = torch.nn.Parameter(low_bit_weights.weight(4, -1, (5, 8)).cpu())
    p.grad = torch.randn(5, 8)
    optimizer = LowBitAdamW([p])
    with torch.device("meta"):
        optimizer.step()
    assert optimizer.state[p]["step"].device.type == "cpu"

"""`LowBitAdamW(fused_backward=True)`: the ordinary step, in backward, by the optimizer of this training."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_process_group

from peft_lrqat import LowBitAdamW
from tests.lowbit_sr import IDS, codes, config, run, trainable, weights
from tests.models import low_bit, tiny


@pytest.mark.parametrize("state", ["8bit", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("learn_scales", [True, False])
def test_fused_backward_is_the_ordinary_step(accumulate: int, learn_scales: bool, dtype: torch.dtype, state: str):
    """Of a bf16 model, the ordinary step is given fp32 gradients, and the other one what the products made."""
    model = low_bit(tiny(dtype=dtype), bits=4, learn_scales=learn_scales, error_feedback=True)
    twin = copy.deepcopy(model)
    options = {"lr": 1e-2, "weight_decay": 0.1, "state": state}
    fused = LowBitAdamW(trainable(model), fused_backward=True, gradient_accumulation_steps=accumulate, **options)
    ordinary = LowBitAdamW(trainable(twin), **options)
    run(model, fused, accumulate=accumulate)
    run(twin, ordinary, accumulate=accumulate)
    assert all(torch.equal(a, b) for a, b in zip(codes(model), codes(twin), strict=True))
    for p, q in zip(weights(model).values(), weights(twin).values(), strict=True):
        tensors = {name: value for name, value in ordinary.state[q].items() if isinstance(value, torch.Tensor)}
        assert all(torch.equal(fused.state[p][name], value) for name, value in tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_that_are_trained_in_turns_are_all_in_one_optimizer(dtype: torch.dtype):
    """torch registers no hook on a parameter that is not trained, as that of an adapter that waits for its turn."""
    model = low_bit(tiny(dtype=dtype), bits=4)
    model.add_adapter("second", config(group_size=-1))
    twin = copy.deepcopy(model)
    fused = LowBitAdamW(weights(model).values(), lr=1e-2, fused_backward=True)
    ordinary = LowBitAdamW(weights(twin).values(), lr=1e-2)
    before = codes(model)
    for name in ("default", "second", "default", "second"):
        for one, optimizer in ((model, fused), (twin, ordinary)):
            one.set_adapter(name)
            run(one, optimizer, steps=1)
    assert all(torch.equal(a, b) for a, b in zip(codes(model), codes(twin), strict=True))
    assert len(before) == 28
    assert not any(torch.equal(a, b) for a, b in zip(codes(model), before, strict=True))


def test_fused_backward_keeps_no_gradient():
    model = low_bit(tiny()).train()
    optimizer = LowBitAdamW(trainable(model), fused_backward=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    held = [p.grad for p in weights(model).values()]
    assert all(grad.untyped_storage().nbytes() == 0 or grad.data_ptr() == 0 for grad in held)
    optimizer.step()
    assert all(p.grad is None for p in weights(model).values())


def test_between_backward_passes_gradients_are_fp32_and_anybodys():
    """Those of a bf16 model, of which more are to come; or whose optimizer is gone."""
    model = low_bit(tiny(dtype=torch.bfloat16)).train()
    twin = copy.deepcopy(model)
    optimizer = LowBitAdamW(trainable(model), fused_backward=True, gradient_accumulation_steps=2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    twin(input_ids=IDS, labels=IDS).loss.backward()
    for p, q in zip(weights(model).values(), weights(twin).values(), strict=True):
        assert type(p.grad) is torch.Tensor
        assert torch.equal(p.grad, q.grad)
    model.zero_grad()
    del optimizer
    gc.collect()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(type(p.grad) is torch.Tensor for p in weights(model).values())


def test_hooks_of_gradients_see_fp32_and_what_they_change_counts():
    """As gradient scaling or noise of one's own does it; the optimizer takes what they leave."""
    found = []
    for fused in (True, False):
        model = low_bit(tiny(dtype=torch.bfloat16)).train()
        seen = []

        def scale(p, seen=seen):
            seen.append(p.grad.clone())
            p.grad.detach().mul_(1 / 3)

        for p in weights(model).values():
            p.register_post_accumulate_grad_hook(scale)
        optimizer = LowBitAdamW(trainable(model), lr=1e-2, fused_backward=fused)
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        assert all(type(grad) is torch.Tensor and grad.dtype == torch.float32 for grad in seen)
        found.append([*seen, *codes(model)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_fused_backward_lets_go_of_model_and_optimizer():
    model = low_bit(tiny()).train()
    optimizer = LowBitAdamW(trainable(model), fused_backward=True)
    run(model, optimizer, 2)
    left = [weakref.ref(optimizer), *(weakref.ref(p) for p in trainable(model))]
    del model, optimizer
    gc.collect()
    assert not any(ref() is not None for ref in left)


def test_fused_backward_belongs_to_the_optimizer_that_lives():
    model = low_bit(tiny()).train()
    run(model, LowBitAdamW(trainable(model), lr=0.0, fused_backward=True), 1)
    gc.collect()
    before = codes(model)
    optimizer = LowBitAdamW(trainable(model), lr=0.0, fused_backward=True)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    optimizer.load_state_dict(optimizer.state_dict())  # replaces the groups
    run(model, optimizer, 1)
    assert not any(torch.equal(a, b) for a, b in zip(codes(model), before, strict=True))


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_of_an_earlier_training_takes_no_gradients(fused: bool):
    model = low_bit(tiny()).train()
    earlier = LowBitAdamW(trainable(model), lr=1e-2, fused_backward=True)
    run(model, earlier, 1)
    earlier.param_groups[0]["lr"] = 0.0  # as a schedule ends
    before = codes(model)
    optimizer = LowBitAdamW(trainable(model), lr=1e-2, fused_backward=fused)
    earlier.step()
    run(model, optimizer, 1)
    assert len(optimizer.state) == len(trainable(model))
    assert not any(torch.equal(a, b) for a, b in zip(codes(model), before, strict=True))


def test_another_optimizer_is_told_who_takes_its_gradients():
    model = low_bit(tiny()).train()
    earlier = LowBitAdamW(trainable(model), fused_backward=True)
    with pytest.raises(RuntimeError, match="LowBitAdamW of an earlier one is still there"):
        run(model, torch.optim.AdamW(trainable(model)), 1)
    del earlier
    model.zero_grad()
    before = codes(model)
    run(model, torch.optim.AdamW(trainable(model), lr=1e-2), 1)
    assert not any(torch.equal(a, b) for a, b in zip(codes(model), before, strict=True))


def test_fused_backward_finishes_a_short_accumulation():
    model = low_bit(tiny()).train()
    before = codes(model)
    optimizer = LowBitAdamW(trainable(model), lr=1e-2, fused_backward=True, gradient_accumulation_steps=4)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()  # the end of an epoch
    optimizer.zero_grad()
    assert not any(torch.equal(a, b) for a, b in zip(codes(model), before, strict=True))
    assert not optimizer._arrived


def test_a_batch_that_is_dropped_does_not_count_for_accumulation():
    """As loops do whose loss is not finite."""
    model = low_bit(tiny()).train()
    twin = copy.deepcopy(model)
    optimizer = LowBitAdamW(trainable(model), lr=1e-2, fused_backward=True, gradient_accumulation_steps=2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.zero_grad()
    run(model, optimizer, 2, accumulate=2)
    run(twin, LowBitAdamW(trainable(twin), lr=1e-2), 2, accumulate=2)
    assert all(torch.equal(a, b) for a, b in zip(codes(model), codes(twin), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_used_twice_is_updated_once_with_the_sum(dtype: torch.dtype):
    block = nn.Linear(16, 16, bias=False, dtype=dtype)
    model = low_bit(nn.ModuleDict({"block": block}), target_modules=["block"], task_type=None)
    layer = model.base_model.model["block"]
    twin = copy.deepcopy(layer)
    x = torch.randn(5, 16, dtype=dtype)
    fused = LowBitAdamW([layer.lowbitsr_weight["default"].weight], lr=1e-1, fused_backward=True)
    layer(layer(x)).square().sum().backward()
    fused.step()
    ordinary = LowBitAdamW([twin.lowbitsr_weight["default"].weight], lr=1e-1)
    twin(twin(x)).square().sum().backward()
    ordinary.step()
    assert torch.equal(layer.lowbitsr_weight["default"].weight.codes(), twin.lowbitsr_weight["default"].weight.codes())
    assert int(layer.lowbitsr_weight["default"].weight.stream[1]) == 1


def test_a_model_is_copied_between_backward_and_step():
    """As averages of weights, and callbacks, do it."""
    model = low_bit(tiny()).train()
    optimizer = LowBitAdamW(trainable(model), lr=1e-2, fused_backward=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    twin = copy.deepcopy(model)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(codes(twin), codes(model), strict=True))
    twin.zero_grad()
    run(twin, LowBitAdamW(trainable(twin), lr=1e-2), 1)
    assert not any(torch.equal(a, b) for a, b in zip(codes(twin), codes(model), strict=True))


@pytest.mark.parametrize(
    "norm",
    [
        lambda grad: grad.norm(),
        lambda grad: grad.detach().norm(2),
        torch.norm,
        lambda grad: torch.linalg.vector_norm(grad, 2, (0, 1)),
        lambda grad: torch.linalg.vector_norm(grad, 2, (-1, 0), dtype=torch.float64),
    ],
)
def test_the_norm_of_a_gradient_that_is_gone_is_known(norm: Callable[[torch.Tensor], torch.Tensor]):
    model = low_bit(tiny(num_hidden_layers=1)).train()
    twin = copy.deepcopy(model)
    optimizer = LowBitAdamW(trainable(model), fused_backward=True)
    for one in (model, twin):
        one(input_ids=IDS, labels=IDS).loss.backward()
    assert optimizer.fused_backward
    for p, q in zip(weights(model).values(), weights(twin).values(), strict=True):
        torch.testing.assert_close(norm(p.grad), norm(q.grad))
    with pytest.raises(RuntimeError, match=r"`linalg_vector_norm` asks for it"):
        next(iter(weights(model).values())).grad.norm(dim=0)


def test_data_parallelism_of_one_process_is_told_what_to_do():
    """torchrun's, which copies every gradient."""
    model = low_bit(tiny(num_hidden_layers=1)).train()
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = LowBitAdamW(trainable(model), fused_backward=True)
        with pytest.raises(RuntimeError, match=r"`fused_backward=False`, which DistributedDataParallel needs"):
            wrapped(input_ids=IDS, labels=IDS).loss.backward()
        assert optimizer.fused_backward
    finally:
        destroy_process_group()


def test_what_needs_all_gradients_at_once_is_refused():
    model = low_bit(tiny()).train()
    optimizer = LowBitAdamW(trainable(model), fused_backward=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    twin = low_bit(tiny()).train()
    twin(input_ids=IDS, labels=IDS).loss.backward()
    expected = nn.utils.get_total_norm([p.grad for p in trainable(twin)])
    # the norm is known, so Trainer can log it; clipping that changes nothing is none
    torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), float("inf")), expected)
    torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), 1e4), expected)
    with pytest.raises(RuntimeError, match=r"used and freed when it arrived.*max_grad_norm=0"):
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(RuntimeError, match=r"used and freed.*`linalg_vector_norm` asks for it"):
        nn.utils.clip_grad_norm_(model.parameters(), 1e4, norm_type=1)
    with pytest.raises(RuntimeError, match=r"second backward.*`gradient_accumulation_steps`"):
        model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()


def test_fused_backward_is_refused_under_data_parallelism(monkeypatch: pytest.MonkeyPatch):
    model = low_bit(tiny(num_hidden_layers=1))
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(ValueError, match=r"`fused_backward=True` updates a weight before.*averaged"):
            LowBitAdamW(trainable(model), fused_backward=True)
    finally:
        destroy_process_group()

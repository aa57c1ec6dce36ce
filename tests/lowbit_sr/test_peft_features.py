"""What PEFT users do: choosing modules, several adapters, merging, mixed batches, wrapping and copying."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from peft import (
    PeftMixedModel,
    PeftModel,
    get_base_model_state_dict,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_lrqat import LowBitAdamW, LowBitSRConfig
from peft_lrqat.checkpoint.linear import QuantizedLinear
from peft_lrqat.lowbit_sr import LowBitSRLinear
from tests.models import adapted, logits, low_bit, tiny, tokens, train

IDS = tokens(batch=4)
GRID = {"bits": 4, "group_size": 8, "range_method": "minmax"}
ATTENTION = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def grid_model() -> PreTrainedModel:
    """A model whose linear weights lie on the grid, so that "base" and "adapted at step 0" are the same model."""
    return low_bit(tiny(), **GRID).unload()


@pytest.fixture
def base(grid_model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(grid_model)


def random_adapter(model: PreTrainedModel, **config) -> PeftModel:
    return low_bit(model, **{**GRID, "init_weights": False, **config}).eval()


def layers(model: nn.Module) -> dict[str, LowBitSRLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowBitSRLinear)}


def other(**options) -> LowBitSRConfig:
    return LowBitSRConfig(**{**GRID, "init_weights": False, "target_modules": ATTENTION, **options})


# -- which modules


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, 12),
        ({"target_modules": r".*layers\.1\.self_attn\.(q|k)_proj"}, 2),
        ({"target_modules": ATTENTION, "layers_to_transform": [1]}, 2),
        ({"target_modules": ATTENTION, "layers_to_transform": 0, "layers_pattern": "layers"}, 2),
        ({"target_modules": None}, 4),
        ({"target_modules": ["lm_head"]}, 1),
    ],
)
def test_modules_are_chosen_as_in_lora(options: dict, expected: int):
    assert len(layers(low_bit(tiny(), **GRID, **options))) == expected


@pytest.mark.parametrize("bias", ["none", "lowbitsr_only", "all"])
def test_bias_options(bias: str):
    model = low_bit(tiny("qwen2"), **GRID, target_modules=["q_proj"], bias=bias)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}
    train(model, IDS, steps=1)
    changed = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    expected = {"none": (), "lowbitsr_only": ("q_proj",), "all": ("q_proj", "k_proj", "v_proj")}[bias]
    assert changed == {name for name in before if any(part in name for part in expected)}


def test_modules_to_save_and_trainable_tokens_train():
    model = low_bit(tiny(), **GRID, modules_to_save=["lm_head"], trainable_token_indices=[3, 5])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, torch.tensor([[3, 5, 7, 9]]), steps=3)
    for name, p in model.named_parameters():
        assert torch.equal(before[name], p) != p.requires_grad, name
    assert any("modules_to_save" in name for name in before)
    assert any("trainable_tokens_delta" in name for name in before)


def test_each_layer_has_a_random_stream_of_its_own():
    keys = [int(layer.lowbitsr_weight["default"].stream[0]) for layer in layers(low_bit(tiny(), **GRID)).values()]
    assert len(set(keys)) == len(keys) == 14
    again = [int(layer.lowbitsr_weight["default"].stream[0]) for layer in layers(low_bit(tiny(), **GRID)).values()]
    seeded = [int(la.lowbitsr_weight["default"].stream[0]) for la in layers(low_bit(tiny(), **GRID, seed=1)).values()]
    assert again == keys
    assert not set(seeded) & set(keys)


# -- the base under the adapters


def test_a_model_on_the_grid_is_not_changed_by_adapting_it(base: PreTrainedModel):
    before, state = logits(base, IDS), copy.deepcopy(base.state_dict())
    assert torch.equal(logits(low_bit(copy.deepcopy(base), **GRID), IDS), before)
    model = random_adapter(base)
    assert not torch.equal(logits(model, IDS), before)
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), before)
    found = get_base_model_state_dict(model)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    plain = model.unload()
    assert {type(m) for m in plain.modules()} == {type(m) for m in tiny().modules()}
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_new_base_weights_are_converted_when_they_are_set(base: PreTrainedModel):
    second = low_bit(tiny(seed=1), **GRID).unload()
    model = random_adapter(base)
    assert not set_base_model_state_dict(model, second.state_dict(), strict=True).missing_keys
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), logits(second, IDS))


def test_delta_weights_are_how_far_training_went(base: PreTrainedModel):
    model = random_adapter(base)
    for layer in layers(model).values():
        moved = layer.lowbitsr_weight["default"].to_float() - layer.get_base_layer().weight
        assert moved.abs().max() > 0
        assert torch.equal(layer.get_delta_weight("default"), moved)


# -- several adapters


def test_adapters_lie_side_by_side(base: PreTrainedModel):
    model = random_adapter(base)
    one = logits(model, IDS)
    model.add_adapter("second", other())
    assert torch.equal(logits(model, IDS), one)
    model.set_adapter("second")
    two = logits(model, IDS)
    assert not torch.equal(two, one)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if n.endswith("lowbitsr_weight.second")
    }
    train(model, IDS, steps=2)
    model.set_adapter("default")
    assert torch.equal(logits(model, IDS), one)
    model.delete_adapter("second")
    assert "second" not in "".join(model.state_dict())
    model.add_adapter("second", other())
    assert torch.equal(logits(model, IDS), one)


def test_two_adapters_of_a_layer_cannot_be_active_together(base: PreTrainedModel):
    model = random_adapter(base)
    model.add_adapter("second", other())
    before = logits(model, IDS)
    with pytest.raises(ValueError, match=r"\['default', 'second'\] are sets of integers for the same layer"):
        model.base_model.set_adapter(["default", "second"])
    assert model.active_adapters == ["default"]
    with pytest.raises(ValueError, match="the sum of two is on no grid"):
        model.merge_adapter(["default", "second"])
    with pytest.raises(ValueError, match="weighted sum is on no grid"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mix")
    assert torch.equal(logits(model, IDS), before)


def test_adapters_of_different_layers_can_be_active_together(base: PreTrainedModel):
    model = random_adapter(base, target_modules=["q_proj"])
    model.add_adapter("mlp", other(target_modules=["up_proj"]))
    model.base_model.set_adapter(["default", "mlp"])
    together = logits(model, IDS)
    assert torch.equal(logits(model.merge_and_unload(), IDS), together)


# -- merging


def test_merging_and_unmerging_change_nothing(base: PreTrainedModel):
    model = random_adapter(base, bits=3)
    trained, state = logits(model, IDS), copy.deepcopy(model.state_dict())
    model.merge_adapter()
    assert all(isinstance(layer.base_layer, QuantizedLinear) for layer in layers(model).values())
    assert torch.equal(logits(model, IDS), trained)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    assert torch.equal(logits(model, IDS), trained)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_disabling_a_merged_adapter_gives_the_base(base: PreTrainedModel):
    before = logits(base, IDS)
    model = random_adapter(base)
    trained = logits(model, IDS)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), before)
    assert torch.equal(logits(model, IDS), trained)


def test_layers_that_the_merged_adapter_does_not_have_are_quantized_too(base: PreTrainedModel):
    model = random_adapter(base)
    model.add_adapter("second", other())
    model.set_adapter("second")
    expected = logits(model, IDS)
    merged = model.merge_and_unload()
    assert sum(isinstance(m, QuantizedLinear) for m in merged.modules()) == 14
    assert torch.equal(logits(merged, IDS), expected)


def test_safe_merge_refuses_what_is_not_finite(base: PreTrainedModel):
    model = random_adapter(base)
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    next(iter(layers(model).values())).lowbitsr_weight["default"].scale[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)


def test_conv1d_layers_train_and_merge_densely():
    model = random_adapter(tiny("gpt2"), target_modules=["c_attn", "c_fc"])
    before = logits(model, IDS)
    losses = train(model, IDS, steps=20, lr=1e-2)
    assert losses[-1] < losses[0] - 0.1
    trained = logits(model, IDS)
    assert not torch.equal(trained, before)
    with pytest.warns(UserWarning, match="cannot pack Conv1D"):
        merged = model.merge_and_unload()
    assert isinstance(merged.transformer.h[0].attn.c_attn, Conv1D)
    torch.testing.assert_close(logits(merged, IDS), trained, rtol=1e-5, atol=1e-5)


# -- a base that was dropped


def test_without_a_base_one_adapter_trains_merges_and_says_what_is_gone(base: PreTrainedModel, tmp_path):
    twin = random_adapter(copy.deepcopy(base), init_weights=True)
    model = random_adapter(base, init_weights=True, keep_base=False)
    assert train(model, IDS) == train(twin, IDS)
    trained = logits(model, IDS)
    gone = r"`keep_base=False` dropped the base codes"
    with model.disable_adapter(), pytest.raises(ValueError, match=gone):
        logits(model, IDS)
    with pytest.raises(ValueError, match=gone):
        model.unload()
    with pytest.raises(ValueError, match=r"`keep_base=False` dropped the base codes.*'second'"):
        model.add_adapter("second", other(keep_base=False))
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match=r"`keep_base=False` dropped"):
        next(iter(layers(model).values())).get_delta_weight("default")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(low_bit(tiny(), **GRID).unload(), tmp_path)
    assert torch.equal(logits(again.eval(), IDS), trained)
    assert torch.equal(logits(model.merge_and_unload(), IDS), trained)


# -- mixed batches


@pytest.fixture
def two_adapters(base: PreTrainedModel) -> PeftModel:
    model = random_adapter(base)
    model.add_adapter("other", other())
    return model.eval()


def test_mixed_batches_use_each_samples_adapter(two_adapters: PeftModel):
    names = ["__base__", "default", "other", "default"]
    with torch.no_grad():
        mixed = two_adapters(IDS, adapter_names=names).logits
    with two_adapters.disable_adapter():
        expected = {"__base__": logits(two_adapters, IDS)}
    for name in ("default", "other"):
        two_adapters.set_adapter(name)
        expected[name] = logits(two_adapters, IDS)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], expected[name][row], rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False}
    assert two_adapters.generate(input_ids=IDS, adapter_names=names, **options).shape == (4, IDS.shape[1] + 4)


def test_mixed_batches_are_refused_where_lora_refuses_them(two_adapters: PeftModel):
    with pytest.raises(ValueError, match="same as the number of inputs"):
        two_adapters(IDS, adapter_names=["default"])
    with pytest.raises(ValueError, match="non-existing adapter"):
        two_adapters(IDS, adapter_names=["unknown"] * 4)
    with pytest.raises(ValueError, match="training mode"):
        two_adapters.train()(IDS, adapter_names=["default"] * 4)


# -- the rest of PEFT's surface


def test_status_functions_know_the_method(two_adapters: PeftModel):
    status = get_model_status(two_adapters)
    assert (status.peft_types, status.active_adapters) == ({"default": "LOWBITSR", "other": "LOWBITSR"}, ["default"])
    assert status.num_adapter_layers == 14
    assert status.trainable_params == sum(p.numel() for p in two_adapters.parameters() if p.requires_grad)
    assert {s.module_type for s in get_layer_status(two_adapters)} == {"lowbitsr.LowBitSRLinear"}


def test_what_peft_closes_to_new_methods_is_refused_by_it(base: PreTrainedModel):
    with pytest.raises(ValueError, match="LOWBITSR"):
        get_peft_model(base, other(), mixed=True)
    with pytest.raises(ValueError, match="LOWBITSR"):
        PeftMixedModel(base, other())


def test_adapters_are_injected_into_plain_modules(base: PreTrainedModel):
    wrapped = random_adapter(copy.deepcopy(base), target_modules=ATTENTION)
    plain = inject_adapter_in_model(other(), base).eval()
    assert type(plain) is type(tiny())
    values = {key.removeprefix("base_model.model."): v for key, v in get_peft_model_state_dict(wrapped).items()}
    assert get_peft_model_state_dict(plain).keys() == values.keys()
    assert {key.rpartition(".")[2] for key in values} == {"lowbitsr_codes", "lowbitsr_scale", "lowbitsr_stream"}


def test_transformers_own_adapter_methods(base: PreTrainedModel):
    before = logits(base, IDS)
    base.add_adapter(other(), "mine")
    changed = logits(base.eval(), IDS)
    assert not torch.equal(changed, before)
    base.disable_adapters()
    assert torch.equal(logits(base, IDS), before)
    base.enable_adapters()
    assert torch.equal(logits(base, IDS), changed)


# -- numerics of wrapping


def test_casting_the_model_changes_no_code(base: PreTrainedModel):
    model = random_adapter(base)
    before = {name: layer.lowbitsr_weight["default"].codes() for name, layer in layers(model).items()}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.bfloat16):
        model.to(dtype)
        assert logits(model, IDS).dtype == dtype
    for name, layer in layers(model).items():
        assert torch.equal(layer.lowbitsr_weight["default"].codes(), before[name])
        assert layer.lowbitsr_weight["default"].scale.dtype == torch.float32
    trained = logits(model, IDS)
    for plain in (copy.deepcopy(model).unload(), model.merge_and_unload()):
        assert {value.dtype for value in plain.state_dict().values() if value.is_floating_point()} == {torch.bfloat16}
    assert torch.equal(logits(plain, IDS), trained)
    narrow = random_adapter(tiny(), scale_dtype="fp32").to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"cannot hold the scales.*`scale_dtype='fp32'`"):
        narrow.merge_and_unload()


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_a_bf16_model_trains_with_fp32_gradients(autocast_adapter_dtype: bool):
    model = get_peft_model(
        tiny(dtype=torch.bfloat16), other(init_weights=True), autocast_adapter_dtype=autocast_adapter_dtype
    )
    before = [layer.lowbitsr_weight["default"].codes() for layer in layers(model).values()]
    losses = train(model, IDS, steps=10, lr=1e-2)
    assert losses[-1] < losses[0]
    after = [layer.lowbitsr_weight["default"].codes() for layer in layers(model).values()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_autocast_computes_in_bf16_and_gives_fp32_gradients(base: PreTrainedModel):
    layer = next(iter(layers(random_adapter(base)).values()))
    x = torch.randn(3, layer.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert layer.lowbitsr_weight["default"].grad.dtype == torch.float32
    expected = layer(x)
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


def test_fp16_autocast_is_refused_in_training_only(base: PreTrainedModel):
    model = random_adapter(base)
    with torch.autocast("cpu", torch.float16):
        with torch.no_grad():
            assert model(IDS).logits.isfinite().all()
        with pytest.raises(ValueError, match=r"cannot be trained under fp16 autocast.*bf16=True"):
            model(IDS)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_gradient_checkpointing_trains_the_same(base: PreTrainedModel, use_reentrant: bool, fused: bool):
    def run(checkpointing: bool) -> list[torch.Tensor]:
        model = random_adapter(copy.deepcopy(base), learn_scales=True, init_weights=True).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        optimizer = LowBitAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused_backward=fused)
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [layer.lowbitsr_weight["default"].codes() for layer in layers(model).values()]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


@pytest.mark.parametrize("options", [{}, {"learn_scales": True}, {"bits": 8, "forward_bits": 1.58}], ids=str)
def test_compiled_layers_have_no_graph_break(options: dict):
    layer = next(iter(layers(random_adapter(tiny(), **options)).values()))
    x = torch.randn(3, layer.in_features, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (layer, compiled):
        layer.zero_grad()
        x.grad = None
        y = run(x)
        y.square().sum().backward()
        gradients = [p.grad for p in layer.parameters() if p.grad is not None]
        results.append([y.detach(), x.grad, *gradients])
    assert len(results[0]) == 4 if options.get("learn_scales") else 3
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_a_compiled_model_sees_what_the_optimizer_does(base: PreTrainedModel):
    model = random_adapter(base).train()
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model.model.layers[0].mlp, backend="aot_eager")
    x = torch.randn(2, 3, 32)
    before = compiled(x)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    before.square().sum().backward()
    optimizer.step()
    after = compiled(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, model.base_model.model.model.layers[0].mlp(x))


def test_copies_and_pickles_compute_the_same(base: PreTrainedModel):
    model = random_adapter(base)
    expected = logits(model, IDS)
    assert torch.equal(logits(copy.deepcopy(model), IDS), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.load(buffer, weights_only=False), IDS), expected)


def test_the_two_methods_are_not_mixed_on_one_model():
    model = adapted(tiny())
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("integers", other())

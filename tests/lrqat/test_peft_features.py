"""What PEFT users do with LoRA: choosing modules, several adapters, merging, mixed batches, wrapping and copying."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
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
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedModel

from peft_lrqat import LRQATConfig
from peft_lrqat.checkpoint.linear import QuantizedLinear
from peft_lrqat.lrqat import LRQATLinear
from peft_lrqat.ops.reference import codes
from tests.models import adapted, logits, tiny, tokens, train

IDS = tokens(batch=4)
GRID = {"bits": 4, "group_size": 8}
ATTENTION = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def grid_model() -> PreTrainedModel:
    """A model whose linear weights lie on the grid, so that "base" and "adapted at step 0" are the same model."""
    return adapted(tiny(), **GRID).unload()


@pytest.fixture
def base(grid_model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(grid_model)


def random_adapter(model: PreTrainedModel, **config) -> PeftModel:
    return adapted(model, **{**GRID, "init_lora_weights": False, **config}).eval()


def layers(model: nn.Module) -> dict[str, LRQATLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LRQATLinear)}


def codes_of(layer: LRQATLinear, *adapters: str) -> torch.Tensor:
    _, A, B, c = layer._operands(list(adapters))
    return codes(layer.frozen.base, A, B, layer.frozen.fmt, c)


# -- which modules


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, 12),
        ({"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}, 8),
        ({"target_modules": r".*layers\.1\.self_attn\.(q|k)_proj"}, 2),
        ({"target_modules": ATTENTION, "layers_to_transform": [1]}, 2),
        ({"target_modules": ATTENTION, "layers_to_transform": 0, "layers_pattern": "layers"}, 2),
        ({"target_modules": None}, 4),
        ({"target_modules": ["lm_head"]}, 1),
    ],
)
def test_modules_are_chosen_as_in_lora(options: dict, expected: int):
    found = layers(adapted(tiny(), **GRID, **options))
    assert len(found) == expected
    assert any("lm_head" in name for name in found) == (options["target_modules"] == ["lm_head"])


def test_rank_and_alpha_patterns():
    model = adapted(
        tiny(), **GRID, r=4, lora_alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={r".*layers\.1\.mlp\..*": 1}
    )
    for name, layer in layers(model).items():
        assert layer.r["default"] == (2 if "q_proj" in name else 4)
        assert layer.lora_A["default"].weight.shape[0] == layer.r["default"]
        alpha = 1 if "layers.1.mlp" in name else 8
        assert layer.scaling["default"] == alpha / layer.r["default"]


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_bias_options(bias: str):
    model = adapted(tiny("qwen2"), **GRID, target_modules=["q_proj"], bias=bias)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}
    train(model, IDS, steps=1)
    changed = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    expected = {"none": (), "lora_only": ("q_proj",), "all": ("q_proj", "k_proj", "v_proj")}[bias]
    assert changed == {name for name in before if any(part in name for part in expected)}


def test_modules_to_save_and_trainable_tokens_train():
    model = adapted(tiny(), **GRID, modules_to_save=["lm_head"], trainable_token_indices=[3, 5])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.tensor([[3, 5, 7, 9]])
    train(model, ids, steps=3)
    after = dict(model.named_parameters())
    for name in before:
        assert torch.equal(before[name], after[name]) != after[name].requires_grad, name
    assert any("modules_to_save" in n for n in before if after[n].requires_grad)
    assert any("trainable_tokens_delta" in n for n in before if after[n].requires_grad)


def test_trainable_tokens_of_a_tied_model_act_on_both_ends():
    model = adapted(tiny(tie=True), **GRID, trainable_token_indices=[3, 5], ensure_weight_tying=True)
    train(model, torch.tensor([[3, 5, 7, 9]]))
    inner = model.base_model.model
    both = (inner.model.embed_tokens.token_adapter, inner.lm_head.token_adapter)
    assert torch.equal(both[0].get_merged_weights(["default"]), both[1].get_merged_weights(["default"]))
    assert torch.equal(logits(copy.deepcopy(model).merge_and_unload(), IDS), logits(model, IDS))


# -- the base under the adapters


def test_a_model_on_the_grid_is_not_changed_by_adapting_it(base: PreTrainedModel):
    before, state = logits(base, IDS), copy.deepcopy(base.state_dict())
    model = random_adapter(base)
    assert not torch.equal(logits(model, IDS), before)
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), before)
    found = get_base_model_state_dict(model)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    plain = model.unload()
    assert not layers(plain)
    assert {type(m) for m in plain.modules()} == {type(m) for m in tiny().modules()}
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_new_base_weights_are_converted_when_they_are_set(base: PreTrainedModel):
    other = adapted(tiny(seed=1), **GRID).unload()
    model = random_adapter(base)
    result = set_base_model_state_dict(model, other.state_dict(), strict=True)
    assert not result.missing_keys
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), logits(other, IDS))


# -- several adapters


def test_adapters_are_independent_and_add_up_inside_the_rounding(base: PreTrainedModel):
    model = random_adapter(base)
    one = logits(model, IDS)
    model.add_adapter("second", LRQATConfig(**GRID, r=2, target_modules=ATTENTION, init_lora_weights=False))
    assert torch.equal(logits(model, IDS), one)
    model.set_adapter("second")
    two = logits(model, IDS)
    assert not torch.equal(two, one)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        name for name, p in model.named_parameters() if "second" in name
    ]
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, IDS)
    layer = next(layer for name, layer in layers(model).items() if "q_proj" in name)
    summed = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    phi = layer.get_base_layer().weight / layer.frozen.scale0.repeat_interleave(8, dim=1)
    expected = (phi + summed).clamp(-8, 7)
    # fx8 keeps the middle of a cell of 1/16, so entries nearer than that to a tie may fall either way
    clear = ((expected - expected.floor()) - 0.5).abs() > 1 / 16
    found = codes_of(layer, "default", "second").float()
    assert torch.equal(found[clear], expected.round().clamp(-8, 7)[clear])

    model.delete_adapter("second")
    assert "second" not in "".join(model.state_dict())
    assert "second" not in model.peft_config
    model.set_adapter("default")
    assert torch.equal(logits(model, IDS), one)
    model.add_adapter("second", LRQATConfig(**GRID, r=2, target_modules=ATTENTION, init_lora_weights=False))
    assert not torch.equal(both, one)


COMBINATIONS = ["linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd"]
COMBINATIONS += ["dare_ties_svd", "magnitude_prune", "magnitude_prune_svd"]


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_weighted_adapters_combine_scale_shifts_linearly(base: PreTrainedModel, kind: str):
    model = random_adapter(base, target_modules=["q_proj"], r=3)
    model.add_adapter(
        "other", LRQATConfig(**GRID, r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=False)
    )
    with torch.no_grad():
        for layer in layers(model).values():
            layer.lora_scale_shift["default"].fill_(0.25)
            layer.lora_scale_shift["other"].fill_(-0.5)
    density = {} if kind in ("linear", "cat", "svd") else {"density": 0.7}
    model.add_weighted_adapter(["default", "other"], [2.0, 0.5], "mix", combination_type=kind, **density)
    for layer in layers(model).values():
        assert torch.equal(layer.lora_scale_shift["mix"], torch.full_like(layer.lora_scale_shift["mix"], 0.25))
        if kind in ("cat", "svd"):
            wanted = 2 * layer.get_delta_weight("default") + 0.5 * layer.get_delta_weight("other")
            rank = 6 if kind == "cat" else 3
            assert layer.r["mix"] == rank
            if kind == "cat":
                torch.testing.assert_close(layer.get_delta_weight("mix"), wanted, rtol=1e-4, atol=1e-4)
    model.set_adapter("mix")
    assert logits(model, IDS).isfinite().all()


def test_weighted_adapters_may_have_different_targets(base: PreTrainedModel):
    model = random_adapter(base, target_modules=["q_proj"])
    model.add_adapter("other", LRQATConfig(**GRID, r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "mix", combination_type="cat")
    for layer in layers(model).values():
        (own,) = {"default", "other"} & set(layer.lora_A)
        torch.testing.assert_close(layer.get_delta_weight("mix"), layer.get_delta_weight(own))


# -- merging


def test_merging_and_unmerging_change_nothing(base: PreTrainedModel):
    model = random_adapter(base, bits=3)
    trained = logits(model, IDS)
    state = copy.deepcopy(model.state_dict())
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


def test_merging_one_after_the_other_is_merging_together(base: PreTrainedModel):
    model = random_adapter(base)
    model.add_adapter("other", LRQATConfig(**GRID, r=2, target_modules="all-linear", init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    together = logits(model, IDS)
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert torch.equal(logits(model, IDS), together)
    model.unmerge_adapter()
    assert torch.equal(logits(model, IDS), together)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_scale_shift"])
def test_safe_merge_refuses_values_that_are_not_finite(base: PreTrainedModel, part: str):
    model = random_adapter(base)
    layer = next(iter(layers(model).values()))
    holder = getattr(layer, part)["default"]
    (holder if isinstance(holder, nn.Parameter) else holder.weight).data.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert not layer.merged
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)


# -- mixed batches


@pytest.fixture
def two_adapters(base: PreTrainedModel) -> PeftModel:
    model = random_adapter(base)
    model.add_adapter("other", LRQATConfig(**GRID, r=2, target_modules=ATTENTION, init_lora_weights=False))
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


def test_mixed_batches_generate_with_beams(two_adapters: PeftModel):
    names = ["other", "__base__", "default", "other"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3, "do_sample": False}
    mixed = two_adapters.generate(input_ids=IDS, adapter_names=names, **options)
    for row, name in enumerate(names):
        if name == "__base__":
            with two_adapters.disable_adapter():
                alone = two_adapters.generate(input_ids=IDS[row : row + 1], **options)
        else:
            two_adapters.set_adapter(name)
            alone = two_adapters.generate(input_ids=IDS[row : row + 1], **options)
        assert torch.equal(mixed[row], alone[0])


def test_mixed_batches_are_refused_where_lora_refuses_them(two_adapters: PeftModel):
    with pytest.raises(ValueError, match="same as the number of inputs"):
        two_adapters(IDS, adapter_names=["default"])
    with pytest.raises(ValueError, match="non-existing adapter"):
        two_adapters(IDS, adapter_names=["unknown"] * 4)
    with pytest.raises(ValueError, match="training mode"):
        two_adapters.train()(IDS, adapter_names=["default"] * 4)
    two_adapters.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        two_adapters(IDS, adapter_names=["default"] * 4)


# -- the rest of PEFT's surface


def test_status_functions_know_the_method(two_adapters: PeftModel):
    status = get_model_status(two_adapters)
    assert (status.peft_types, status.active_adapters) == ({"default": "LRQAT", "other": "LRQAT"}, ["default"])
    assert status.num_adapter_layers == 14
    assert status.trainable_params == sum(p.numel() for p in two_adapters.parameters() if p.requires_grad)
    assert {s.module_type for s in get_layer_status(two_adapters)} == {"lrqat.LRQATLinear"}


def test_what_peft_closes_to_new_methods_is_refused_by_it(base: PreTrainedModel, tmp_path):
    with pytest.raises(ValueError, match="LRQAT"):
        get_peft_model(base, LRQATConfig(**GRID, target_modules=ATTENTION), mixed=True)
    with pytest.raises(ValueError, match="LRQAT"):
        PeftMixedModel(base, LRQATConfig(**GRID, target_modules=ATTENTION))
    model = random_adapter(base)
    model.save_pretrained(tmp_path)
    before = logits(model, IDS)
    with pytest.raises(ValueError, match="otswap"):
        hotswap_adapter(model, tmp_path, adapter_name="default")
    assert torch.equal(logits(model, IDS), before)


def test_adapters_are_injected_into_plain_modules(base: PreTrainedModel):
    wrapped = random_adapter(copy.deepcopy(base), target_modules=ATTENTION)
    config = LRQATConfig(**GRID, r=4, lora_alpha=32, target_modules=ATTENTION)
    plain = inject_adapter_in_model(config, base).eval()
    assert type(plain) is type(tiny())
    values = {key.removeprefix("base_model.model."): v for key, v in get_peft_model_state_dict(wrapped).items()}
    assert get_peft_model_state_dict(plain).keys() == values.keys()
    lazy = inject_adapter_in_model(config, tiny(), low_cpu_mem_usage=True)
    assert {value.device.type for value in get_peft_model_state_dict(lazy).values()} == {"meta"}


def test_transformers_own_adapter_methods(base: PreTrainedModel):
    before = logits(base, IDS)
    base.add_adapter(LRQATConfig(**GRID, target_modules=ATTENTION, init_lora_weights=False), "mine")
    assert len(layers(base)) == 4
    changed = logits(base.eval(), IDS)
    assert not torch.equal(changed, before)
    base.disable_adapters()
    assert torch.equal(logits(base, IDS), before)
    base.enable_adapters()
    assert torch.equal(logits(base, IDS), changed)


# -- numerics of wrapping


@pytest.mark.parametrize("downcast", ["fx8", "int", "bf16", "fp16", "fp32"])
def test_casting_the_model_changes_no_code(base: PreTrainedModel, downcast: str):
    model = random_adapter(base, downcast=downcast)
    layer = next(iter(layers(model).values()))
    stored = {name: p.detach().clone() for name, p in layer.base_layer.named_parameters()}
    adapter_only = codes_of(layer)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        assert logits(model, IDS).dtype == dtype
    assert all(torch.equal(p, stored[name]) for name, p in layer.base_layer.named_parameters())
    assert torch.equal(codes_of(layer), adapter_only)


def test_unloading_and_merging_follow_the_models_dtype(base: PreTrainedModel):
    model = random_adapter(base).to(torch.bfloat16)
    trained = logits(model, IDS)
    for plain in (copy.deepcopy(model).unload(), model.merge_and_unload()):
        assert {value.dtype for value in plain.state_dict().values() if value.is_floating_point()} == {torch.bfloat16}
        assert logits(plain, IDS).isfinite().all()
    assert torch.equal(logits(plain, IDS), trained)
    narrow = random_adapter(tiny(), scale_dtype="fp32").to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"cannot hold the scales.*`scale_dtype='fp32'`"):
        narrow.merge_and_unload()


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_adapters_of_a_bf16_model(autocast_adapter_dtype: bool):
    config = LRQATConfig(**GRID, target_modules=ATTENTION)
    model = get_peft_model(tiny(dtype=torch.bfloat16), config, autocast_adapter_dtype=autocast_adapter_dtype)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32 if autocast_adapter_dtype else torch.bfloat16}
    before = [layer.lora_scale_shift["default"].detach().clone() for layer in layers(model).values()]
    train(model, IDS, steps=2, lr=1e-3)
    moved = [layer.lora_scale_shift["default"] for layer in layers(model).values()]
    assert all(not torch.equal(a, b) for a, b in zip(before, moved, strict=True))


def test_autocast_computes_in_bf16_and_returns_fp32_gradients(base: PreTrainedModel):
    model = random_adapter(base)
    layer = next(iter(layers(model).values()))
    x = torch.randn(3, layer.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert layer.lora_scale_shift["default"].grad.dtype == torch.float32
    expected = layer(x)
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(base: PreTrainedModel, use_reentrant: bool):
    model = random_adapter(base).train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    found = gradients()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compiled_layers_have_no_graph_break(symmetric: bool):
    model = random_adapter(tiny(), symmetric=symmetric)
    layer = next(iter(layers(model).values()))
    x = torch.randn(3, layer.in_features, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (layer, compiled):
        layer.zero_grad()
        x.grad = None
        y = run(x)
        y.square().sum().backward()
        results.append(
            [y.detach(), x.grad, layer.lora_A["default"].weight.grad, layer.lora_scale_shift["default"].grad]
        )
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_copies_and_pickles_compute_the_same(base: PreTrainedModel):
    model = random_adapter(base)
    expected = logits(model, IDS)
    assert torch.equal(logits(copy.deepcopy(model), IDS), expected)
    layer = next(iter(layers(model).values()))
    x = torch.randn(2, layer.in_features)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.load(buffer, weights_only=False), IDS), expected)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp1_wraps_an_adapted_model(base: PreTrainedModel, one_process: None):
    model = random_adapter(base)
    expected, saved = logits(model, IDS), get_peft_model_state_dict(model)
    saved = {name: value.clone() for name, value in saved.items()}
    wrapped = FullyShardedDataParallel(copy.deepcopy(model), use_orig_params=True, device_id=torch.device("cpu"))
    assert torch.equal(logits(wrapped, IDS), expected)
    found = get_peft_model_state_dict(wrapped)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)

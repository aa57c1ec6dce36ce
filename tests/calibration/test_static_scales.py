"""Fixed scales of activations: set by text, learned, merged, saved, and run by transformers, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

from peft_lrqat import LowBitSRConfig, LRQATConfig, calibrate_activations, can_export, load_quantized
from peft_lrqat.checkpoint.open import open_source
from peft_lrqat.checkpoint.verify import verify
from peft_lrqat.modules.rounded_input import Int8Linear
from peft_lrqat.ops import use_kernels
from peft_lrqat.tuners.common import input_scale
from tests.files import read
from tests.models import adapted, logits, low_bit, tiny, tokens, train

STATIC = {"bits": 4, "act_bits": 8, "act_scale": "static", "act_bits_pattern": {"o_proj": None}}


def scales(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for name, p in model.named_parameters() if "_act_scale" in name]


@pytest.mark.parametrize("make", [adapted, low_bit])
def test_trained_merged_and_reloaded_are_equal(make, tmp_path: Path):
    base = tiny(dtype=torch.bfloat16, num_hidden_layers=1)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = make(base, **STATIC)
    with pytest.raises(ValueError, match=r"is not set\. Call `calibrate_activations"):
        logits(model, tokens())
    calibrate_activations(model, [tokens(seed=3), {"input_ids": tokens(seed=4)}])
    start = scales(model)
    assert len(start) == 3  # of q, k and v; of gate and up; of down
    train(model, tokens(), lr=2e-2)
    assert all(not torch.equal(before, now) for before, now in zip(start, scales(model), strict=True))
    trained = logits(model, tokens())
    if make is adapted:
        with model.disable_adapter(), pytest.raises(ValueError, match=r"belong to an adapter.*work with none"):
            logits(model, tokens())

    model.save_pretrained(tmp_path / "adapter")
    kind = type(tiny())
    again = PeftModel.from_pretrained(
        kind.from_pretrained(tmp_path / "base", dtype=torch.bfloat16), tmp_path / "adapter"
    )
    assert torch.equal(logits(again, tokens()), trained)

    model.merge_adapter()
    assert torch.equal(logits(model, tokens()), trained)
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens()), trained)
    check = can_export(model, "compressed-tensors", container_bits=4)
    assert "fixed scales of activations beside int8 codes" in str(check)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, tokens()), trained)
    merged.save_pretrained(tmp_path / "out")
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    (said,) = [g["input_activations"] for g in groups.values() if g["input_activations"]]
    assert (said["strategy"], said["dynamic"], said["num_bits"]) == ("tensor", False, 8)
    assert sum(name.endswith("input_scale") for name in read(tmp_path / "out")) == 6
    loaded = load_quantized(tmp_path / "out")
    assert sum(isinstance(module, Int8Linear) for module in loaded.modules()) == 6
    assert torch.equal(logits(loaded, tokens()), trained)
    assert verify(tmp_path / "out", against=again)  # what transformers computes, too


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", [adapted, low_bit])
def test_a_product_rounds_its_input_as_the_rounding_alone_does(make, autocast, kernels, monkeypatch):
    """All gradients: what a layer's product does with the numbers that its input was rounded to, autograd does of two
    operations."""
    model = make(tiny(num_hidden_layers=1), **STATIC).train()
    calibrate_activations(model, [tokens()])
    with torch.no_grad():  # so that something is cut
        for name, parameter in model.named_parameters():
            if "_act_scale" in name:
                parameter.sub_(1.3)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = []
    for apart in (False, True):
        if apart:
            monkeypatch.setattr(input_scale, "shared_values", lambda *args: None)
        model.zero_grad()
        with use_kernels(kernels), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(input_ids=tokens(), labels=tokens())
            out.loss.backward()
        found.append([out.logits, *[p.grad for p in model.parameters() if p.requires_grad]])
    assert all(gradient is not None for gradient in found[0])
    assert sum(bool(p.grad.any()) for n, p in model.named_parameters() if "_act_scale" in n) == 3
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("trained", ["log2", "x"])
def test_only_what_is_asked_for(trained: str):
    model = adapted(tiny(num_hidden_layers=1), **STATIC)
    calibrate_activations(model, [tokens()])
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(1, 3, layer.in_features)
    wanted = x.requires_grad_() if trained == "x" else layer.lora_act_scale["default"].weight
    (all_of_it,) = torch.autograd.grad(layer(x).square().sum(), wanted)
    model.requires_grad_(False)
    wanted.requires_grad_()
    (alone,) = torch.autograd.grad(layer(x).square().sum(), wanted)
    assert torch.equal(alone, all_of_it)
    assert alone.any()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"act_bits": 4}, "`act_bits` is 4 with `act_scale='static'`.*W8A8 only"),
        ({"act_bits_pattern": {"down_proj": 4}}, "`act_bits_pattern` is "),
        ({"act_group_size": 8}, "`act_group_size` is 8 with"),
        ({"act_rule": "vllm"}, "`act_rule` is 'vllm' with"),
        ({"group_size": 8}, "`group_size` is 8 with"),
        ({"container_bits": 4}, "`container_bits` is 4 with"),
        ({"act_bits": None, "act_bits_pattern": None}, "`act_scale` is 'static', but no input is rounded"),
    ],
)
@pytest.mark.parametrize("kind", [LRQATConfig, LowBitSRConfig])
def test_what_no_engine_takes_is_refused(kind, options: dict, match: str):
    with pytest.raises(ValueError, match=match):
        kind(**{**STATIC, "group_size": -1, **options})


def test_what_has_no_fixed_scales_is_not_calibrated():
    with pytest.raises(ValueError, match="no single active, unmerged adapter with fixed scales"):
        calibrate_activations(adapted(tiny(), act_bits=8), [tokens()])
    model = adapted(tiny(num_hidden_layers=1), **STATIC).train()
    model.base_model.model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    no_batches = {
        "`batches` is empty": [],
        r"`batches` holds 'a text'.*tokenizer\(text": "a text",
        "`batches` holds 'text'": ["text"],
        r"`batches` holds \[1, 2\]": [[1, 2]],
        "`batches` is of type int": 7,
        r"torch.float32 \(1, 4\)": [torch.rand(1, 4)],
    }
    for message, wrong in no_batches.items():
        with pytest.raises(ValueError, match=message):
            calibrate_activations(model, wrong)
    embeddings = model.get_input_embeddings().weight.data
    kept = embeddings.clone()
    embeddings.zero_()
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.0.*is 0\.0.*act_bits_pattern=\{'model\.layers"):
        calibrate_activations(model, [tokens()])
    embeddings.copy_(kept)
    assert all(scale.isnan() for scale in scales(model))
    assert [module.training for module in model.modules()] == modes
    calibrate_activations(model, tokens())  # one batch, not a list of its rows
    of_one = scales(model)
    calibrate_activations(model, [tokens()])
    assert all(torch.equal(a, b) for a, b in zip(of_one, scales(model), strict=True))


def test_compiled_scales_that_are_not_set_are_refused():
    """Inside a graph nothing would look at them: the loss would be NaN."""
    model = adapted(tiny(num_hidden_layers=1), **STATIC)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    compiled, x = torch.compile(layer, backend="eager"), torch.randn(1, 3, layer.in_features)
    with pytest.raises(ValueError, match=r"is not set\. Call `calibrate_activations"):
        compiled(x)
    calibrate_activations(model, [tokens()])
    assert torch.equal(compiled(x), layer(x))


def test_what_is_not_calibrated_cannot_be_exported(tmp_path: Path):
    model = adapted(tiny(num_hidden_layers=1), **STATIC)
    with pytest.raises(ValueError, match=r"is not set\. Call `calibrate_activations"):
        can_export(model)
    calibrate_activations(model, [tokens()])
    assert can_export(model)


def test_a_damaged_scale_is_refused(tmp_path: Path):
    model = adapted(tiny(num_hidden_layers=1), **STATIC)
    calibrate_activations(model, [tokens()])
    model.merge_and_unload().save_pretrained(tmp_path)
    tensors = read(tmp_path)
    name = next(name for name in tensors if name.endswith("input_scale"))
    for value, match in ((torch.zeros(1), "not one positive number"), (None, "has no `input_scale`, but config")):
        damaged = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(damaged | ({} if value is None else {name: value}), tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=match):
            open_source(tmp_path)

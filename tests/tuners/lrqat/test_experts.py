"""Experts with adapters inside the rounding: each is a linear layer of its own, and all roads lead to one model."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from peft_lrqat import LRQATConfig, load_quantized
from peft_lrqat.modules.generation import kept_weights
from peft_lrqat.tuners.common import undo
from peft_lrqat.tuners.common.async_rollouts import _described
from peft_lrqat.tuners.common.packed_parameter import whole
from peft_lrqat.tuners.lrqat import LRQATLinear
from peft_lrqat.tuners.lrqat.experts import FrozenExperts, LRQATExpertLinear
from tests.mixtures import EXPERTS, FIRST, mixture, on_experts
from tests.models import logits, tokens, train
from tests.parallel import in_two_processes
from tests.weight_engine import Engine, sync

IDS = tokens(1, 6)
GRIDS: dict[str, dict[str, Any]] = {
    "groups": {},
    "channels, packed": {"group_size": -1, "downcast": "int"},
    "zero points": {"symmetric": False, "bits": 3},
    "one change a row": {"learn_scales": "channel"},
    "fixed scales": {"learn_scales": False},
}


@pytest.fixture(scope="module")
def trained() -> PeftModel:
    model = on_experts(mixture(torch.bfloat16))
    train(model, IDS, steps=2)
    return model


@pytest.fixture
def model(trained: PeftModel) -> PeftModel:
    return copy.deepcopy(trained)


def layers(model: nn.Module) -> dict[str, LRQATExpertLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LRQATExpertLinear)}


@pytest.mark.parametrize("options", GRIDS.values(), ids=GRIDS)
def test_each_expert_is_a_linear_layer_of_its_own(options: dict):
    """Its weight, its integers and its gradients."""
    float_model = mixture()
    model = on_experts(copy.deepcopy(float_model), **options)
    for name in ("gate_up_proj", "down_proj"):
        layer = model.base_model.model.get_submodule(f"{FIRST}.{name}")
        config: LRQATConfig = model.peft_config["default"]
        experts = torch.tensor([3, 1])
        weight = layer(experts, torch.float32).weight
        push = torch.randn_like(weight)
        (weight * push).sum().backward()
        whole, out = layer.grid_tensor(), weight.shape[1]
        assert layer.lora_A["default"].weight.shape == (2 * EXPERTS, weight.shape[2])
        assert layer.lora_B["default"].weight.shape == (out, 2 * EXPERTS)
        for place, e in enumerate(experts.tolist()):
            linear = nn.Linear(weight.shape[2], out, bias=False)
            linear.weight.data = float_model.get_parameter(f"{FIRST}.{name}")[e].detach().clone()
            alone = LRQATLinear(linear, "default", config=config, r=2, lora_alpha=config.lora_alpha)
            rows = slice(e * out, (e + 1) * out)
            mine = {"lora_A": layer.lora_A["default"].weight.view(EXPERTS, 2, -1)[e]}
            mine["lora_B"] = layer.lora_B["default"].weight.view(out, 2, EXPERTS)[..., e]
            if config.learn_scales:
                mine["lora_scale_shift"] = layer.lora_scale_shift["default"].weight[rows]
            for part, value in mine.items():
                getattr(alone, part)["default"].weight.data = value.detach().clone()
            assert torch.equal(alone.weight, weight[place])
            assert torch.equal(alone.grid_tensor().codes, whole.codes[rows])
            assert torch.equal(alone.get_delta_weight("default"), layer.get_delta_weight("default")[e])
            (alone.weight * push[place]).sum().backward()
            a_grad = layer.lora_A["default"].weight.grad.view(EXPERTS, 2, -1)[e]
            assert torch.allclose(alone.lora_A["default"].weight.grad, a_grad, rtol=1e-4, atol=1e-6)
        assert not layer.lora_A["default"].weight.grad.view(EXPERTS, 2, -1)[[0, 2, 4]].any()
        rows = torch.tensor([out + 3, 1, 4 * out])
        assert torch.equal(layer.sample_codes(rows, ["default"])[0], whole.codes[rows])


@pytest.mark.slow  # tests/modules/test_experts.py has the functions alone
def test_every_way_of_multiplying_trains_and_merges_exactly():
    for how in ("eager", "batched_mm"):
        model = on_experts(mixture(torch.bfloat16, how))
        train(model, IDS, steps=2)
        expected = logits(model, IDS)
        assert torch.equal(logits(model.merge_and_unload(), IDS), expected)


@pytest.mark.parametrize("learn_scales", [True, "channel"])
def test_grouped_products_build_no_weights_and_change_no_number(monkeypatch: pytest.MonkeyPatch, learn_scales: Any):
    model = on_experts(mixture(), learn_scales=learn_scales).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    results = []
    for patched, name in ((FrozenExperts, "some"), (LRQATExpertLinear, "grouped")):
        with monkeypatch.context() as without:
            without.setattr(patched, name, lambda *args: None)  # where weights are asked for, this fails
            out = model(input_ids=IDS, labels=IDS)
            results.append([out.logits, *torch.autograd.grad(out.loss, trained)])
    assert torch.equal(results[0][0], results[1][0])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_experts_without_tokens_have_gradients_of_zeros(model: PeftModel):
    model.train()
    model(input_ids=IDS[:, :2], labels=IDS[:, :2]).loss.backward()
    for layer in layers(model).values():
        grad = layer.lora_B["default"].weight.grad.view(-1, 2, EXPERTS)
        assert not grad.any(dim=0).any(dim=0).all()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "mlp.gate" in n)


def test_checkpointing_and_autocast_change_nothing(trained: PeftModel):
    def gradients(model: PeftModel) -> list[torch.Tensor]:
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    plain, checkpointed = copy.deepcopy(trained).float(), copy.deepcopy(trained).float()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed.enable_input_require_grads()
    assert all(map(torch.equal, gradients(checkpointed), gradients(plain)))
    plain.eval()
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(plain, IDS)
        assert torch.equal(logits(plain.merge_and_unload(), IDS), expected)


def test_merging_in_place_and_back(model: PeftModel):
    expected = logits(model, IDS)
    model.merge_adapter()
    assert torch.equal(logits(model, IDS), expected)
    assert torch.equal(logits(copy.deepcopy(model), IDS), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model, IDS), expected)


def test_an_adapter_is_loaded_and_switched(model: PeftModel, tmp_path: Path):
    expected = logits(model, IDS)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mixture(torch.bfloat16), tmp_path).eval()
    assert torch.equal(logits(again, IDS), expected)
    without_memory = PeftModel.from_pretrained(mixture(torch.bfloat16), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(without_memory, IDS), expected)
    again.load_adapter(tmp_path, "second")
    again.base_model.set_adapter(["default", "second"])
    both = logits(again, IDS)
    assert not torch.equal(both, expected)
    assert torch.equal(logits(copy.deepcopy(again).merge_and_unload(), IDS), both)
    again.set_adapter("second")
    assert torch.equal(logits(again, IDS), expected)
    with again.disable_adapter():
        base = logits(again, IDS)
    assert torch.equal(base, logits(copy.deepcopy(again).unload(), IDS))
    again.delete_adapter("default")
    assert torch.equal(logits(again, IDS), expected)


def test_unloading_gives_back_the_model_of_transformers(model: PeftModel):
    back = model.unload()
    names = [name for name, _ in mixture().named_parameters()]
    assert [name for name, _ in back.named_parameters()] == names
    assert type(back.get_submodule(FIRST)).__name__ == "Qwen3MoeExperts"


def test_files_have_each_expert_and_are_read_back(trained: PeftModel, tmp_path: Path):
    expected = logits(trained, IDS)
    merged = copy.deepcopy(trained).merge_and_unload()
    assert torch.equal(logits(merged, IDS), expected)
    merged.save_pretrained(tmp_path / "merged")
    loaded = load_quantized(tmp_path / "merged").eval()
    assert torch.equal(logits(loaded, IDS), expected)
    fresh = on_experts(loaded, group_size=None, init_lora_weights=True)
    assert torch.equal(logits(fresh, IDS), expected)
    train(fresh, IDS, steps=1)
    expected = logits(fresh, IDS)
    assert torch.equal(logits(fresh.merge_and_unload(), IDS), expected)


def test_weights_are_kept_while_a_model_generates(model: PeftModel):
    ids = IDS[:, :3]
    expected = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    for layer in layers(model).values():
        assert layer.kept(torch.bfloat16) is None
    with torch.no_grad(), kept_weights(model):
        model(input_ids=ids)
        layer = next(iter(layers(model).values()))
        kept = layer.kept(torch.bfloat16)
        assert kept is layer.kept(torch.bfloat16) or kept.data_ptr() == layer.kept(torch.bfloat16).data_ptr()
        assert torch.equal(kept, layer(None, torch.bfloat16).weight)
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(input_ids=ids, max_new_tokens=3, do_sample=False), expected)


def test_an_adapter_for_each_sample_is_refused(model: PeftModel):
    with pytest.raises(ValueError, match="see tokens, not samples"):
        model(input_ids=IDS, adapter_names=["default"])


def test_adapters_are_not_combined(model: PeftModel):
    with pytest.raises(ValueError, match=r"add_weighted_adapter.*experts"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_what_is_sent_to_an_engine_has_the_names_of_files(model: PeftModel):
    engine = Engine(mixture(torch.bfloat16))
    expected = logits(model, IDS)
    sync(model, engine)
    assert torch.equal(logits(engine.model, IDS), expected)
    assert f"{FIRST}.3.up_proj.weight" in engine.loaded
    per_layer = 3 * EXPERTS
    float_names = [name for name, _ in engine.model.named_parameters() if "experts" not in name]
    assert len(engine.loaded) == 2 * per_layer + len(float_names)
    assert torch.equal(logits(model, IDS), expected)


def test_an_asynchronous_trainer_announces_what_is_sent(model: PeftModel):
    def walk() -> list[tuple]:
        return [(n, tuple(p.shape), p.dtype) for n, p in model.named_parameters() if "lora_" not in n]

    with _described(list(layers(model).values())):
        announced = walk()
    model.merge_adapter()
    experts = [entry for entry in walk() if "experts" in entry[0]]
    assert len(experts) == 2 * 3 * EXPERTS
    assert [entry for entry in announced if "experts" in entry[0]] == experts


@pytest.mark.parametrize("room", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_float_weights_are_freed(monkeypatch: pytest.MonkeyPatch, room: bool):
    if not room:  # to keep them until the last layer is converted
        monkeypatch.setattr(undo, "free_bytes", lambda device: 0.0)
    float_model = mixture()
    weights = [float_model.get_parameter(f"{FIRST}.{name}") for name in ("gate_up_proj", "down_proj")]
    places = {weight.untyped_storage().data_ptr() for weight in weights}
    held, convert = [], FrozenExperts._convert

    def alive() -> int:
        gc.collect()
        living = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.layout is torch.strided]
        # others may lie where one was
        stacks = (t for t in living if t.dtype == torch.float32 and t.numel() in (EXPERTS * 32 * 32, EXPERTS * 32 * 16))
        return len(places & {tensor.untyped_storage().data_ptr() for tensor in stacks})

    def converted(self: FrozenExperts, weight: torch.Tensor) -> tuple:
        held.append(alive())
        return convert(self, weight)

    del weights
    monkeypatch.setattr(FrozenExperts, "_convert", converted)
    model = on_experts(float_model)
    assert held == ([2, 2, 2, 2] if room else [2, 1, 0, 0])
    assert layers(model)
    assert alive() == 0


def _steps(model: PeftModel, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and the gradients, after which every entry is moved by as much, whatever a gradient's last bits."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.sub_(parameter.grad.sign() * 0.02)
    return loss.item(), grads


def _seeded() -> PeftModel:
    torch.manual_seed(0)
    return on_experts(mixture())


def _sharded(rank: int, folder: Path) -> dict[str, Any]:
    model = _seeded()
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)
    loss, grads = _steps(model, tokens(2)[rank : rank + 1])
    frozen = next(iter(layers(model).values())).frozen
    held = frozen.base.to_local().nbytes / frozen.base.nbytes
    merged = model.merge_and_unload()
    state = get_model_state_dict(merged, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {"loss": loss, "grads": grads, "held": held, "state": state}


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < (2, 12), reason="FSDP2 shards no integer parameters before torch 2.12")
def test_two_processes_with_fsdp2_train_what_one_does(tmp_path: Path):
    model = _seeded()
    loss, grads = _steps(model, tokens(2))
    state = model.merge_and_unload().state_dict()
    first, second = in_two_processes(_sharded, tmp_path)
    assert (first["loss"] + second["loss"]) / 2 == pytest.approx(loss, rel=1e-6)
    assert first["held"] == 0.5
    for name, gradient in grads.items():
        torch.testing.assert_close(first["grads"][name], gradient, rtol=0, atol=2e-5 * gradient.abs().max().item())
    assert first["state"].keys() == state.keys()
    assert all(torch.equal(first["state"][name], tensor) for name, tensor in state.items())

"""Layers that are given one input have one fixed scale: in training, in files, after loading, in every adapter."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from peft_lrqat import LRQATConfig, calibrate_activations
from peft_lrqat.ops import shared_inputs
from peft_lrqat.tuners.common.input_scale import InputScale, set_scales
from tests.files import read
from tests.mixtures import of_family
from tests.models import adapted, logits, low_bit, tiny, tokens, train
from tests.parallel import in_two_processes

STATIC = {"bits": 4, "act_bits": 8, "act_scale": "static"}
SHARED = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]


def calibrated(make=adapted, **overrides) -> nn.Module:
    model = make(tiny(num_hidden_layers=2, **overrides), **STATIC)
    calibrate_activations(model, [tokens(seed=3), tokens(seed=4)])
    return model


def who_shares(model: nn.Module, adapter: str = "default") -> list[set[str]]:
    """The layers of each scale, of all blocks in turn."""
    found: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, InputScale) and name.endswith("." + adapter):
            found.setdefault(id(module.weight), set()).add(name.split(".")[-3])
    return list(found.values())


def values(model: nn.Module, adapter: str = "default") -> list[torch.Tensor]:
    scales = [m for n, m in model.named_modules() if isinstance(m, InputScale) and n.endswith("." + adapter)]
    return [scale.weight.detach().clone() for scale in scales]


@pytest.mark.parametrize("make", [adapted, low_bit])
def test_layers_that_are_given_one_input_learn_one_scale(make, tmp_path: Path):
    model = calibrated(make)
    assert who_shares(model) == 2 * SHARED
    before = values(model)
    train(model, tokens(), lr=1e-2)
    assert all(not torch.equal(one, now) for one, now in zip(before, values(model), strict=True))
    trained = logits(model, tokens())
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, tokens()), trained)
    merged.save_pretrained(tmp_path)
    stored = {name: tensor for name, tensor in read(tmp_path).items() if name.endswith(".input_scale")}
    assert len(stored) == 14
    for block in range(2):
        for attention, scales in ((True, {"q_proj", "k_proj", "v_proj"}), (False, {"gate_proj", "up_proj"})):
            part = f"model.layers.{block}.{'self_attn' if attention else 'mlp'}"
            assert len({float(stored[f"{part}.{name}.input_scale"]) for name in scales}) == 1


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_it_is_rounded_once_with_the_gradients_of_all(checkpointing: bool | None, monkeypatch: pytest.MonkeyPatch):
    model, count = calibrated().train(), []
    rounded = shared_inputs.learned_values
    monkeypatch.setattr(shared_inputs, "learned_values", lambda *args: count.append(1) or rounded(*args))
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        out = model(input_ids=tokens(), labels=tokens())
        out.loss.backward()
        return [out.logits, *[p.grad for p in model.parameters() if p.requires_grad]]

    passes = 1 if checkpointing is None else 2
    found = step()
    assert len(count) == 2 * 4 * passes
    monkeypatch.setattr(shared_inputs, "_place", lambda x: None)  # each rounds for itself
    for one, two in zip(found, step(), strict=True):
        assert torch.equal(one, two)
    assert len(count) == 2 * (4 + 7) * passes


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_loaded_adapter_goes_on_as_the_saved_one(low_memory: bool, tmp_path: Path):
    model = calibrated()
    train(model, tokens(), lr=1e-2)
    model.save_pretrained(tmp_path)
    assert sum("lora_act_scale" in name for name in read(tmp_path)) == 14  # each layer's, for whoever reads the file
    options = {"is_trainable": True, "low_cpu_mem_usage": low_memory}
    again = PeftModel.from_pretrained(tiny(num_hidden_layers=2), tmp_path, **options)
    assert who_shares(again) == 2 * SHARED
    for one in (model, again):
        train(one, tokens(seed=5), lr=1e-2)
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    into = calibrated()  # which has other values
    into.load_adapter(tmp_path, "default")
    assert who_shares(into) == 2 * SHARED
    state = copy.deepcopy(model.state_dict())
    into.load_state_dict(state)
    assert who_shares(into) == 2 * SHARED
    assert torch.equal(logits(into, tokens()), logits(model, tokens()))


def test_transformers_own_saving_takes_no_tensor_under_two_names(tmp_path: Path):
    model = tiny(num_hidden_layers=2)
    model.add_adapter(LRQATConfig(**STATIC, group_size=-1, target_modules="all-linear"))
    calibrate_activations(model, [tokens(seed=3), tokens(seed=4)])
    assert who_shares(model) == 2 * SHARED
    train(model, tokens(), lr=1e-2)
    model.save_pretrained(tmp_path)
    assert sum("lora_act_scale" in name for name in read(tmp_path)) == 14
    again = tiny(num_hidden_layers=2)
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_transformers_own_loading_sets_parameters(tmp_path: Path):
    model = calibrated()
    train(model, tokens(), lr=1e-2)
    model.save_pretrained(tmp_path)
    again = tiny(num_hidden_layers=2)
    again.load_adapter(tmp_path, is_trainable=True)
    for one in (model, again):
        train(one, tokens(seed=5), lr=1e-2)
    assert who_shares(again) == 2 * SHARED
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_scales_that_differ_in_a_file_are_each_layers_own(tmp_path: Path):
    """As they were trained before layers had one; whatever the model has that they are loaded into."""
    model = calibrated()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    names = [name for name in tensors if "lora_act_scale" in name]
    tensors |= {name: tensors[name] + number / 8 for number, name in enumerate(names)}
    save_file(tensors, file, {"format": "pt"})
    fresh = PeftModel.from_pretrained(tiny(num_hidden_layers=2), tmp_path)
    with pytest.warns(UserWarning, match=r"other fixed scales .* make the optimizer.*after loading") as said:
        model.load_adapter(tmp_path, "default", is_trainable=True)  # an optimizer would not know the new parameters
    assert len({str(one.message) for one in said if "fixed scales" in str(one.message)}) == 1  # Python says it once
    for one in (fresh, model):
        assert len(who_shares(one)) == 14
        found = {name: tensor for name, tensor in one.state_dict().items() if "lora_act_scale" in name}
        for name, tensor in found.items():
            assert torch.equal(tensor, tensors[name.replace(".default", "")])
    assert torch.equal(logits(fresh, tokens()), logits(model, tokens()))


@pytest.mark.parametrize("kept", ["q_proj", "k_proj", "v_proj"])
def test_a_file_that_has_each_parameter_once_is_read_for_all_of_its_layers(kept: str, tmp_path: Path):
    """Some ways of saving leave out all names of a parameter but one."""
    model = calibrated()
    train(model, tokens(), lr=1e-2)
    shared = {"q_proj", "k_proj", "v_proj"} - {kept} | {"gate_proj"}
    tensors = model.state_dict()
    once = {n: t for n, t in tensors.items() if "act_scale" not in n or n.split(".")[-4] not in shared}
    assert len(once) == len(tensors) - 2 * 3
    into = calibrated()
    held = {id(p) for p in into.parameters()}
    into.load_state_dict(once, strict=False)
    assert {id(p) for p in into.parameters()} == held
    assert torch.equal(logits(into, tokens()), logits(model, tokens()))
    save_model(model, tmp_path / "model.safetensors")
    into = calibrated()
    assert not load_model(into, tmp_path / "model.safetensors")[0]
    assert torch.equal(logits(into, tokens()), logits(model, tokens()))


def _load_sharded(rank: int, folder: Path) -> tuple[list[set[str]], str]:
    """Who shares after equal scales came into a model that FSDP2 has, and what it says of other ones."""
    torch.manual_seed(0)
    model = calibrated()
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)

    def load(change: float) -> None:
        state = model.state_dict()
        for number, (name, there) in enumerate(state.items()):
            here = values[name] + change * number if "act_scale" in name else values[name]
            whole = not isinstance(there, DTensor)
            state[name] = here if whole else distribute_tensor(here, there.device_mesh, there.placements)
        model.load_state_dict(state)

    load(0.0)
    shared, said = who_shares(model), ""
    try:
        load(1 / 8)
    except RuntimeError as error:
        said = str(error)
    return shared, said


def test_a_model_that_is_sharded_keeps_who_shares(tmp_path: Path):
    """FSDP2 sets the parameters that it found; the second process has nothing of a single number."""
    (shared, said), (of_second, _) = in_two_processes(_load_sharded, tmp_path)
    assert shared == of_second == 2 * SHARED
    assert "other fixed scales of inputs" in said
    assert "Load it before the model is sharded" in said


def test_another_adapter_of_the_model_has_them_in_common_too():
    """TRL copies an adapter by the names of the model's parameters, where each parameter has one."""
    model = calibrated()
    model.add_adapter("ref", model.peft_config["default"])
    assert who_shares(model, "ref") == 2 * SHARED
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    expected = logits(model, tokens())
    model.set_adapter("ref")
    assert torch.equal(logits(model, tokens()), expected)


def test_a_copy_has_scales_of_its_own():
    model = calibrated()
    other = copy.deepcopy(model)
    assert who_shares(other) == 2 * SHARED
    assert not {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}
    before = values(model)
    train(other, tokens(), lr=1e-2)
    assert all(map(torch.equal, values(model), before))


def test_inference_mode_does_not_hide_who_is_given_the_same():
    model = adapted(tiny(num_hidden_layers=2), **STATIC)
    for _ in range(2):
        with torch.inference_mode():
            calibrate_activations(model, [tokens(seed=3), tokens(seed=4)])
        assert who_shares(model) == 2 * SHARED
        assert torch.equal(logits(model, tokens()), logits(calibrated(), tokens()))
    train(model, tokens())
    with torch.inference_mode():  # it may have been made in
        model = calibrated()
        assert torch.equal(logits(model, tokens()), logits(calibrated(), tokens()))


class _OtherInputs(nn.Module):
    """Three layers in one module: the second is given a tensor of the same values, the third the second's."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, input_ids: torch.Tensor, again: bool = False) -> torch.Tensor:
        x = input_ids.float().unsqueeze(-1).expand(*input_ids.shape, 8) / 4
        y = x.clone()
        out = self.one(x) + self.two(y)
        return out + self.three(y if not again else y.add_(1))


@pytest.mark.parametrize(
    ("again", "expected"), [(False, [{"one"}, {"two", "three"}]), (True, [{"one"}, {"two"}, {"three"}])]
)
def test_only_the_same_tensor_counts(again: bool, expected: list[set[str]]):
    model = adapted(_OtherInputs(), **STATIC, task_type=None)
    calibrate_activations(model, [{"input_ids": tokens(), "again": False}])
    assert who_shares(model) == [{"one"}, {"two", "three"}]
    batches = [{"input_ids": tokens(), "again": False}, {"input_ids": tokens(), "again": again}]
    calibrate_activations(model, batches)  # once more, on other text
    assert who_shares(model) == expected
    one, two, three = values(model)
    assert torch.equal(one, two)
    assert torch.equal(two, three) is not again


def test_layers_that_another_one_stands_between(tmp_path: Path):
    """DeepSeek's q_a and kv_a, of which vLLM makes one product."""
    layers = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    expected = 2 * [{"q_a_proj", "kv_a_proj_with_mqa"}, {"q_b_proj"}, {"kv_b_proj"}, {"o_proj"}]
    model = adapted(of_family("deepseek_v3"), **STATIC, target_modules=layers)
    calibrate_activations(model, [tokens(seed=3), tokens(seed=4)])
    assert who_shares(model) == expected
    model.add_adapter("ref", model.peft_config["default"])
    assert who_shares(model, "ref") == expected
    train(model, tokens(), lr=1e-2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(of_family("deepseek_v3"), tmp_path)
    assert who_shares(again) == expected
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_layers_that_part_in_the_middle():
    scales = [InputScale(torch.device("cpu")) for _ in range(3)]
    for number, scale in enumerate(scales):
        scale.before = tuple(scales[:number])
    log2 = torch.tensor(-3.0)
    with torch.no_grad():
        set_scales((scale, log2, [0, 1]) for scale in scales)
        assert len({id(scale.weight) for scale in scales}) == 1
        set_scales((scale, log2 + n, [n % 2]) for n, scale in enumerate(scales))
        assert [float(scale.weight) for scale in scales] == [-3, -2, -3]
        assert scales[2].weight is scales[0].weight
        set_scales((scale, log2 + n, [n]) for n, scale in enumerate(scales))
        assert [float(scale.weight) for scale in scales] == [-3, -2, -1]

"""An error while a model is adapted, whatever it is and wherever it comes from, leaves everything as it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_lrqat import LRQATConfig, chunks
from peft_lrqat.tuners.common import model as common_model
from peft_lrqat.tuners.common import undo
from peft_lrqat.tuners.common.frozen import FrozenWeight
from tests import lrqat
from tests.memory import LiveBytes
from tests.models import logits, tiny, tokens
from tests.quantized_files import Spec, write
from tests.refusals import refused

IDS = tokens()


def fresh() -> PreTrainedModel:
    """A model in which some parameters are frozen, one module is in training mode, and there is a hook."""
    model = tiny()
    model.model.norm.weight.requires_grad_(False)
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    model.model.layers[0].mlp.train()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    return model


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], None]:
    """Let the conversion of one layer fail."""
    original = FrozenWeight.of_floats

    def install(at: int, error: BaseException) -> None:
        calls: Iterator[int] = iter(range(10**6))

        def of_floats(*args: Any, **kwargs: Any) -> FrozenWeight:
            if next(calls) == at:
                raise error
            return original(*args, **kwargs)

        monkeypatch.setattr(FrozenWeight, "of_floats", of_floats)

    yield install
    monkeypatch.undo()


def works(method: ModuleType, model: PreTrainedModel) -> None:
    """The model can be adapted now, and gives what a model gives to which nothing has happened."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        expected = logits(method.random_adapter(tiny()), IDS)
        torch.manual_seed(5)
        assert torch.equal(logits(method.random_adapter(model.eval()), IDS), expected)


@pytest.mark.parametrize("at", [0, 5, 13])
@pytest.mark.parametrize(
    "error", [RuntimeError("no reason"), KeyboardInterrupt("stop"), torch.OutOfMemoryError("full")]
)
def test_any_error_in_the_middle(method: ModuleType, failing: Callable, error: BaseException, at: int, monkeypatch):
    model, config = fresh(), method.config(modules_to_save=["lm_head"])
    failing(at, error)
    with refused(model, str(error), type(error), config):
        get_peft_model(model, config)
    failing(at, error)
    with refused(model, str(error), type(error), config):
        model.add_adapter(config)
    monkeypatch.undo()
    works(method, model)


@pytest.mark.parametrize("where", ["use_lean_loss", "check"])
def test_an_error_after_the_last_layer(method: ModuleType, where: str, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: Any) -> None:
        raise KeyError("late")

    if where == "check":
        monkeypatch.setattr(common_model.QuantizingModel, "_check_converted", fail)
        monkeypatch.setattr("peft_lrqat.tuners.lrqat.model.LRQATModel._check_converted", fail)
    else:
        monkeypatch.setattr(common_model, where, fail)
    model, config = fresh(), method.config(bias="all", trainable_token_indices=[1, 2], modules_to_save=["lm_head"])
    with refused(model, "late", KeyError, config):
        get_peft_model(model, config)
    monkeypatch.undo()
    works(method, model)


def test_other_modules_than_those_that_were_checked(method: ModuleType, monkeypatch: pytest.MonkeyPatch):
    find = common_model.QuantizingModel._targets

    def fewer(*args: Any) -> dict[str, nn.Module]:
        targets = find(*args)
        targets.popitem()
        return targets

    monkeypatch.setattr(common_model.QuantizingModel, "_targets", fewer)
    model, config = fresh(), method.config()
    with refused(model, "PEFT adapted other modules than were checked before.*down_proj", RuntimeError, config):
        get_peft_model(model, config)


@pytest.mark.parametrize("error", [RuntimeError("no reason"), KeyboardInterrupt("stop")])
def test_without_room_for_the_float_weights_the_error_says_what_is_lost(
    method: ModuleType, failing: Callable, error: BaseException, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(undo, "free_bytes", lambda device: 0)
    model, config = fresh(), method.config()
    before = vars(copy.deepcopy(config))
    failing(5, error)
    said = "5 of 14 layers were already converted.*load it again"
    with pytest.raises(RuntimeError if isinstance(error, RuntimeError) else KeyboardInterrupt) as caught:
        get_peft_model(model, config)
    if isinstance(error, RuntimeError):
        assert caught.match(said)
        assert caught.value.__cause__ is error
    else:
        assert caught.value is error
        assert any("5 of 14 layers" in note for note in error.__notes__)
    assert {k: v for k, v in vars(config).items() if k != "base_model_name_or_path"} == {
        k: v for k, v in before.items() if k != "base_model_name_or_path"
    }
    # nothing was freed yet when the first layer fails
    model, config = fresh(), method.config()
    failing(0, error)
    with refused(model, str(error), type(error), config):
        get_peft_model(model, config)


@pytest.mark.parametrize("room", [0, 1 << 40])
def test_the_float_weights_are_gone_afterwards(method: ModuleType, room: int, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(undo, "free_bytes", lambda device: asked.append(device) or room)
    model = tiny()
    linears = [module for name, module in model.named_modules() if name.endswith("_proj")]
    get_peft_model(model, method.config())
    assert asked == [torch.device("cpu")]
    assert [module.weight for module in linears] == [None] * 14


def test_room_is_what_is_free_and_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(undo, "_LIMITS", ((tmp_path, "memory.max", "memory.current"),))
    free = undo.free_bytes(cpu)
    assert 0 < free < 1 << 50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert undo.free_bytes(cpu) < free / 3
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    (tmp_path / "memory.max").write_text("max\n")
    assert undo.free_bytes(cpu) > free / 2
    for name, text in {
        "memory.max": "9000",
        "memory.current": "8000",
        "memory.stat": "anon 7\ninactive_file 500",
    }.items():
        (tmp_path / name).write_text(text)
    assert undo.free_bytes(cpu) == 1500
    assert undo.free_bytes(torch.device("meta")) == 0


def test_free_memory_of_a_gpu_counts_what_torch_holds_in_reserve(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)
    assert undo.free_bytes(torch.device("cuda", 0)) == 120


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 32},
        {"bits": 8, "group_size": -1, "range_method": "minmax"},
        {"downcast": "fp32", "range_method": "minmax"},
    ],
)
def test_conversion_takes_no_more_than_what_room_is_needed_for(options: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunks, "CPU_CHUNK", 1 << 12)
    model = tiny(dtype=torch.bfloat16, hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    config = lrqat.config(**options)
    weights = [module.weight.numel() for name, module in model.named_modules() if name.endswith("_proj")]
    needed = undo.needed_bytes(weights, config.bytes_per_weight, torch.device("cpu"))
    with LiveBytes(p.data for p in model.parameters()) as live:
        get_peft_model(model, config)
        live.sweep()
    assert needed / 4 < live.peak - live.start < needed
    assert live.now < live.start + needed - 2 * sum(weights)  # the float weights, 2 bytes each, are gone


# -- further adapters


def test_a_second_adapter_that_fails(method: ModuleType, base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch):
    model = method.random_adapter(base, modules_to_save=["lm_head"], trainable_token_indices=[1, 2])
    before = logits(model, IDS)
    layer = type(next(iter(method.layers(model).values())))
    original, calls = layer.update_layer, iter(range(100))

    def update_layer(self: Any, *args: Any, **kwargs: Any) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt("stop")
        original(self, *args, **kwargs)

    monkeypatch.setattr(layer, "update_layer", update_layer)
    config = method.other(modules_to_save=["lm_head"])
    with refused(model, "stop", KeyboardInterrupt, config):
        model.add_adapter("second", config)
    monkeypatch.undo()
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, IDS), before)
    model.add_adapter("second", config)
    model.set_adapter("second")
    assert not torch.equal(logits(model, IDS), before)


def test_adapters_that_transformers_manages(method: ModuleType, base: PreTrainedModel):
    with refused(base, "no_such_module"):
        base.add_adapter(method.config(target_modules=["no_such_module"]), "first")
    base.add_adapter(method.other(), "first")
    before = logits(base.eval(), IDS)
    with refused(base, "no module of the model is called so"):
        base.add_adapter(method.other(modules_to_save=["nothing"]), "second")
    assert list(base.peft_config) == ["first"]
    assert torch.equal(logits(base, IDS), before)


def test_a_second_model_of_one_name(method: ModuleType, base: PreTrainedModel):
    """PEFT overwrites the configuration of an adapter of that name before anything is looked at."""
    model = method.random_adapter(base)
    inner = model.get_base_model()
    with pytest.warns(UserWarning, match="second time"), refused(inner, "share its converted base|does not divide"):
        get_peft_model(inner, method.config(group_size=5))
    assert inner.peft_config["default"].group_size == 8
    with pytest.warns(UserWarning, match="second time"):
        again = get_peft_model(inner, method.other())
    assert len(method.layers(again)) == 14


# -- files


def test_a_file_whose_ranks_or_modules_do_not_fit(method: ModuleType, folder: Path):
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "modules_to_save": ["lm_head"]}))
    with refused(model := fresh(), "the adapter file has no 'lm_head.weight'"):
        PeftModel.from_pretrained(model, folder)
    if method is lrqat:
        path.write_text(json.dumps({**saved, "rank_pattern": {"up_proj": 3}}))
        with refused(model, r"up_proj.lora_A.weight' has shape \(4, 32\), but this model needs \(3, 32\)"):
            PeftModel.from_pretrained(model, folder)
    works(method, model)


def test_integers_of_another_base(folder: Path, tmp_path: Path):
    """The weights may be the same and convert to other integers (another version, a file that was edited)."""
    method = lrqat
    method.random_adapter(tiny()).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "range_method": "minmax"}))
    with refused(model := fresh(), "trained on another base: its integers have the checksum"):
        PeftModel.from_pretrained(model, tmp_path / "adapter")
    works(method, model)


def test_values_that_do_not_fit_into_an_adapter_that_exists(method: ModuleType, folder: Path):
    """The Trainer's way of resuming. torch copies what fits before it complains."""
    path = folder / "adapter_model.safetensors"
    values = load_file(path)
    name = next(name for name in sorted(values, reverse=True) if name.endswith(("lora_A.weight", "lowbitsr_scale")))
    values[name] = values[name][:, :-1].contiguous()
    save_file(values, path)
    model = method.random_adapter(tiny())
    with refused(model, "made for another grid or architecture"):
        model.load_adapter(folder, adapter_name="default")


# -- a base that others quantized


def test_a_compressed_tensors_model_that_is_refused(tmp_path: Path):
    write(tmp_path, Spec("packed", 4, 16))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    config = LRQATConfig(bits=2, r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    with refused(model, "asks for bits=2", ValueError, config):
        get_peft_model(model, config)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path), IDS)
    assert torch.equal(logits(model, IDS), expected)


@pytest.mark.parametrize("room", [0, 1 << 40])
def test_a_compressed_tensors_model_that_fails_in_the_middle(tmp_path: Path, room: int, monkeypatch):
    monkeypatch.setattr(undo, "free_bytes", lambda device: room)
    write(tmp_path, Spec("packed", 4, 16))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    config = LRQATConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    original, calls = FrozenWeight.of_codes, iter(range(100))

    def of_codes(*args: Any, **kwargs: Any) -> FrozenWeight:
        if next(calls) == 6:
            raise OSError("no reason")
        return original(*args, **kwargs)

    monkeypatch.setattr(FrozenWeight, "of_codes", of_codes)
    if not room:
        with pytest.raises(RuntimeError, match="6 of 7 layers"):
            get_peft_model(model, config)
        return
    with refused(model, "no reason", OSError, config):
        get_peft_model(model, config)
    monkeypatch.undo()
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path), IDS)
    assert torch.equal(logits(get_peft_model(model, config), IDS), expected)


def test_a_refused_second_wrap_leaves_the_peft_model_whole(method):
    """As in a notebook, where a cell is run again with other options."""
    wrapped = get_peft_model(tiny(), method.config(**method.MOVED)).eval()
    before, options = logits(wrapped, IDS), wrapped.peft_config["default"]
    with pytest.raises(ValueError, match="is a PeftModel already"):
        get_peft_model(wrapped, method.config(group_size=16))
    assert wrapped.peft_config == {"default": options}
    assert torch.equal(logits(wrapped, IDS), before)


def test_an_interrupt_before_the_first_check_adds_no_adapter(method, monkeypatch):
    wrapped = get_peft_model(tiny(), method.config(**method.MOVED))

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(undo, "_contents", interrupt)
        with pytest.raises(KeyboardInterrupt):
            wrapped.add_adapter("b", method.config())
    assert list(wrapped.peft_config) == ["default"]
    wrapped.add_adapter("b", method.config())


@pytest.mark.parametrize(
    ("option", "value"),
    [("container_bits", 2), ("act_bits", 5), ("kv_bits", 5), ("range_method", "zzz"), ("learn_scales", "no")],
)
def test_options_set_after_the_configuration_was_made_are_checked_too(method, option, value):
    config = method.config(**{"bits": 4, "group_size": 8})
    setattr(config, option, value)
    model = tiny()
    with pytest.raises(ValueError, match=f"`{option}`"):
        get_peft_model(model, config)
    wrapped = get_peft_model(model, method.config(**{"bits": 4, "group_size": 8}))
    wrapped.peft_config["default"].container_bits = 2
    with pytest.raises(ValueError, match="the container has 2"):
        wrapped.merge_adapter()

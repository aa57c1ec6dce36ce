"""What TRL sends to vLLM while an adapter is merged is the float model's weights, with the numbers that are served.

The engine is a float model here that takes what TRL's own code hands to `load_weights`; `engines/sync.py` does it with
vLLM.
"""

from __future__ import annotations

import copy
import io
from types import ModuleType

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D
from trl.experimental.online_dpo import OnlineDPOTrainer

from peft_lrqat.modules.served_weight import ServedWeight
from tests import lrqat
from tests.files import read as tensors
from tests.memory import LiveBytes
from tests.models import logits, tiny, tokens, train
from tests.weight_engine import Engine, colocated, sync

IDS = tokens()
GRIDS: dict[str, dict] = {
    "channel": {"group_size": -1},
    "asymmetric groups": {"group_size": 8, "symmetric": False},
    "tensor": {"group_size": 0},
    "rank 0": {"group_size": 8, "r": 0},
}


def sync_online_dpo(model: PeftModel, engine: Engine) -> None:
    colocated(OnlineDPOTrainer, model, engine)._move_model_to_vllm()


def check_engine(model: PeftModel, engine: Engine) -> None:
    """The engine has every weight once, with the merged model's numbers; the adapted model is what it was."""
    trained = logits(model, IDS)
    assert sorted(engine.loaded) == sorted(name for name, _ in engine.model.named_parameters())
    assert torch.equal(logits(engine.model, IDS), trained)
    served = copy.deepcopy(model).merge_and_unload()
    for name, module in served.named_modules():
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            assert torch.equal(engine.model.get_parameter(name + ".weight"), module.weight), name


@pytest.mark.parametrize("send", [sync, sync_online_dpo])
@pytest.mark.parametrize(
    ("family", "options"),
    [("qwen2", {"tie": True}), ("qwen2", {"dtype": torch.bfloat16}), ("gpt2", {"tie": True})],
    ids=["float32", "bfloat16", "conv1d"],
)
def test_all_weights_are_sent_with_the_numbers_that_are_served(method: ModuleType, family: str, options: dict, send):
    float_model = tiny(family, **options)
    engine = Engine(float_model)
    model = method.random_adapter(float_model)
    send(model, engine)
    check_engine(model, engine)
    train(model, IDS, steps=1)  # and again, when the adapter has moved
    engine.loaded.clear()
    send(model, engine)
    check_engine(model, engine)


@pytest.mark.parametrize("options", GRIDS.values(), ids=GRIDS)
def test_grids_and_embeddings(options: dict):
    float_model = tiny()
    engine = Engine(float_model)
    targets = ["embed_tokens", "q_proj", "down_proj", "lm_head"]
    model = lrqat.random_adapter(float_model, target_modules=targets, **options)
    sync(model, engine)
    check_engine(model, engine)


def test_layers_without_the_merged_adapter_are_sent_too(method: ModuleType, two_adapters: PeftModel, grid_model):
    engine = Engine(grid_model)
    two_adapters.set_adapter("other")
    sync(two_adapters, engine)
    check_engine(two_adapters, engine)


def test_modules_to_save_are_sent(method: ModuleType, grid_model):
    engine = Engine(grid_model)
    model = method.random_adapter(copy.deepcopy(grid_model), modules_to_save=["lm_head"])
    train(model, IDS, steps=1)
    sync(model, engine)
    check_engine(model, engine)


class Casting(Engine):
    """vLLM's `load_weights` copies into what it has, of any dtype."""

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        super().load_weights([(name, weight.to(self._place(name).dtype)) for name, weight in weights])


def test_norms_of_a_bf16_model_are_sent(method: ModuleType):
    """They are fp32 in training; a cast gives what is served."""
    float_model = tiny("qwen3", dtype=torch.bfloat16)
    engine = Casting(float_model)
    model = method.random_adapter(float_model, modules_to_save=["norm"])
    train(model, IDS, lr=1e-3)
    sync(model, engine)
    check_engine(model, engine)
    served = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    sent = [name for name in engine.loaded if "norm" in name]
    assert len(sent) == 9
    assert all(torch.equal(engine.model.get_parameter(name), served[name]) for name in sent)


def test_one_layer_is_dense_at_a_time(method: ModuleType):
    """In the whole walk; the metadata of a server's first sync, which reads nothing, needs nothing."""
    for family in ("qwen2", "gpt2"):
        model = method.random_adapter(tiny(family, dtype=torch.float32))
        model.merge_adapter()
        dense = {n: p for n, p in model.named_parameters() if isinstance(p, ServedWeight)}
        largest = max(p.numel() * p.element_size() for p in dense.values())
        assert largest * 4 < sum(p.numel() * p.element_size() for p in dense.values())
        others = [p for p in model.parameters() if not isinstance(p, ServedWeight)]
        counted = LiveBytes([*others, *model.buffers()])
        with counted:
            assert sum(p.numel() for p in model.parameters()) > 0
        assert counted.peak == counted.start
        with counted:
            for parameter in dense.values():
                weight = parameter.data
                counted.sweep()
                assert counted.now - counted.start == weight.nbytes
                assert counted.peak - counted.start <= 5 * largest  # codes and fp32 levels of this one layer
                del weight
            counted.sweep()
        assert counted.now == counted.start


def test_rounded_inputs_are_refused_before_a_layer_is_sent(method: ModuleType, base):
    """A float engine would not round them."""
    engine = Engine(base)
    options = {"group_size": -1, "bits": 8, "act_bits": 8}
    model = method.random_adapter(base, **options)
    with pytest.raises(ValueError, match=r"act_bits.*another policy"):
        sync(model, engine)
    assert not any("proj" in name for name in engine.loaded)


def test_what_else_looks_at_a_merged_model(method: ModuleType, base, tmp_path):
    """Counting, moving, copying, pickling, saving, clipping, making an optimizer: as without the weights shown."""
    float_count = sum(p.numel() for p in base.parameters())
    model = method.random_adapter(base)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    trained = logits(model, IDS)
    model.merge_adapter()
    names = {name for name, _ in model.named_parameters() if name.endswith("proj.base_layer.weight")}
    assert len(names) == 14
    assert not names & model.state_dict().keys()
    own = {n: p for n, p in model.named_parameters() if model.prefix not in n}
    assert sum(p.numel() for p in own.values()) == float_count
    assert not any(p.requires_grad for p in own.values())

    model.save_pretrained(tmp_path / "merged")  # a Trainer's callback may
    before, merged = tensors(tmp_path / "before"), tensors(tmp_path / "merged")
    assert before.keys() == merged.keys()
    assert all(torch.equal(value, merged[name]) for name, value in before.items())

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.load_state_dict(model.state_dict())

    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for again in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert torch.equal(logits(again, IDS), trained)
        shown = dict(again.named_parameters())
        for name, parameter in model.named_parameters():
            if isinstance(parameter, ServedWeight):
                assert type(shown[name]) is ServedWeight
                assert torch.equal(shown[name].data, parameter.data)
        again.unmerge_adapter()
        assert torch.equal(logits(again, IDS), trained)

    half = copy.deepcopy(model).to(torch.bfloat16)
    assert {p.dtype for p in half.parameters() if isinstance(p, ServedWeight)} == {torch.bfloat16}
    model.unmerge_adapter()
    assert torch.equal(logits(model, IDS), trained)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_unloading_a_merged_model_leaves_the_files_as_they_are(method: ModuleType, tmp_path):
    for family in ("qwen2", "gpt2"):
        model = method.random_adapter(tiny(family))
        other = copy.deepcopy(model)
        other.merge_adapter()
        for name, found in (("at once", model), ("in two steps", other)):
            merged = found.merge_and_unload()
            assert not any(isinstance(p, ServedWeight) for p in merged.parameters())
            merged.save_pretrained(tmp_path / family / name)
        first, second = (tensors(tmp_path / family / name) for name in ("at once", "in two steps"))
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_layer_that_cannot_be_merged_leaves_all_unmerged(method: ModuleType, base):
    model = method.random_adapter(base)
    layers = list(method.layers(model).values())
    trained = logits(model, IDS)

    def fail(*args: object, **kwargs: object) -> None:
        raise ValueError("this one cannot")

    layers[-1].grid_tensor = fail
    with pytest.raises(ValueError, match="this one cannot"):
        model.merge_adapter()
    assert not any(layer.merged for layer in layers)
    assert torch.equal(logits(model, IDS), trained)


@pytest.mark.parametrize("fault", ["range", "finite", "dtype"])
def test_a_merge_that_ends_in_an_error_replaces_no_layer(method: ModuleType, fault: str):
    """What was trained would be gone with the layers that were replaced before the one that cannot be merged."""
    model = method.random_adapter(tiny(), learn_scales=True, scale_dtype="fp32" if fault == "dtype" else "auto")
    layers = method.layers(model)
    shift = next(p for n, p in list(layers.values())[-1].named_parameters() if "scale_shift" in n)
    if fault == "dtype":
        model = model.to(torch.bfloat16)
    else:
        shift.data.fill_(torch.nan if fault == "finite" else 1e30)
    trained = logits(model, IDS)
    with pytest.raises(ValueError, match=r"cannot (be merged|hold)|NaNs"):
        model.merge_and_unload(safe_merge=fault == "finite")
    assert method.layers(model) == layers
    assert not any(layer.merged for layer in layers.values())
    assert torch.equal(logits(model, IDS).nan_to_num(), trained.nan_to_num())


def test_without_an_adapter_there_is_nothing_to_merge_but_unloading_works(method: ModuleType, base):
    model = method.random_adapter(base)
    with model.disable_adapter():
        start = logits(model, IDS)
    model.delete_adapter("default")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"no adapter left to merge.*`unload\(\)`"):
            merge()
    assert torch.equal(logits(model.unload(), IDS), start)


def test_a_name_in_place_of_a_list_of_names_is_refused(method: ModuleType, base):
    model = method.random_adapter(base)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"`adapter_names` is 'default'.*\['default'\]"):
            merge(adapter_names="default")


def test_an_unknown_adapter_is_not_merged_as_none(method: ModuleType, base):
    model = method.random_adapter(base)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"no adapter 'typo'.*\['default'\]"):
            merge(adapter_names=["typo"])

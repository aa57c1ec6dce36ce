"""What is trained is what is served: training, merging and the reloaded file give the same logits, bit for bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_lrqat import can_export
from peft_lrqat.grid import Grid
from peft_lrqat.modules.packed import QuantizedLinear
from peft_lrqat.tuners.lrqat import LRQATLinear
from tests.files import read
from tests.grids import on_grid
from tests.models import adapted, logits, reload_clean, tiny, tokens, train

# qwen2 has biases on q, k and v; 40 columns of 3, 5 or 7 bits do not fill their last word
MODEL = {"num_hidden_layers": 1, "intermediate_size": 40}
LINEARS = 7


@dataclass(frozen=True)
class Case:
    dtype: str
    bits: int
    group_size: int
    symmetric: bool
    downcast: str | None = None
    container_bits: int | None = None
    scale_dtype: str = "auto"

    def __str__(self) -> str:
        share = {-1: "channel", 0: "tensor"}.get(self.group_size, f"group{self.group_size}")
        kind = "sym" if self.symmetric else "asym"
        inside = f"in{self.container_bits}" if self.container_bits else "packed"
        return f"{self.dtype}-w{self.bits}-{share}-{kind}-{self.downcast or 'default'}-{inside}-{self.scale_dtype}"

    @property
    def config(self) -> dict:
        # min-max is quicker, and at the lowest bits and in fp32 the search's clipping takes part
        ranges = "lp" if self.dtype == "float32" or self.bits == 2 else "minmax"
        fields = {name: value for name, value in vars(self).items() if name != "dtype" and value is not None}
        return {**fields, "range_method": ranges}


CASES = [
    # zero points are packed by the width of the codes, scales are laid out by what shares them: every width and every
    # granularity meets both kinds of grid
    *(Case("bfloat16", bits, group, sym) for bits, group, sym in (
        (2, -1, True), (2, 8, False), (3, 8, True), (3, 0, False),
        (4, 0, True), (4, -1, False), (8, 8, True), (8, 0, False))),
    *(Case(dtype, bits, group, sym)
      for dtype in ("float32", "float16")
      for bits, group, sym in ((2, 8, False), (3, -1, True), (4, 8, True), (4, 0, False), (8, -1, True))),
    *(Case("bfloat16", bits, -1, True) for bits in (5, 6, 7)),
    *(Case("float32", bits, group, sym, container_bits=4)
      for bits in (2, 3) for group, sym in ((8, True), (-1, False), (0, True))),
    *(Case("bfloat16", bits, 8, sym, container_bits=width)
      for bits, width in ((2, 4), (3, 4), (2, 8), (3, 8), (4, 8)) for sym in (True, False)),
    *(Case("bfloat16", 4, -1, True, downcast) for downcast in ("int", "bf16", "fp16", "fp32")),
    Case("float16", 8, 8, True, "fp16"),
    Case("float32", 4, -1, True, scale_dtype="fp32"),
    Case("float32", 3, 8, False, scale_dtype="fp16"),
    Case("bfloat16", 4, 8, True, scale_dtype="bf16"),
    Case("float16", 4, -1, True, scale_dtype="fp16"),
]  # fmt: skip


@dataclass
class Result:
    folder: Path
    trained: torch.Tensor
    merged: torch.Tensor
    start: torch.Tensor | None = None
    merge_adapter: torch.Tensor | None = None
    unmerged: torch.Tensor | None = None
    ends: int = 0
    scales: Sequence[torch.Tensor] = ()
    reloaded: torch.Tensor | None = None


def _run(case: Case, folder: Path) -> Result:
    ids = tokens()
    torch.manual_seed(0)
    model = adapted(tiny("qwen2", dtype=getattr(torch, case.dtype), **MODEL), **case.config)
    start = logits(model, ids)
    train(model, ids)
    trained = logits(model, ids)
    model.merge_adapter()
    merge_adapter = logits(model, ids)
    ends = 0
    for layer in (m.base_layer for m in model.modules() if isinstance(m, LRQATLinear)):
        lowest, highest = layer.codes.int().aminmax()
        # in a wider container, the ends of the grid are not the ends of the container
        assert lowest >= -(2 ** (case.bits - 1))
        assert highest <= 2 ** (case.bits - 1) - 1
        ends += int(lowest == -(2 ** (case.bits - 1))) + int(highest == 2 ** (case.bits - 1) - 1)
    model.unmerge_adapter()
    unmerged = logits(model, ids)
    merged_model = model.merge_and_unload()
    merged = logits(merged_model, ids)  # and saved after this forward
    merged_model.save_pretrained(folder)
    scales = [m.weight_scale for m in merged_model.modules() if isinstance(m, QuantizedLinear)]
    return Result(folder, trained, merged, start, merge_adapter, unmerged, ends, scales)


def _trained(family: str = "qwen2", tie: bool = False, **config):
    """An adapted and trained model of two layers, and its logits."""
    torch.manual_seed(0)
    model = tiny(family, dtype=torch.bfloat16, tie=tie)
    model.name_or_path = "someone/tiny-model"
    model = adapted(model, **{"bits": 4, "group_size": 8, "range_method": "minmax", **config})
    train(model, tokens())
    return model, logits(model, tokens())


def _sharded(folder: Path) -> Result:
    model, trained = _trained()
    merged = model.merge_and_unload()
    merged.save_pretrained(folder, max_shard_size="8KB")
    merged.save_pretrained(folder.with_name("whole"))
    return Result(folder, trained, logits(merged, tokens()))


def _tied(folder: Path) -> Result:
    model, trained = _trained("llama", tie=True)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    merged.save_pretrained(folder)
    return Result(folder, trained, logits(merged, tokens()))


def _left_out(folder: Path) -> Result:
    model, trained = _trained("llama", target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
    merged = model.merge_and_unload()
    merged.save_pretrained(folder)
    return Result(folder, trained, logits(merged, tokens()))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[Case | Callable, Result]:
    """Every case trained, merged and saved, then all of them loaded in one process that has no plugin."""
    work = tmp_path_factory.mktemp("checkpoints")
    found = {case: _run(case, work / str(case)) for case in CASES}
    found |= {make: make(work / make.__name__) for make in (_sharded, _tied, _left_out)}
    reloaded = reload_clean([result.folder for result in found.values()], tokens(), work)
    for result, again in zip(found.values(), reloaded, strict=True):
        result.reloaded = again
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
class TestExact:
    def test_trained_merged_and_reloaded_are_equal(self, results, case):
        result = results[case]
        assert torch.isfinite(result.trained).all()
        assert not torch.equal(result.start, result.trained)
        assert torch.equal(result.merge_adapter, result.trained)
        assert torch.equal(result.unmerged, result.trained)
        assert torch.equal(result.merged, result.trained)
        assert result.reloaded.dtype == getattr(torch, case.dtype)
        assert torch.equal(result.reloaded, result.trained)

    def test_the_case_reaches_the_ends_of_its_grid(self, results, case):
        assert results[case].ends > 0

    def test_scales_are_exact_in_every_dtype_promised(self, results, case):
        promised = {"auto": (torch.bfloat16, torch.float16), "bf16": (torch.bfloat16,), "fp16": (torch.float16,)}
        for scale in results[case].scales:
            assert scale.dtype == getattr(torch, case.dtype)
            for dtype in promised.get(case.scale_dtype, (torch.float32,)):
                assert torch.equal(scale.to(dtype).float(), scale.float())

    def test_the_file_holds_no_float_copy(self, results, case):
        tensors = read(results[case].folder)
        packed = [name for name in tensors if name.endswith(".weight_packed")]
        assert len(packed) == LINEARS
        bits = case.container_bits or case.bits
        for name in packed:
            module = name.removesuffix(".weight_packed")
            own = {key.removeprefix(module + ".") for key in tensors if key.startswith(module + ".")}
            expected = {"weight_packed", "weight_scale", "weight_shape"}
            expected |= set() if case.symmetric else {"weight_zero_point"}
            assert own - {"bias"} == expected
            out_features, in_features = tensors[module + ".weight_shape"].tolist()
            assert tensors[name].dtype == torch.int32
            assert tensors[name].shape == (out_features, -(-in_features * bits // 32))
            groups = in_features // case.group_size if case.group_size > 0 else 1
            assert tensors[module + ".weight_scale"].shape == (out_features, groups)
        floats = {n for n, t in tensors.items() if t.is_floating_point() and t.ndim == 2 and "weight_scale" not in n}
        assert floats == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("make", [_sharded, _tied, _left_out], ids=lambda make: make.__name__)
def test_other_ways_of_saving_are_exact_too(results, make):
    result = results[make]
    assert torch.equal(result.merged, result.trained)
    assert torch.equal(result.reloaded, result.trained)


def test_shards_hold_what_the_whole_file_holds(results):
    folder = results[_sharded].folder
    assert len(list(folder.glob("*.safetensors"))) > 3
    shards, whole = read(folder), read(folder.with_name("whole"))
    assert shards.keys() == whole.keys()
    assert all(torch.equal(shards[name], whole[name]) for name in whole)


def test_tied_embeddings_are_saved_once(results):
    assert "lm_head.weight" not in read(results[_tied].folder)


def test_layers_left_out_stay_float(results):
    folder = results[_left_out].folder
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.self_attn.q_proj" in config["ignore"]
    assert "model.layers.1.self_attn.q_proj" not in config["ignore"]
    assert sum(name.endswith("weight_packed") for name in read(folder)) == 2


def test_model_card(tmp_path):
    model, _ = _trained()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for said in (
        "base_model: someone/tiny-model",
        "tiny-model, 4 bits",
        "4 bits, symmetric, groups of 8",
        "pack-quantized, 4 bits",
        "14 linear layers",
        "rank 4, lora_alpha 32",
        "base kept as fx8",
    ):
        assert said in card
    (tmp_path / "README.md").write_text("my own words")
    merged.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"


def test_merging_draws_no_random_numbers_and_keeps_the_bias():
    model, _ = _trained()
    bias = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.bias
    before = torch.get_rng_state()
    merged = model.merge_and_unload()
    assert torch.equal(torch.get_rng_state(), before)
    assert merged.model.layers[0].self_attn.q_proj.bias is bias


def test_a_copy_of_the_merged_model_saves_itself_and_not_the_original(tmp_path):
    merged = _trained()[0].merge_and_unload()
    copied = copy.deepcopy(merged)
    copied.model.layers[0].self_attn.q_proj.weight_scale.mul_(2)
    copied.save_pretrained(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    assert torch.equal(read(tmp_path)[name], 2 * merged.state_dict()[name])
    assert (tmp_path / "README.md").exists()


def test_safe_merge_refuses_what_is_not_finite():
    model, trained = _trained()
    model.merge_adapter(safe_merge=True)
    assert torch.equal(logits(model, tokens()), trained)
    model.unmerge_adapter()
    model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)


def test_a_fresh_lora_trains_on_the_merged_model_and_cannot_be_merged_into_it():
    model, _ = _trained()
    merged = model.merge_and_unload()
    packed = {name: buffer.clone() for name, buffer in merged.named_buffers() if "weight_" in name}
    lora = get_peft_model(merged, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    ids = tokens(seed=5)
    losses = train(lora, ids, steps=10, lr=2e-2)
    assert losses[-1] < 0.8 * losses[0]
    after = {name: buffer for name, buffer in lora.get_base_model().named_buffers() if "weight_" in name}
    assert len(after) == len(packed) > 0
    assert all(torch.equal(a, b) for a, b in zip(after.values(), packed.values(), strict=True))
    for merge in (lora.merge_adapter, lora.merge_and_unload):
        for safe in (False, True):
            with pytest.raises(RuntimeError, match="quantized"):
                merge(safe_merge=safe)


@pytest.mark.parametrize("act", [None, "compressed-tensors"])
def test_a_cast_that_would_change_the_scales_leaves_them(act: str | None):
    model = on_grid(Grid(8, -1), dtype=torch.float32, scale_dtype="fp32", act=act)
    layer = model.model.layers[0].mlp.up_proj
    before = layer.grid_tensor()
    with pytest.warns(UserWarning, match=r"torch\.bfloat16 now, but scales.*transformers rounds them when it loads"):
        model.to(torch.bfloat16)
    assert torch.equal(layer.grid_tensor().scale, before.scale)
    assert layer.weight.dtype == layer.info.dtype == torch.bfloat16
    assert not can_export(model)
    model = on_grid(Grid(8, -1), dtype=torch.float32, act=act).to(torch.bfloat16)  # "auto": bf16 holds them
    assert model.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.bfloat16

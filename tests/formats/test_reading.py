"""Foreign folders: every road reads the same integers, scales and zero points, or refuses before it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from peft_lrqat import Grid, can_export, export, load_quantized
from peft_lrqat.checkpoint.inspect import inspect
from peft_lrqat.checkpoint.open import open_source
from peft_lrqat.checkpoint.verify import verify
from peft_lrqat.modules.packed import MERGED
from peft_lrqat.ops.activations import Activations
from tests.grids import on_grid
from tests.models import logits, tokens
from tests.quantized_files import Spec, quantization_config, write

IDS, INT8 = tokens(), Activations("compressed-tensors")
LAYER = "model.layers.0.mlp.up_proj"
_MIXED = {
    "config_groups": {
        "group_0": {
            **quantization_config(Spec("packed", 4, 32))["config_groups"]["group_0"],
            "targets": ["re:.*self_attn"],
        },
        "group_1": quantization_config(Spec("packed", 8, -1))["config_groups"]["group_0"],
    }
}


@dataclass(frozen=True)
class Folder:
    """A foreign checkpoint."""

    spec: Spec
    other: dict[str, Spec] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    def __str__(self) -> str:
        return self.name or str(self.spec)

    def write(self, folder: Path) -> nn.Module:
        return write(folder, self.spec, self.other, **self.config)


FOLDERS = [
    Folder(Spec("packed", 3, 16)),
    Folder(Spec("packed", 4, 32, symmetric=False)),
    Folder(Spec("packed", 4, 0)),
    Folder(Spec("integers", 8, 32, symmetric=False)),
    Folder(Spec("gptq", 4, 32)),
    Folder(Spec("gptq", 4, 32, symmetric=False)),
    Folder(Spec("gptq", 4, 32, symmetric=False), config={"sym": True}, name="gptq, zero points off the middle"),
    Folder(Spec("gptq_v2", 3, -1, symmetric=False)),
    Folder(
        Spec("gptq", 4, 32), {"down_proj": Spec("gptq", 8, 32)}, {"dynamic": {"+:.*down_proj": {"bits": 8}}}, "dynamic"
    ),
    Folder(
        Spec("gptq", 4, 32),
        {"down_proj": Spec("gptq", 4, 16, symmetric=False)},
        {"dynamic": {"-:.*lm_head": {}, r".*down_proj": {"group_size": 16, "sym": False}}},
        "dynamic groups",
    ),
    Folder(Spec("awq", 4, 32)),
    Folder(Spec("awq", 4, 16, symmetric=False)),
    Folder(Spec("packed", 8, -1), {"self_attn": Spec("packed", 4, 32)}, _MIXED, "mixed grids"),
]


def of_modules(model: nn.Module) -> dict[str, Any]:
    return {name: module.grid_tensor() for name, module in model.named_modules() if isinstance(module, MERGED)}


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_every_road_reads_the_same(folder: Folder, tmp_path: Path):
    float_model = folder.write(tmp_path / "base")
    expected = logits(float_model, IDS)
    loaded = load_quantized(tmp_path / "base")
    assert torch.equal(logits(loaded, IDS), expected)

    source, modules = open_source(tmp_path / "base"), of_modules(loaded)
    assert source.grids().keys() == modules.keys()
    for name, here in modules.items():
        there = source.layer(name)
        assert there.grid == here.grid == source.grids()[name].grid
        assert torch.equal(there.codes, here.codes)
        assert torch.equal(there.scale, here.scale)
        assert (there.zero_point is None) == (here.zero_point is None) == there.grid.symmetric
        assert there.zero_point is None or torch.equal(there.zero_point, here.zero_point)
        assert torch.equal(there.dequantize(loaded.dtype), float_model.get_submodule(name).weight)
    said = inspect(tmp_path / "base").grid
    assert all(info.grid.describe() in said for info in source.grids().values())

    report = export(tmp_path / "base", tmp_path / "out", progress=False)
    assert report.loss is None
    assert torch.equal(logits(load_quantized(tmp_path / "out"), IDS), expected)
    assert verify(tmp_path / "out", against=tmp_path / "base", engine=False)
    assert open_source(tmp_path / "out").grids() == source.grids()


def test_int8_activations_are_read_as_they_are(tmp_path: Path):
    write(tmp_path / "base", Spec("w8a8", 8, -1))
    loaded = load_quantized(tmp_path / "base")
    assert {module.activations for module in loaded.modules() if isinstance(module, MERGED)} == {INT8}
    assert open_source(tmp_path / "base").activations() == {INT8}
    export(tmp_path / "base", tmp_path / "out", progress=False)
    assert torch.equal(logits(load_quantized(tmp_path / "out"), IDS), logits(loaded, IDS))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (Spec("packed", 4, 32), {"num_bits": 8, "strategy": "token"}),
        (Spec("packed", 3, -1), {"num_bits": 4, "strategy": "group", "group_size": 16}),
        (Spec("w8a8", 4, 32), {"num_bits": 8, "strategy": "token"}),
    ],
    ids=["W4A8", "W3A4 in groups", "W4A8 as int8 codes"],
)
def test_activations_beside_any_weights_are_those_of_transformers(spec: Spec, said: dict, tmp_path: Path):
    write(tmp_path, spec)
    config = json.loads((tmp_path / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["format"] = config["quantization_config"]["format"]
    group["input_activations"] = {"type": "int", "symmetric": True, "dynamic": True, **said}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, there = load_quantized(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(logits(loaded, IDS), logits(there, IDS))
    del config["quantization_config"]["config_groups"]["group_0"]["input_activations"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not torch.equal(logits(loaded, IDS), logits(load_quantized(tmp_path), IDS))


@pytest.mark.parametrize(("format", "grid", "act"), [
    ("bitnet", Grid(1.58, 0), "bitnet"),
    ("torchao", Grid(3, 32, False), None),
    ("gptq", Grid(2, 32), None),
    ("compressed-tensors", Grid(4, 0), "compressed-tensors"),
])  # fmt: skip
def test_our_own_folders_load(format: str, grid: Grid, act: str | None, tmp_path: Path):
    model = on_grid(grid, act=act, dtype=torch.float32, scale_dtype="fp16")
    export(model, tmp_path / "out", format, progress=False)
    loaded = load_quantized(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))
    assert {module.grid for module in loaded.modules() if isinstance(module, MERGED)} == {grid}


def test_scales_that_the_models_dtype_does_not_hold_are_not_rounded_in_silence(tmp_path: Path):
    write(tmp_path / "base", Spec("gptq", 4, 32, dtype=torch.bfloat16, scale_dtype=torch.float16))
    check = can_export(tmp_path / "base")
    assert not check
    assert "scales are not exact in bfloat16" in str(check)
    assert can_export(tmp_path / "base", "gptq")  # which keeps fp16 scales


# -- damage


def _edit(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return edit


def _set(part: str, value: float) -> Callable[[Path], None]:
    return _edit(lambda state: state[f"{LAYER}.{part}"].view(-1)[:1].fill_(value))


def _drop(*names: str) -> Callable[[Path], None]:
    return _edit(lambda state: [state.pop(name) for name in names])


def _replace(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return _edit(lambda state: state.update({f"{LAYER}.{part}": change(state[f"{LAYER}.{part}"]).contiguous()}))


def _zeros(part: str) -> Callable[[Path], None]:
    return _replace(part, torch.zeros_like)


_GPTQ, _PACKED, _INT8 = (
    Spec("gptq", 4, 32, symmetric=False),
    Spec("packed", 4, 32, symmetric=False),
    Spec("w8a8", 8, -1),
)
DAMAGE = {
    "a scale is infinite": (_GPTQ, _set("scales", float("inf")), "infinite"),
    "a scale is NaN": (_PACKED, _set("weight_scale", float("nan")), "NaN"),
    "a scale is zero": (_GPTQ, _set("scales", 0.0), "scales of zero whose codes"),
    "all scales are zero": (_PACKED, _zeros("weight_scale"), "only scales of zero"),
    "scales of another shape": (_GPTQ, _replace("scales", lambda t: t[:1]), "of shape|cannot be read"),
    "scales of a dtype without fractions": (_INT8, _replace("weight_scale", lambda t: t.to(torch.int32)), "dtype"),
    "zero points of another shape": (_GPTQ, _replace("qzeros", lambda t: t[:1]), "zero points of shape|cannot be read"),
    "no scales": (_GPTQ, _drop(f"{LAYER}.scales"), "cannot be read.*'scales'"),
    "no zero points": (_GPTQ, _drop(f"{LAYER}.qzeros"), "cannot be read.*'qzeros'"),
    "no packed zero points": (_PACKED, _drop(f"{LAYER}.weight_zero_point"), "cannot be read.*weight_zero_point"),
    "no codes": (_GPTQ, _drop(f"{LAYER}.qweight"), "cannot be read.*qweight"),
    "no layer": (_PACKED, _edit(lambda s: [s.pop(n) for n in list(s) if n.startswith(LAYER)]), "missing.*up_proj"),
    "no head": (_GPTQ, _drop("lm_head.weight"), "missing.*lm_head"),
    "no norm": (_PACKED, _drop("model.norm.weight"), "missing.*model.norm"),
    "other codes than scales": (_GPTQ, _replace("qweight", lambda t: t[:, :32]), "cannot be read|needs|codes are"),
    "a tensor that nobody knows": (
        _PACKED,
        _edit(lambda s: s.update({f"{LAYER}.weight_global_scale": torch.ones(1)})),
        "'weight_global_scale', which cannot be read",
    ),
    "inputs in another order": (_GPTQ, _replace("g_idx", lambda t: t.flip(0)), "by activation order"),
    "a bias that the layer has not": (
        _GPTQ, _edit(lambda s: s.update({f"{LAYER}.bias": torch.ones(96, dtype=torch.float16)})), "bias"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_is_refused_before_anything_is_written(what: str, tmp_path: Path):
    spec, damage, match = DAMAGE[what]
    write(tmp_path / "base", spec)
    damage(tmp_path / "base")
    for read in (load_quantized, inspect, lambda folder: export(folder, tmp_path / "out", progress=False)):
        with pytest.raises(ValueError, match=match):
            read(tmp_path / "base")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_bias_of_zeros_that_the_layer_has_not_is_left_out(tmp_path: Path):
    expected = logits(write(tmp_path / "base", _GPTQ), IDS)
    _edit(lambda s: s.update({f"{LAYER}.bias": torch.zeros(96, dtype=torch.float16)}))(tmp_path / "base")
    assert torch.equal(logits(load_quantized(tmp_path / "base"), IDS), expected)
    export(tmp_path / "base", tmp_path / "out", progress=False)
    assert f"{LAYER}.bias" not in load_file(tmp_path / "out" / "model.safetensors")


def test_files_beside_the_checkpoint_do_not_count(tmp_path: Path):
    expected = logits(write(tmp_path / "base", _GPTQ), IDS)
    state = load_file(tmp_path / "base" / "model.safetensors")
    state[f"{LAYER}.scales"] *= 2
    save_file(state, tmp_path / "base" / "model_backup.safetensors", {"format": "pt"})
    export(tmp_path / "base", tmp_path / "out", progress=False)
    assert torch.equal(logits(load_quantized(tmp_path / "out"), IDS), expected)


def test_an_index_that_does_not_fit_its_files(tmp_path: Path):
    write(tmp_path / "base", Spec("gptq", 4, 32))
    export(tmp_path / "base", tmp_path / "shards", "gptq", max_shard_size="20KB", progress=False)
    index = tmp_path / "shards" / "model.safetensors.index.json"
    described = json.loads(index.read_text())
    described["weight_map"][f"{LAYER}.more"] = described["weight_map"][f"{LAYER}.scales"]
    index.write_text(json.dumps(described))
    with pytest.raises(ValueError, match=f"do not hold: {LAYER}.more"):
        open_source(tmp_path / "shards")
    index.unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors\.index\.json that names them"):
        open_source(tmp_path / "shards")


def test_a_record_that_is_not_the_files_is_refused(tmp_path: Path):
    write(tmp_path / "base", Spec("packed", 4, 32))
    described = json.loads((tmp_path / "base" / "config.json").read_text())
    for entry, match in (
        ({"bits": 3, "group_size": 32, "symmetric": True}, "outside of the grid"),
        ({"bits": 4, "group_size": -1, "symmetric": True}, "scales differ within"),
        ({"bits": 4, "group_size": 32, "symmetric": False}, None),
        ({"bits": 8, "group_size": 32, "symmetric": True}, "Delete the entry 'peft_lrqat'"),
    ):
        described["peft_lrqat"] = entry
        (tmp_path / "base" / "config.json").write_text(json.dumps(described))
        for read in (load_quantized, lambda folder: [open_source(folder).layer(name) for name in (LAYER,)]):
            if match is None:
                read(tmp_path / "base")
            else:
                with pytest.raises(ValueError, match=match):
                    read(tmp_path / "base")


def test_a_tensor_where_the_index_does_not_place_it(tmp_path: Path):
    write(tmp_path / "base", Spec("gptq", 4, 32))
    export(tmp_path / "base", tmp_path / "out", "gptq", max_shard_size="20KB", progress=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    name = f"{LAYER}.scales"
    other = next(file for file in sorted(set(index.values())) if file != index[name])
    state = load_file(tmp_path / "out" / other)
    for extra, match in ((name, "twice in the files|does not place it"), ("nobody.knows", "does not place it")):
        save_file({**state, extra: torch.ones(2, 96)}, tmp_path / "out" / other, {"format": "pt"})
        for read in (open_source, load_quantized):
            with pytest.raises(ValueError, match=match):
                read(tmp_path / "out")


def test_a_quantized_head_that_is_tied(tmp_path: Path):
    write(tmp_path / "base", Spec("packed", 4, 32))
    described = json.loads((tmp_path / "base" / "config.json").read_text())
    described["tie_word_embeddings"] = True
    (tmp_path / "base" / "config.json").write_text(json.dumps(described))
    head = {key: value for key, value in load_file(tmp_path / "base" / "model.safetensors").items() if LAYER in key}
    _edit(lambda s: s.update({key.replace(LAYER, "lm_head"): value for key, value in head.items()}))(tmp_path / "base")
    for read in (open_source, load_quantized):
        with pytest.raises(ValueError, match="Untie it: set `tie_word_embeddings` to false"):
            read(tmp_path / "base")


def test_completeness_does_not_hang_on_the_name_of_the_architecture(tmp_path: Path):
    write(tmp_path / "base", Spec("packed", 4, 32))
    _drop("lm_head.weight")(tmp_path / "base")
    described = json.loads((tmp_path / "base" / "config.json").read_text())
    del described["architectures"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="missing"):
        open_source(tmp_path / "base")


def test_the_callers_configuration_is_not_changed(tmp_path: Path):
    from transformers import AutoConfig

    expected = logits(write(tmp_path, Spec("gptq", 4, 32)), IDS)
    config = AutoConfig.from_pretrained(tmp_path)
    for _ in range(2):
        assert torch.equal(logits(load_quantized(tmp_path, config=config, use_safetensors=True), IDS), expected)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_config_is_named(text: str, tmp_path: Path):
    write(tmp_path, Spec("gptq", 4, 32))
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        open_source(tmp_path)


def test_layers_as_wide_as_a_group_are_on_the_grid_of_the_others(tmp_path: Path):
    write(
        tmp_path, Spec("gptq", 4, 64), {"down_proj": Spec("gptq", 4, 32)}, dynamic={".*down_proj": {"group_size": 32}}
    )
    grids = {info.grid for info in open_source(tmp_path).grids().values()}
    assert grids == {Grid(4, 64), Grid(4, 32)}


def test_version_2_of_gptq_that_does_not_say_so(tmp_path: Path):
    write(tmp_path, Spec("gptq_v2", 4, 32), checkpoint_format=None)
    for read in (open_source, load_quantized):
        with pytest.raises(ValueError, match='of version "gptq_v2" and does not say so'):
            read(tmp_path)

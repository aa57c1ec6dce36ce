"""Low-bit SR, and whatever rounds activations: trained integers, merged and reloaded by plain transformers, give equal
logits for every width, container and format."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from peft_lrqat import calibrate_activations
from peft_lrqat.grid import GridTensor
from peft_lrqat.modules.packed import MERGED, QuantizedLinear
from peft_lrqat.modules.rounded_input import BitNetLinear, Int8Linear
from peft_lrqat.ops import mean_code
from peft_lrqat.tuners.lowbit_sr import LowBitSRLinear
from peft_lrqat.tuners.lrqat import LRQATLinear
from tests.files import read
from tests.models import adapted, logits, low_bit, reload_clean, tiny, tokens, train

# qwen2 has biases on q, k and v; 40 columns of 3 bits do not fill their last word
MODEL = {"num_hidden_layers": 1, "intermediate_size": 40}
ALL_EIGHT = {"act_bits": 8, "group_size": 0}


@dataclass(frozen=True)
class Case:
    dtype: str
    options: dict = field(hash=False)
    family: str = "qwen2"
    method: str = "low_bit"

    def __str__(self) -> str:
        words = [] if self.method == "low_bit" else [self.method]
        return "-".join([self.dtype, *words, *(f"{key}={value}" for key, value in self.options.items())])

    @property
    def bits(self) -> float:
        return self.options.get("forward_bits", self.options["bits"])


CASES = [
    *(Case("bfloat16", {"bits": bits, "group_size": g}) for bits in (1.58, 2, 3, 4, 8) for g in (-1, 8, 0)),
    *(Case("bfloat16", {"bits": 1.58, "group_size": 0, "container_bits": width}) for width in (4, 8)),
    *(Case("float32", {"bits": bits, "learn_scales": True}) for bits in (1.58, 3, 8)),
    Case("float16", {"bits": 4, "learn_scales": True, "group_size": 8}),
    Case("bfloat16", {"bits": 3, "container_bits": 4}),
    Case("float32", {"bits": 8, "forward_bits": 1.58}),
    Case("bfloat16", {"bits": 4, "forward_bits": 1.58, "learn_scales": True, "container_bits": 4}),
    Case("float32", {"bits": 8, "act_bits": 8}),
    Case("bfloat16", {"bits": 4, "act_bits": 8, "learn_scales": True}),
    Case("bfloat16", {"bits": 4, "act_bits": 8, "container_bits": 8}),
    Case("float32", {"bits": 8, "act_bits": 8, "act_scale": "static"}),
    Case("bfloat16", {"bits": 4, "group_size": 8, "act_bits": 4, "act_group_size": 8}),
    Case("float32", {"bits": 3, "act_bits": 4, "act_bits_pattern": {"down_proj": 8, ".*attn.*": None}}),
    Case("bfloat16", {"bits": 1.58, "act_bits": 8, "group_size": 0, "export_format": "compressed-tensors"}),
    Case("float32", {"bits": 1.58, **ALL_EIGHT}, "llama"),
    Case("bfloat16", {"bits": 1.58, "learn_scales": True, **ALL_EIGHT}, "llama"),
    Case("bfloat16", {"bits": 8, "forward_bits": 1.58, **ALL_EIGHT}, "llama"),
    # LR-QAT with 8-bit activations is stored in the same way
    *(
        Case(dtype, {"bits": bits, "group_size": -1, "act_bits": 8}, method="lrqat")
        for dtype in ("bfloat16", "float32")
        for bits in (2, 4, 8)
    ),
    Case("float16", {"bits": 4, "group_size": -1, "act_bits": 8, "downcast": "int"}, "llama", method="lrqat"),
    Case("bfloat16", {"bits": 4, "group_size": 8, "act_bits": 8}, method="lrqat"),
    Case("float32", {"bits": 4, "group_size": 8, "act_bits": 4, "act_group_size": 8}, method="lrqat"),
    Case("bfloat16", {"bits": 5, "group_size": 8, "act_bits": 4, "act_bits_pattern": {"down_proj": 8}}, method="lrqat"),
    Case("bfloat16", {"bits": 8, "act_bits": 4, "act_bits_pattern": {"down_proj": 8, "q_proj": 16}}, method="lrqat"),
]


@dataclass
class Result:
    folder: Path
    trained: torch.Tensor
    merged: torch.Tensor
    kinds: set[type]
    ends: tuple[int, int]
    start: torch.Tensor
    reloaded: torch.Tensor | None = None


def _run(case: Case, folder: Path) -> Result:
    torch.manual_seed(0)
    make = low_bit if case.method == "low_bit" else adapted
    model = make(tiny(case.family, dtype=getattr(torch, case.dtype), **MODEL), **case.options).eval()
    if "act_scale" in case.options:
        calibrate_activations(model, [tokens()])
    start = logits(model, tokens())
    train(model, tokens(), lr=2e-2)
    trained = logits(model, tokens())
    model.merge_adapter()
    assert torch.equal(logits(model, tokens()), trained)
    codes = [m.base_layer.codes.int() for m in model.modules() if isinstance(m, (LowBitSRLinear, LRQATLinear))]
    ends = min(int(c.min()) for c in codes), max(int(c.max()) for c in codes)
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens()), trained)
    merged_model = model.merge_and_unload()
    merged = logits(merged_model, tokens())  # and saved after this forward
    merged_model.save_pretrained(folder)
    kinds = {type(m) for m in merged_model.modules() if isinstance(m, MERGED)}
    return Result(folder, trained, merged, kinds, ends, start)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Result]:
    """Every case trained, merged and saved, then all of them loaded in one process that has no plugin."""
    work = tmp_path_factory.mktemp("checkpoints")
    found = {str(case): _run(case, work / str(i)) for i, case in enumerate(CASES)}
    reloaded = reload_clean([result.folder for result in found.values()], tokens(), work)
    for result, again in zip(found.values(), reloaded, strict=True):
        result.reloaded = again
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_trained_merged_and_reloaded_are_equal(results, case: Case):
    result = results[str(case)]
    assert torch.isfinite(result.trained).all()
    assert not torch.equal(result.start, result.trained)
    assert torch.equal(result.merged, result.trained)
    assert result.reloaded.dtype == getattr(torch, case.dtype)
    assert torch.equal(result.reloaded, result.trained)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_file_holds_integers_of_the_grid_and_no_float_copy(results, case: Case):
    result, options = results[str(case)], case.options
    low, high = (-1, 1) if case.bits == 1.58 else (-(2 ** (case.bits - 1)), 2 ** (case.bits - 1) - 1)
    assert low <= result.ends[0] < 0 < result.ends[1] <= high
    tensors = read(result.folder)
    described = json.loads((result.folder / "config.json").read_text())["quantization_config"]
    names = [name for name in tensors if name.endswith("down_proj.weight_scale")]
    down = names[0].removesuffix(".weight_scale")
    if "export_format" not in options and options.get("act_bits") and options.get("group_size") == 0:
        assert result.kinds == {BitNetLinear}
        assert described["quant_method"] == "bitnet"
        assert tensors[down + ".weight"].dtype == torch.uint8
        assert tensors[down + ".weight"].shape == (32 // 4, 40)
    elif options.get("act_bits") and 8 in (case.bits, options.get("container_bits")):
        mixed = "act_bits_pattern" in options
        assert result.kinds == ({Int8Linear, QuantizedLinear} if mixed else {Int8Linear})
        if mixed:
            assert described["format"] == "mixed-precision"
            return
        assert described["format"] == "int-quantized"
        assert tensors[down + ".weight"].dtype == torch.int8
    else:
        width = options.get("container_bits") or (2 if case.bits == 1.58 else case.bits)
        assert result.kinds == {QuantizedLinear}
        assert {group["weights"]["num_bits"] for group in described["config_groups"].values()} == {width}
        assert {group["format"] for group in described["config_groups"].values()} == {"pack-quantized"}
        found = {
            group["input_activations"] and group["input_activations"]["num_bits"]
            for group in described["config_groups"].values()
        }
        assert found == {options.get("act_bits"), *options.get("act_bits_pattern", {}).values()}
        assert tensors[down + ".weight_packed"].shape == (32, -(-40 * width // 32))
    floats = {n for n, t in tensors.items() if t.is_floating_point() and t.ndim == 2 and "weight_scale" not in n}
    assert floats == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("make", [low_bit, adapted])
def test_rounded_activations_are_equal_under_autocast(make):
    model = make(tiny(), bits=4, group_size=-1, act_bits=8)
    train(model, tokens(), lr=2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = logits(model, tokens())
        assert torch.equal(logits(model.merge_and_unload(), tokens()), trained)


@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 4, "learn_scales": True, "group_size": 8}], ids=str)
def test_a_merge_reads_the_codes_once_for_the_scales_of_a_ternary_forward(options: dict, monkeypatch):
    model = low_bit(tiny(**MODEL), **options, forward_bits=1.58)
    layers = {
        name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, LowBitSRLinear)
    }

    def stored() -> dict[str, GridTensor]:
        return {name: layer.grid_tensor() for name, layer in layers.items()}

    train(model, tokens(), lr=2e-2)
    model.merge_adapter()  # which must not leave anything of these codes behind
    before = stored()
    model.unmerge_adapter()
    train(model, tokens(), lr=2e-2)
    after = stored()
    assert any(not torch.equal(before[name].scale, weight.scale) for name, weight in after.items())

    read = Counter()

    def counted(packed: torch.Tensor, *shape: int) -> torch.Tensor:
        read[packed.data_ptr()] += 1
        return mean_code(packed, *shape)

    monkeypatch.setattr("peft_lrqat.tuners.lowbit_sr.layer.mean_code", counted)
    codes = [layer.lowbitsr_weight["default"].weight.packed for layer in layers.values()]
    merged = model.merge_and_unload(safe_merge=True)
    assert read == {packed.data_ptr(): 1 for packed in codes}
    for name, weight in after.items():
        again = merged.get_submodule(name).grid_tensor()
        assert torch.equal(again.codes, weight.codes)
        assert torch.equal(again.scale, weight.scale)


@pytest.mark.parametrize("learn_scales", [False, True])
def test_a_weight_that_is_stored_or_shown_has_its_codes_read_once_for_its_scales(learn_scales: bool, monkeypatch):
    model = low_bit(tiny(**MODEL), bits=8, forward_bits=1.58, learn_scales=learn_scales)
    layer = next(module for module in model.modules() if isinstance(module, LowBitSRLinear))
    expected = layer.grid_tensor()
    read = []
    monkeypatch.setattr(
        "peft_lrqat.tuners.lowbit_sr.layer.mean_code", lambda *given: read.append(0) or mean_code(*given)
    )
    assert torch.equal(layer.grid_tensor().codes, expected.codes)
    assert torch.equal(layer.weight, expected.dequantize(torch.float32))
    assert len(read) == 2


def test_a_base_with_rounded_activations_is_the_model_at_step_0():
    model = adapted(tiny(), bits=4, act_bits=8)  # the group size follows
    assert model.peft_config["default"].group_size == -1
    start = logits(model, tokens())
    weights_only = logits(adapted(tiny(), bits=4, group_size=-1), tokens())
    assert not torch.equal(start, weights_only)
    train(model, tokens())
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens()), start)


def test_the_card_says_what_was_done(tmp_path: Path):
    model = tiny()
    model.name_or_path = "someone/tiny-model"
    adapted = low_bit(model, bits=8, forward_bits=1.58, learn_scales=True)
    adapted.merge_and_unload().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for said in (
        "trained with Low-bit SR",
        "ternary, per channel",
        "pack-quantized, 2 bits",
        "8-bit codes",
        "2412.04787",
    ):
        assert said in card, card

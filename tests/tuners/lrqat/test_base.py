import copy
import io

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_lrqat import LRQATConfig, chunks
from peft_lrqat.grid import Grid, dequantize, grouped, quantize
from peft_lrqat.ops.reference import codes
from peft_lrqat.ops.stored_base import DOWNCASTS, decode_base
from peft_lrqat.tuners.common import undo
from peft_lrqat.tuners.common.frozen import FrozenWeight
from peft_lrqat.tuners.common.packed_parameter import packed_state_dict
from tests.memory import LiveBytes
from tests.models import adapted, logits, tiny, tokens, train

OUT, IN = 24, 40
KINDS = [(bits, kind) for bits in (2, 3, 4, 7, 8) for kind in DOWNCASTS if (bits, kind) != (8, "fx8")]


def linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(IN, OUT, bias=bias)
    nn.init.normal_(layer.weight, std=0.02)
    return layer.to(dtype)


def freeze(layer: nn.Module, bits: int = 4, group_size: int = -1, symmetric: bool = True, kind: str = "fx8", **kwargs):
    return FrozenWeight.of_floats(layer, Grid(bits, group_size, symmetric), kind, **kwargs)


def stored_codes(frozen: FrozenWeight) -> torch.Tensor:
    return codes(frozen.base, None, None, frozen.fmt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lp", "minmax"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [8, -1, 0])
@pytest.mark.parametrize(("bits", "kind"), [k for k in KINDS if k[1] in ("fx8", "int", "fp32")])
def test_stored_base_rounds_to_the_codes_of_the_weight(bits, kind, group_size, symmetric, method, dtype):
    layer = linear(dtype)
    frozen = freeze(layer, bits, group_size, symmetric, kind, range_method=method)
    levels = grouped(layer.weight.detach().float(), frozen.scale0) / frozen.scale0.unsqueeze(-1)
    expected = quantize(layer.weight.detach(), frozen.scale0, frozen.zero_point, frozen.grid)
    tied = ((levels - levels.floor()) == 0.5).view(OUT, IN)
    found = stored_codes(frozen)
    assert torch.equal(found[~tied], expected[~tied])
    # a weight in the very middle of two levels is as near to the one as to the other
    assert ((found - expected).abs() <= 1).all()
    assert tied.float().mean() < 0.2


@pytest.mark.parametrize("bits", range(2, 8))
def test_fx8_never_lies_on_a_tie(bits):
    """The smallest adapter would flip a code that does, and backends would disagree about it."""
    frozen = freeze(linear(), bits, kind="fx8")
    levels = decode_base(frozen.base, frozen.fmt)
    assert frozen.base.dtype == torch.int8
    assert frozen.base.shape == (OUT, IN)
    assert ((levels - levels.floor() - 0.5).abs() >= 2.0 ** (bits - 9)).all()


@pytest.mark.parametrize(("bits", "kind"), KINDS)
def test_bytes_kept(bits, kind):
    frozen = freeze(linear(), bits, kind=kind)
    row = {"fx8": IN, "int": -(-IN * bits // 32) * 4, "bf16": 2 * IN, "fp16": 2 * IN, "fp32": 4 * IN}[kind]
    assert frozen.base.nbytes == OUT * row
    assert not frozen.base.is_floating_point()
    assert not any(p.requires_grad for name, p in frozen.named_parameters() if name != "bias")


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
def test_float_kinds_are_that_dtype_in_grid_steps(kind):
    layer = linear()
    frozen = freeze(layer, kind=kind)
    levels = layer.weight.detach() / frozen.scale0
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[kind]
    assert torch.equal(decode_base(frozen.base, frozen.fmt), levels.to(dtype).float())


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double", "float"])
@pytest.mark.parametrize("kind", DOWNCASTS)
def test_no_dtype_conversion_changes_a_bit(kind, convert):
    frozen = freeze(linear(), symmetric=False, kind=kind)
    before = {name: p.detach().clone() for name, p in frozen.named_parameters() if name != "bias"}
    checksum, scale = frozen.checksum(), frozen.scale0.clone()
    getattr(frozen, convert)()
    after = dict(frozen.named_parameters())
    assert len(before) == 3
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)
    assert frozen.checksum() == checksum
    assert frozen.scale0.dtype == torch.float32
    assert torch.equal(frozen.scale0, scale)


@pytest.mark.parametrize("kind", DOWNCASTS)
def test_checksum_tells_bases_apart(kind):
    frozen = freeze(linear(), symmetric=False, kind=kind)
    own = int(frozen.checksum())
    assert int(copy.deepcopy(frozen).checksum()) == own
    found = {own}
    changes = [
        lambda f: f.base.data[3, 2].bitwise_xor_(1),
        lambda f: f.base.data.copy_(f.base.data.roll(1, 0)),
        lambda f: f.base.data.copy_(f.base.data.roll(1, 1)),
        lambda f: f.base.data.copy_(f.base.data.flip(0)),
        lambda f: f.scale0_bits.data[5].bitwise_xor_(1 << 16),
        lambda f: f.zero_point.data[7].add_(1),
        lambda f: f.zero_point.data.copy_(f.zero_point.data.roll(1, 0)),
    ]
    for change in changes:
        other = copy.deepcopy(frozen)
        change(other)
        found.add(int(other.checksum()))
    assert len(found) == 1 + len(changes)


def test_checksum_does_not_depend_on_the_chunks(monkeypatch):
    frozen = freeze(linear())
    whole = int(frozen.checksum())
    monkeypatch.setattr(chunks, "CPU_CHUNK", 7 * IN)
    assert int(frozen.checksum()) == whole
    assert int(freeze(linear()).checksum()) != whole


@pytest.mark.parametrize("group_size", [8, -1, 0])
def test_conversion_does_not_depend_on_the_chunks(monkeypatch, group_size):
    layer = linear(torch.bfloat16)
    whole = freeze(layer, group_size=group_size, symmetric=False)
    monkeypatch.setattr(chunks, "CPU_CHUNK", 7 * IN)
    parts = freeze(layer, group_size=group_size, symmetric=False)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_is_the_rounded_weight(dtype):
    layer = linear(dtype)
    frozen = freeze(layer, group_size=8)
    expected = dequantize(stored_codes(frozen), frozen.scale0, None, dtype)
    assert frozen.weight.dtype == dtype
    assert torch.equal(frozen.weight, expected)
    x = torch.randn(3, IN, dtype=dtype)
    assert torch.equal(frozen(x), nn.functional.linear(x, expected, layer.bias))


def test_conv1d_is_held_transposed():
    layer = Conv1D(OUT, IN)
    same = nn.Linear(IN, OUT)
    same.weight.data, same.bias = layer.weight.data.t().contiguous(), layer.bias
    held, other = freeze(layer, group_size=8, transposed=True), freeze(same, group_size=8)
    assert held.checksum() == other.checksum()
    assert torch.equal(held.weight, other.weight.t())
    assert held.weight.shape == layer.weight.shape


def test_state_dicts_speak_of_a_float_weight_or_of_what_is_stored():
    layer = linear()
    frozen = freeze(layer, symmetric=False)
    assert frozen.state_dict().keys() == {"weight", "bias"}
    assert torch.equal(frozen.state_dict()["weight"], frozen.weight)
    before = frozen.checksum()
    frozen.load_state_dict(frozen.state_dict())
    assert frozen.checksum() == before
    with packed_state_dict():
        packed = frozen.state_dict()
    assert packed.keys() == {"base", "scale0_bits", "zero_point", "bias"}

    another = freeze(linear(), symmetric=False)
    another.load_state_dict(layer.state_dict())
    assert another.checksum() == frozen.checksum()
    third = freeze(linear(), symmetric=False)
    third.load_state_dict(packed)
    assert third.checksum() == frozen.checksum()
    with pytest.raises(RuntimeError, match="size mismatch"):
        third.load_state_dict({"weight": torch.zeros(2, 2), "bias": layer.bias.data})


def test_copies_and_pickles():
    frozen = freeze(linear(), symmetric=False)
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    for other in (copy.deepcopy(frozen), torch.load(file, weights_only=False)):
        assert other.checksum() == frozen.checksum()
        assert torch.equal(other.weight, frozen.weight)
        assert all(not p.requires_grad for name, p in other.named_parameters() if name != "bias")


WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
WIDEST = 128 * 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"group_size": 0, "target_modules": ["up_proj"]},
        {"bits": 3, "group_size": 32, "downcast": "int"},
    ],
)
def test_conversion_and_merge_need_the_memory_of_one_layer(monkeypatch, config, dtype):
    monkeypatch.setattr(undo, "free_bytes", lambda device: 0)  # with room, the float weights wait for the last layer
    monkeypatch.setattr(chunks, "CPU_CHUNK", 1 << 11)
    model = tiny("llama", dtype=dtype, **WIDE)
    one_layer = WIDEST * 4  # fp32, the widest weight
    chunk = 12 * 4 * chunks.CPU_CHUNK
    with LiveBytes(p.data for p in model.parameters()) as live:
        model = adapted(model, **{"range_method": "minmax", **config})
        live.sweep()
        assert live.peak <= live.start + one_layer + chunk
        assert live.now < (0.95 if "target_modules" in config else 0.75) * live.start  # the float weights are gone
    train(model, tokens(), steps=1)
    trained = logits(model, tokens())
    with LiveBytes(p.data for p in model.parameters()) as live:
        merged = model.merge_and_unload()
        live.sweep()
        # the codes of one layer, before and after packing
        assert live.peak <= live.start + 3 * WIDEST + chunk
    assert torch.equal(logits(merged, tokens()), trained)


@pytest.mark.parametrize("symmetric", [True, False])
def test_layers_are_converted_where_the_configuration_says(monkeypatch, symmetric):
    """`ephemeral_gpu_offload` (on a GPU: tests/gpu/test_lrqat.py): the result comes back to the layer's own device."""
    options = {"bits": 3, "group_size": 8, "symmetric": symmetric}
    expected = logits(adapted(tiny(), **options), tokens())
    moved = []
    there = torch.device("cpu", 0)  # the same memory by another name
    monkeypatch.setattr(LRQATConfig, "conversion_device", lambda self: there)
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, to=torch.Tensor.to, **k: moved.append(a) or to(t, *a, **k))
    model = adapted(tiny(), **options)
    assert (there,) in moved
    assert torch.equal(logits(model, tokens()), expected)

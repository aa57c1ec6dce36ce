"""Scales of 8 bits grow with their weights; weights that fill a grid are said, once."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from peft_lrqat import Grid, LowBitAdamW, LowBitSRConfig
from peft_lrqat.tuners.lowbit_sr import LowBitTensor, growth
from tests.models import logits, low_bit, tiny, tokens, train

IDS = tokens()
FULL = "codes lie on the two outermost levels of their grid"


def weight_of(codes: torch.Tensor, group_size: int = -1, grows: bool = True) -> LowBitTensor:
    grid = Grid(8, group_size)
    scale = torch.rand(grid.scale_shape(*codes.shape)) * 0.01 + 0.01
    stream = torch.tensor([7, 5])
    return LowBitTensor(growth.pack(codes, 8), scale, stream, grid, codes.shape[1], False, False, grows)


def full_codes(rows: int = 8, columns: int = 128) -> torch.Tensor:
    """Every second row has three codes at the ends; the others two."""
    codes = torch.randint(-120, 120, (rows, columns), dtype=torch.int8)
    codes[:, 0], codes[:, 64] = -128, 127
    codes[::2, 70] = -128
    return codes


@pytest.mark.parametrize(("group_size", "doubled"), [(-1, 4), (64, 4), (0, 1)])
def test_a_scale_doubles_where_more_than_a_few_codes_are_at_the_ends(group_size: int, doubled: int):
    torch.manual_seed(0)
    codes = full_codes()
    if group_size == 64:
        codes[::2, 80] = 127  # three in the second group of every second row
    weight = weight_of(codes, group_size)
    before, scale = weight.to_float(), weight.scale.clone()
    growth.widen(weight)
    grown = weight.scale == 2 * scale
    assert int(grown.sum()) == doubled
    assert torch.equal(weight.scale[~grown], scale[~grown])
    per_weight = grown.repeat_interleave(codes.shape[1] // grown.shape[1], 1).expand(codes.shape)
    same = ~per_weight | (codes % 2 == 0)
    assert torch.equal(weight.to_float()[same], before[same])
    odd = (weight.codes().int() * 2 - codes.int())[~same]
    assert odd.abs().eq(1).all()
    assert abs(odd.float().mean()) < 4 / len(odd) ** 0.5
    assert weight.stream.tolist() == [7, 6]


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    for group_size in (-1, 0):
        whole, parts = weight_of(full_codes(), group_size), None
        parts = whole.clone()
        growth.widen(whole)
        monkeypatch.setattr("peft_lrqat.chunks.CPU_CHUNK", 256)
        growth.widen(parts)
        monkeypatch.undo()
        assert torch.equal(whole.packed, parts.packed)
        assert torch.equal(whole.scale, parts.scale)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_grows_as_a_cpu():
    torch.manual_seed(0)
    for group_size in (-1, 64, 0):
        here = weight_of(full_codes(), group_size)
        there = here.to("cuda")
        growth.widen(here)
        growth.widen(there)
        assert torch.equal(there.packed.cpu(), here.packed)
        assert torch.equal(there.scale.cpu(), here.scale)


@pytest.mark.parametrize("kind", [LowBitAdamW, torch.optim.AdamW])
def test_a_weight_that_must_grow_gets_there(kind: type[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(growth, "EVERY", 8)
    torch.manual_seed(0)
    codes = torch.randint(-127, 128, (2, 32), dtype=torch.int8)
    found = {}
    for grows in (True, False):
        weight = nn.Parameter(weight_of(codes, grows=grows))
        target = 3 * weight.to_float()
        optimizer = kind([weight], lr=0.2, weight_decay=0.0)
        for _ in range(50):
            weight.grad = weight.to_float() - target
            optimizer.step()
        found[grows] = float((weight.to_float() - target).norm() / target.norm())
    assert found[True] < 0.1
    assert found[False] > 0.5


def test_the_rate_in_grid_steps_leaves_scales_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(growth, "EVERY", 2)
    weight = nn.Parameter(weight_of(full_codes()))
    scale = weight.scale.clone()
    optimizer = LowBitAdamW([weight], lr=0.1, lr_unit="grid")
    for _ in range(4):
        weight.grad = torch.zeros(weight.shape)
        optimizer.step()
    assert torch.equal(weight.scale, scale)


def trained(monkeypatch: pytest.MonkeyPatch, steps: int, kind: type, **options) -> PeftModel:
    monkeypatch.setattr(growth, "EVERY", 3)
    model = low_bit(tiny(), bits=8, **options)
    train(model, IDS, steps=steps, lr=0.1, kind=kind)
    return model


def scales(model: nn.Module) -> list[torch.Tensor]:
    return [p.scale.clone() for p in model.parameters() if isinstance(p, LowBitTensor)]


@pytest.mark.parametrize("options", [{"learn_scales": True}, {"forward_bits": 1.58, "keep_base": False}])
def test_what_grew_is_what_is_served(options: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    before = scales(low_bit(tiny(), bits=8))
    model = trained(monkeypatch, 7, LowBitAdamW, **options)
    grown = sum(int((a == 2 * b).sum() + (a == 4 * b).sum()) for a, b in zip(scales(model), before, strict=True))
    assert grown > 0
    expected = logits(model.eval(), IDS)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert again.peft_config["default"].grow_scales
    assert torch.equal(logits(again, IDS), expected)
    assert torch.equal(logits(model.merge_and_unload(), IDS), expected)


def test_a_resumed_run_grows_where_the_first_would_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The stream, which the adapter's file has, decides."""
    monkeypatch.setattr(growth, "EVERY", 3)
    monkeypatch.setattr(growth, "SHARE", 0.0)
    model = low_bit(tiny(), bits=8)
    optimizer = LowBitAdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(4):
        step(model, optimizer)
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    again = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True)
    second = LowBitAdamW([p for p in again.parameters() if p.requires_grad], lr=0.1)
    second.load_state_dict(state)
    for _ in range(3):
        step(model, optimizer)
        step(again, second)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        if isinstance(one, LowBitTensor):
            assert all(torch.equal(getattr(one, n), getattr(other, n)) for n in ("packed", "scale", "stream"))


def test_a_stream_that_others_write_is_read_again():
    weight = weight_of(full_codes())
    weight.stream[1] = growth.EVERY - 1
    scale = weight.scale.clone()
    growth.grow(weight)
    assert torch.equal(weight.scale, scale)
    weight.stream[1].add_(1)  # a step
    growth.grow(weight)
    assert weight.known_count[0] == growth.EVERY + 1
    assert not torch.equal(weight.scale, scale)
    scale = weight.scale.clone()
    weight._copy(weight_of(full_codes()))
    weight.stream.copy_(torch.tensor([7, 2 * growth.EVERY - 1]))  # as loading does
    weight.stream[1] += 1
    growth.grow(weight)
    assert weight.stream.tolist() == [7, 2 * growth.EVERY + 1]


def test_defaults():
    grows = {
        (bits, method): LowBitSRConfig(bits=bits, range_method=method).grow_scales
        for bits, method in ((8, None), (8, "minmax"), (8, "lp"), (4, None), (1.58, None))
    }
    assert [pair for pair, value in grows.items() if value] == [(8, None), (8, "minmax")]
    assert LowBitSRConfig(bits=8, range_method="lp", grow_scales=True).grow_scales


# -- what is said


def filled(bits: float, **options) -> PeftModel:
    """A trained model all of whose codes are at the ends."""
    model = low_bit(tiny(), bits=bits, **options).train()
    for weight in model.parameters():
        if isinstance(weight, LowBitTensor):
            full = torch.full(weight.shape, weight.grid.qmax, dtype=torch.int8)
            weight.packed.copy_(growth.pack(full, weight.grid.code_bits))
            weight.stream[1] += 1
    return model


@pytest.mark.parametrize(("bits", "remedy"), [(8, "grow_scales=True"), (4, "with a larger"), (1.58, "learn_sc")])
def test_weights_that_fill_their_grid_are_said_once(bits: float, remedy: str, tmp_path: Path):
    model = filled(bits)
    with pytest.warns(UserWarning, match=rf"100 % of the .*{FULL}.*{remedy}.*headroom"):
        model.eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{FULL}")
        model.train()
        model.eval()
        model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=FULL):
        filled(bits).save_pretrained(tmp_path)


@pytest.mark.parametrize("bits", [1.58, 2, 3, 4, 8])
def test_nothing_is_said_of_a_fresh_range(bits: float):
    model = low_bit(tiny(), bits=bits, **({"range_method": "lp"} if bits in (2, 3, 4) else {})).train()
    for weight in model.parameters():
        if isinstance(weight, LowBitTensor):
            weight.stream[1] += 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{FULL}")
        model.eval()


def test_nothing_is_said_of_what_was_not_trained():
    model = filled(4)
    for weight in model.parameters():
        if isinstance(weight, LowBitTensor):
            weight.stream[1] = 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{FULL}")
        model.eval()

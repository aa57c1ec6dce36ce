"""The optimizer step on packed codes, by the reference: its compact state, and what depends on nothing else."""

from __future__ import annotations

import pytest
import torch

from peft_lrqat.grid import Grid
from peft_lrqat.ops import step_codes, use_kernels
from peft_lrqat.ops.reference_step import (
    Rule,
    decode_momentum,
    decode_second_moment,
    encode_momentum,
    encode_second_moment,
    new_state,
)
from peft_lrqat.packing import pack, unpack

STATES = ("8bit", "factored", "fp32")


@pytest.mark.parametrize("columns", [5, 256, 300])
def test_compact_momentum_is_unbiased(columns: int):
    m = torch.randn(7, columns) * torch.logspace(-8, 3, 7).unsqueeze(1)
    m[3] = 0
    total, times = torch.zeros_like(m), 400
    for _ in range(times):
        total += decode_momentum(*encode_momentum(m, torch.rand(m.shape)))
    step = m.abs().amax(dim=1, keepdim=True) / 127
    assert ((total / times - m).abs() <= step * 5 * 0.5 / times**0.5 + 1e-12).all()


@pytest.mark.parametrize("columns", [5, 256, 300])
def test_compact_second_moment_is_unbiased_over_many_octaves(columns: int):
    largest = torch.logspace(-20, 6, 7).unsqueeze(1)
    v = torch.rand(7, columns).square() * largest
    v[:, 0] = largest[:, 0]
    total, times = torch.zeros_like(v), 400
    for _ in range(times):
        total += decode_second_moment(*encode_second_moment(v, torch.rand(v.shape)))
    here = v > 2.0**-28 * largest  # sixteen octaves of the root, less what the block's largest may be rounded up
    assert here.float().mean() > 0.9
    assert ((total / times / v - 1).abs()[here] < 5 * 0.07 / times**0.5).all()
    zero = decode_second_moment(*encode_second_moment(torch.zeros(2, columns), torch.rand(2, columns)))
    assert (zero == 0).all()


def stepped(grid: Grid, state: str, *, strided: bool = False, times: int = 3) -> dict[str, torch.Tensor]:
    """A weight after some steps: everything that they change."""
    torch.manual_seed(0)
    rows, columns = 19, 70
    codes = torch.randint(grid.qmin, grid.qmax + 1, (rows, columns), dtype=torch.int8)
    packed, scale = pack(codes, grid.code_bits), torch.rand(grid.scale_shape(rows, columns)) + 0.01
    if strided:
        packed, scale = (t.t().contiguous().t() for t in (packed, scale))
    stream = torch.tensor([-(2**60) - 7, 3])
    rule = Rule(grid, columns, 0.9, 0.98, 1e-8, 0.1, True, "grid", state)
    held = new_state(torch.Size((rows, columns)), state, True, packed.device)
    for _ in range(times):
        step_codes(packed, scale, stream, torch.randn(rows, columns), held, torch.tensor(0.3), rule)
    assert (unpack(packed, grid.code_bits, columns) != codes).float().mean() > 0.1
    return {"packed": packed, "scale": scale, "stream": stream, **held}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("grid", [Grid(3, 10), Grid(4, 0)], ids=lambda grid: grid.describe())
def test_row_chunks_and_strides_change_nothing(grid: Grid, state: str, monkeypatch: pytest.MonkeyPatch):
    whole = stepped(grid, state)
    assert whole["stream"].tolist() == [-(2**60) - 7, 6]
    assert whole["step"] == 3
    with use_kernels(True):  # which write to where tensors without gaps have their elements
        runs = [stepped(grid, state, strided=True)]
    monkeypatch.setattr("peft_lrqat.chunks.CPU_CHUNK", 4 * 70)
    runs.append(stepped(grid, state))
    for run in runs:
        for name, value in whole.items():
            # means of g^2 are the one thing that is summed over rows
            if state == "factored" and name != "packed" and name.startswith("exp"):
                torch.testing.assert_close(run[name].float(), value.float(), rtol=1e-6, atol=1e-2)
            else:
                assert torch.equal(run[name], value), name

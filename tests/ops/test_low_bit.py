"""The layer over trainable codes: values and gradients against autograd through the plain formula."""

from __future__ import annotations

import pytest
import torch

from peft_lrqat.grid import Grid, grouped, quantize
from peft_lrqat.ops import low_bit_linear, mean_code, use_kernels
from peft_lrqat.ops.reference import low_bit_weight
from peft_lrqat.packing import pack
from peft_lrqat.ranges import choose_range

ROWS, COLS = 13, 45
GRIDS = [Grid(1.58, 0), Grid(2, -1), Grid(3, 9), Grid(4, 0), Grid(8, 15)]


def operands(grid: Grid):
    weight = torch.randn(ROWS, COLS) * 0.02
    scale, _ = choose_range(weight, grid, "absmean" if grid.ternary else "minmax")
    codes = quantize(weight, scale, None, grid)
    return codes, pack(codes, grid.code_bits), scale


def projected(codes: torch.Tensor, scale: torch.Tensor, ternary: torch.Tensor) -> torch.Tensor:
    return (grouped(codes.float(), scale) * (scale / ternary).unsqueeze(-1)).round().clamp(-1, 1)


@pytest.mark.parametrize("forward_bits", [None, 1.58])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.describe())
def test_output_and_gradients(grid: Grid, forward_bits: float | None):
    codes, packed, scale = operands(grid)
    scale.requires_grad_()
    rows, groups = scale.shape
    mean = mean_code(packed, rows, groups, grid.code_bits, COLS)
    expected_mean = grouped(codes.float(), scale).abs().mean(dim=-1)
    expected_mean = expected_mean.mean(dim=0, keepdim=True) if rows == 1 else expected_mean
    torch.testing.assert_close(mean, expected_mean.clamp(min=0.5 * rows * groups / codes.numel()))
    ternary = None if forward_bits is None else (scale.detach() * mean).requires_grad_()
    factor = torch.rand(rows, groups) + 0.5
    x, dy = torch.randn(2, 7, COLS, requires_grad=True), torch.randn(2, 7, ROWS)
    bias = torch.randn(ROWS, requires_grad=True)
    weight = torch.zeros(ROWS, COLS, requires_grad=True)  # its values are not read

    y = low_bit_linear(x, weight, packed, scale, ternary, factor, bias, grid.code_bits)
    learned = scale if ternary is None else ternary
    found = torch.autograd.grad(y, [x, weight, learned, bias], dy)

    levels = grouped(codes.float(), scale) if ternary is None else projected(codes, scale.detach(), ternary.detach())
    plain = (levels * learned.unsqueeze(-1)).view(ROWS, COLS)
    leaf = plain.detach().requires_grad_()
    expected_y = torch.nn.functional.linear(x, plain, bias)
    torch.testing.assert_close(y, expected_y)
    dx, ds, db = torch.autograd.grad(expected_y, [x, learned, bias], dy)
    (dw,) = torch.autograd.grad(torch.nn.functional.linear(x, leaf, bias), [leaf], dy)
    dw = (grouped(dw, factor) * factor.unsqueeze(-1)).view(ROWS, COLS)
    for name, a, b in zip(("x", "weight", "scale", "bias"), found, (dx, dw, ds, db), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    assert found[1].dtype == torch.float32


def test_chunks_of_rows_are_the_whole(monkeypatch: pytest.MonkeyPatch):
    grid = Grid(3, 9)
    codes, packed, scale = operands(grid)
    whole = low_bit_weight(packed, scale, None, 3, COLS, torch.bfloat16)
    monkeypatch.setattr("peft_lrqat.chunks.CPU_CHUNK", 2 * COLS)
    assert torch.equal(low_bit_weight(packed, scale, None, 3, COLS, torch.bfloat16), whole)
    assert torch.equal(whole, (grouped(codes.float(), scale) * scale.unsqueeze(-1)).view(ROWS, COLS).bfloat16())


@pytest.mark.parametrize("ternary", [False, True])
def test_ops_are_registered_as_torch_wants_them(ternary: bool):
    _, packed, scale = operands(Grid(4, 9))
    t = scale * 2 if ternary else None
    x, dy = torch.randn(3, COLS), torch.randn(3, ROWS)
    ops = torch.ops.peft_lrqat
    torch.library.opcheck(ops.low_bit_linear.default, (x, packed, scale, t, torch.randn(ROWS), 4))
    torch.library.opcheck(ops.mean_code.default, (packed, *scale.shape, 4, COLS))
    for needs in ((True, True, True), (True, False, False), (False, True, False)):
        torch.library.opcheck(ops.low_bit_linear_backward.default, (dy, x, packed, scale, t, 4, *needs))


def test_of_a_weight_of_its_own_scales_only_the_input_is_saved():
    """What lives as long as the layer does not go through the hooks of checkpointing and offloading."""
    _, packed, scale = operands(Grid(4, -1))
    x, weight = torch.randn(5, COLS, requires_grad=True), torch.zeros(ROWS, COLS, requires_grad=True)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        low_bit_linear(x, weight, packed, scale, None, None, None, 4)
    assert [t.data_ptr() for t in seen] == [x.data_ptr()]


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("changed", ["packed", "scale"])
def test_codes_and_scales_that_changed_since_forward_are_refused(changed: str, learned: bool):
    _, packed, scale = operands(Grid(4, -1))
    factor = torch.ones_like(scale) if learned else None
    weight = torch.zeros(ROWS, COLS, requires_grad=True)
    y = low_bit_linear(torch.randn(5, COLS), weight, packed, scale, None, factor, None, 4)
    {"packed": packed, "scale": scale}[changed].add_(1)
    with pytest.raises(RuntimeError, match=r"in ?place"):
        y.sum().backward()


@pytest.mark.parametrize("shape", [(7, COLS), (2, 7, COLS), (2, 3, 7, COLS), (COLS,), (0, COLS)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_many_tokens_are_multiplied_as_few_are(bias: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    _, packed, scale = operands(Grid(4, -1))
    offset = torch.randn(ROWS, requires_grad=True) if bias else None
    for x in (torch.randn(shape), torch.randn(*shape[:-1], 2 * COLS)[..., ::2]):
        found = []
        for tokens in (0, 2**62):
            monkeypatch.setattr("peft_lrqat.ops.low_bit._LATE_TOKENS", tokens)
            leaf, weight = x.clone().requires_grad_(), torch.zeros(ROWS, COLS, requires_grad=True)
            y = low_bit_linear(leaf * 1, weight, packed, scale, None, None, offset, 4)
            found.append((y, *torch.autograd.grad(y.square().sum(), [leaf, weight])))
        assert all(torch.equal(late, soon) for late, soon in zip(*found, strict=True))


def test_checkpointing_makes_no_product_in_vain(monkeypatch: pytest.MonkeyPatch):
    """Two layers, forward, once more the first of them, and both in backward."""
    _, packed, scale = operands(Grid(4, -1))
    weight, built = torch.zeros(ROWS, COLS, requires_grad=True), []

    def counting(*args, build=low_bit_weight):
        built.append(args)
        return build(*args)

    monkeypatch.setattr("peft_lrqat.ops.reference.low_bit_weight", counting)
    monkeypatch.setattr("peft_lrqat.ops.low_bit._LATE_TOKENS", 0)
    x = torch.randn(5, COLS, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        y = low_bit_linear(x, weight, packed, scale, None, None, None, 4)
        return low_bit_linear(y.repeat(1, -(-COLS // ROWS))[:, :COLS], weight, packed, scale, None, None, None, 4)

    with use_kernels(False):
        torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum().backward()
    assert len(built) == 2 + 1 + 2

"""`LowBitTensor`: a parameter without float storage that autograd, PEFT and torch take for one."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from peft_lrqat.grid import Grid, dequantize
from peft_lrqat.tuners.lowbit_sr import LowBitTensor

GRIDS = [Grid(1.58, 0), Grid(2, -1), Grid(3, 9), Grid(4, 15), Grid(8, -1)]


def weight(grid: Grid, rows: int = 13, columns: int = 45) -> LowBitTensor:
    codes = torch.randint(grid.qmin, grid.qmax + 1, (rows, columns), dtype=torch.int8)
    scale = torch.rand(grid.scale_shape(rows, columns)) * 0.01 + 0.01
    return LowBitTensor.from_codes(codes, scale, grid, key=7)


@pytest.fixture(params=GRIDS, ids=lambda grid: grid.describe())
def parameter(request: pytest.FixtureRequest) -> nn.Parameter:
    return nn.Parameter(weight(request.param))


def test_it_reads_as_scale_times_code(parameter: LowBitTensor):
    expected = dequantize(parameter.codes(), parameter.scale, None, torch.float32)
    assert torch.equal(parameter.to_float(), expected)
    assert torch.equal(parameter + 0, expected)
    assert type(parameter * 1) is torch.Tensor
    assert parameter.dtype == torch.float32
    assert parameter.is_leaf
    assert isinstance(parameter, nn.Parameter)
    assert torch.equal(torch.zeros_like(parameter), torch.zeros(13, 45))
    torch.testing.assert_close(torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(expected))


def test_it_takes_no_more_bytes_than_packed_codes(parameter: LowBitTensor):
    bits = parameter.grid.code_bits
    assert parameter.packed.nbytes == 13 * 4 * -(-45 * bits // 32)
    assert parameter.untyped_storage().nbytes() == 0 or parameter.data_ptr() == 0


def test_gradients_are_plain_and_accumulate(parameter: LowBitTensor):
    x = torch.randn(5, 45)
    for times in (1, 2):
        (x @ parameter.t()).sum().backward()
        assert type(parameter.grad) is torch.Tensor
        torch.testing.assert_close(parameter.grad, times * x.sum(0).expand(13, 45))
    nn.utils.clip_grad_norm_([parameter], 1.0)
    torch.testing.assert_close(parameter.grad.norm(), torch.tensor(1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "to", "clone"])
def test_copies_are_equal_and_independent(parameter: LowBitTensor, how: str):
    before = parameter.codes()
    if how == "deepcopy":
        copied = copy.deepcopy(parameter)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(parameter))
    elif how == "save":
        buffer = io.BytesIO()
        torch.save(parameter, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    else:
        copied = parameter.detach().to(torch.bfloat16) if how == "to" else parameter.detach().clone()
    for name in ("packed", "scale", "stream"):
        assert torch.equal(getattr(copied, name), getattr(parameter, name))
    assert (copied.grid, copied.shape, copied.dtype) == (parameter.grid, parameter.shape, torch.float32)
    if how in ("deepcopy", "pickle", "save"):
        assert isinstance(copied, nn.Parameter)
        assert copied.requires_grad
    copied.detach().copy_(torch.zeros(13, 45))
    assert not torch.equal(copied.codes(), before)
    assert torch.equal(parameter.codes(), before)


def test_modules_move_and_cast_it_without_changing_a_code(parameter: LowBitTensor):
    module = nn.Module()
    module.weight = parameter
    before = parameter.codes()
    for move in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float(), lambda m: m.to("cpu")):
        move(module)
        assert isinstance(module.weight, LowBitTensor)
        assert torch.equal(module.weight.codes(), before)
    values = parameter.to_float()
    module.to("meta")
    assert module.weight.packed.is_meta
    with torch.no_grad():
        module.weight.copy_(values)  # nothing, as for any tensor there


def test_copying_values_rounds_to_nearest_and_is_idempotent(parameter: LowBitTensor):
    before = parameter.codes()
    with torch.no_grad():
        with warnings.catch_warnings(action="error"):
            for values in (parameter.to_float(), parameter.to_float().bfloat16()):
                parameter.copy_(values)
                assert torch.equal(parameter.codes(), before)
        step = parameter.scale.repeat_interleave(45 // parameter.scale.shape[1], dim=1)
        for lost in (0.4, 0.001):  # an average hardly moves, and nobody would notice
            with pytest.warns(UserWarning, match=r"between the levels.*an average of weights.* belongs in float"):
                parameter.copy_(parameter.to_float() + lost * step)
    assert torch.equal(parameter.codes(), before)
    other = nn.Parameter(weight(parameter.grid))
    with torch.no_grad():
        other.copy_(parameter)
    assert torch.equal(other.to_float(), parameter.to_float())
    with pytest.raises(ValueError, match="cannot be copied"), torch.no_grad():
        nn.Parameter(weight(Grid(4, 9))).copy_(parameter)


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.mul_(0.9),
        lambda p: p.data.add_(1.0),
        lambda p: p.addcdiv_(torch.ones(13, 45), torch.ones(13, 45), value=-0.1),
        lambda p: p.zero_(),
        lambda p: nn.init.normal_(p),
        lambda p: torch._foreach_mul_([p], 0.9),
        lambda p: torch._foreach_add_([p], [torch.ones(13, 45)]),
        lambda p: torch.add(p, 1, out=p),
    ],
)
def test_writing_in_place_is_refused(parameter: LowBitTensor, write):
    before = parameter.codes()
    with pytest.raises(RuntimeError, match=r"low-bit weight in place.*LowBitAdamW"), torch.no_grad():
        write(parameter)
    assert torch.equal(parameter.codes(), before)


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.__setitem__(0, 0),
        lambda p: p.__setitem__((slice(None), slice(4)), torch.zeros(13, 4)),
        lambda p: p.data[0].fill_(torch.nan),
        lambda p: p.view(-1).fill_(0),
        lambda p: p[:, :4].zero_(),
        lambda p: p.t().zero_(),
        lambda p: p.T[0].add_(1),
        lambda p: p.data.view(-1).copy_(torch.zeros(13 * 45)),
        lambda p: p.unbind()[3].mul_(2),
        lambda p: p.expand(2, 13, 45)[1].zero_(),
        lambda p: torch.add(p[0], 1, out=p[0]),
        lambda p: torch._foreach_add_([p[0], p[1]], 1.0),
        lambda p: nn.init.orthogonal_(p),
        lambda p: nn.init.eye_(p),
        lambda p: p.set_(torch.zeros(13, 45)),
        lambda p: p.data.apply_(lambda _: 0.0),
        lambda p: setattr(p, "data", torch.zeros(13, 45)),
        lambda p: nn.utils.vector_to_parameters(torch.zeros(13 * 45), [p]),
    ],
)
def test_writing_to_a_view_is_refused(parameter: LowBitTensor, write):
    before = parameter.codes()
    with pytest.raises(RuntimeError, match=r"low-bit weight.*LowBitAdamW"), torch.no_grad():
        write(parameter)
    assert torch.equal(parameter.codes(), before)


def test_views_are_read_as_ever(parameter: LowBitTensor):
    expected = parameter.to_float()
    assert torch.equal(parameter[3] + 0, expected[3])
    assert parameter[3, 5].item() == expected[3, 5].item()
    assert parameter[3].tolist() == expected[3].tolist()
    assert torch.equal(nn.utils.parameters_to_vector([parameter]), expected.view(-1))
    assert torch.equal(parameter.unsqueeze(0).sum((0, 2)), expected.sum(1))
    loss = (torch.randn(5, 45) @ parameter.t()[:, :4]).square().sum() + parameter[0].sum()
    loss.backward()
    assert type(parameter.grad) is torch.Tensor
    assert parameter.grad[0].ne(0).all()
    assert not parameter.grad[4:].any()


@pytest.mark.parametrize(
    "receive",
    [
        lambda p, group: dist.all_reduce(p.detach()),
        lambda p, group: dist.scatter(p.detach(), [torch.zeros(p.shape)]),
        lambda p, group: torch.ops.c10d.broadcast_([p.detach()], group.boxed(), 1, 0),  # from another process
    ],
)
def test_collectives_do_not_write_to_it(parameter: LowBitTensor, receive):
    """They would write to a temporary, and processes drift apart. Sending reads it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match=r"would write to a low-bit weight.*`packed`, `scale` and `stream`"):
            receive(parameter, dist.group.WORLD)
        dist.broadcast(parameter.detach(), 0)
        received = [torch.zeros(parameter.shape)]
        dist.all_gather(received, parameter.detach())
        assert torch.equal(received[0], parameter.to_float())
    finally:
        dist.destroy_process_group()


def test_values_are_set_by_copy(parameter: LowBitTensor):
    parameter.data.copy_(torch.zeros(13, 45))
    assert not parameter.codes().any()


def test_the_fused_kernel_is_refused_where_the_hooks_do_not_see_it(parameter: LowBitTensor):
    def zeros():
        return [torch.zeros(13, 45)]

    with pytest.raises(RuntimeError, match="low-bit weight in place"), torch.no_grad():
        torch._fused_adamw_(
            [parameter], [torch.ones(13, 45)], zeros(), zeros(), [], [torch.tensor(1.0)],
            lr=0.1, beta1=0.9, beta2=0.95, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip


def test_codes_of_another_width_are_refused():
    inner = weight(Grid(4))
    with pytest.raises(ValueError, match="`packed` has 6 words a row"):
        LowBitTensor(inner.packed, inner.scale, inner.stream, Grid(4), 64)


def test_a_gradient_that_is_not_finite_shows(parameter: LowBitTensor):
    target = parameter.to_float()
    target[3, 4] = torch.nan
    parameter.round_from(target)
    assert not torch.isfinite(parameter.to_float()).all()
    codes = parameter.codes()
    assert codes.min() >= parameter.grid.qmin
    assert codes.max() <= parameter.grid.qmax

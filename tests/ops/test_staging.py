"""Bases in the CPU's memory: which block is copied when, what waits for what, and what operations get."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_lrqat.ops import quantized_linear, staging
from peft_lrqat.ops.staging import AtOnce, Schedule, in_memory, staged

CPU = torch.device("cpu")


class Watched(AtOnce):
    """Copies when somebody waits for them, and keeps a record of moments."""

    log: list[Any]

    def __init__(self) -> None:
        self.log, self._moment, self._pending = [], 0, []

    def copy(self, pairs: list[tuple[Tensor, Tensor]], after: list[Any]) -> Any:
        for there, _ in pairs:
            there.fill_(99)  # what is read too early is wrong
        ticket = len(self.log)
        self._pending.append((ticket, pairs))
        self.log.append(("copy", int(pairs[0][1].flatten()[0]), [moment for moment in after if moment is not None]))
        return ticket

    def wait_for(self, copied: Any) -> None:
        for ticket, pairs in [one for one in self._pending if one[0] <= copied]:
            super().copy(pairs, [])
            self._pending.remove((ticket, pairs))

    def now(self) -> Any:
        self._moment += 1
        return self._moment


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Watched:
    watched = Watched()
    monkeypatch.setattr(staging, "copies_to", lambda device: watched)
    return watched


def layer(value: int, rows: int = 3) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tensors that all hold one value; odd blocks have zero points."""
    zero_point = torch.full((rows, 1), value, dtype=torch.int8) if value % 2 else None
    return torch.full((rows, 5), value, dtype=torch.int32), torch.full((rows, 1), float(value)), zero_point


@pytest.fixture
def blocks() -> list[tuple[Tensor, Tensor, Tensor | None]]:
    return [layer(value, rows=3 + value) for value in range(5)]


@pytest.fixture
def schedule(blocks: list[Any]) -> Schedule:
    made = Schedule()
    for index, tensors in enumerate(blocks):
        made.hold(index, "layer", tensors, CPU)
    return made


def use(tensors: tuple[Tensor, Tensor, Tensor | None]) -> None:
    with staged(*tensors) as copied:
        for found, expected in zip(copied, tensors, strict=True):
            assert (found is None) == (expected is None)
            if found is not None and expected is not None:
                assert torch.equal(found, expected)
                assert found.dtype == expected.dtype
                assert found.data_ptr() != expected.data_ptr()


class _InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, what: Any) -> Tensor:
        ctx.what = what
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.what()
        return grad, None


def in_backward(what: Any) -> None:
    _InBackward.apply(torch.zeros(1, requires_grad=True), what).sum().backward()


def test_a_step_copies_every_block_once_each_way(blocks: list[Any], schedule: Schedule, copies: Watched):
    def step() -> list[int]:
        copies.log.clear()
        for tensors in blocks:
            use(tensors)
            use(tensors)  # the layers of a block
        in_backward(lambda: [use(tensors) for tensors in reversed(blocks) for _ in range(4)])
        return [block for _, block, _ in copies.log]

    assert step() == [0, 1, 2, 3, 4, 2, 1, 0]
    assert step() == [2, 3, 4, 2, 1, 0]  # two are there from the step before


def test_the_next_block_is_copied_while_one_is_used(blocks: list[Any], schedule: Schedule, copies: Watched):
    with staged(*blocks[0]):
        assert [block for _, block, _ in copies.log] == [0, 1]
    with staged(*blocks[1]):
        assert [block for _, block, _ in copies.log] == [0, 1, 2]


def test_within_a_backward_it_is_the_block_before(blocks: list[Any], schedule: Schedule, copies: Watched):
    def backward() -> None:
        with staged(*blocks[3]):
            assert [block for _, block, _ in copies.log] == [3, 2]

    in_backward(backward)


def test_a_copy_waits_for_those_who_read_the_buffer(blocks: list[Any], schedule: Schedule, copies: Watched):
    for tensors in blocks[:2]:
        use(tensors)
    first, second, third = copies.log
    assert [len(after) for _, _, after in (first, second)] == [1, 1]  # new memory: for who had it before
    assert third == ("copy", 2, [3])  # when block 0 had been read, after two moments of new memory


def test_layers_out_of_turn_are_right(blocks: list[Any], schedule: Schedule, copies: Watched):
    for index in (3, 0, 4, 4, 1, 0, 2, 3, 1):
        use(blocks[index])


def test_a_tensor_that_was_written_to_is_copied_again(blocks: list[Any], schedule: Schedule, copies: Watched):
    use(blocks[0])
    blocks[0][0].fill_(7)
    use(blocks[0])


def test_what_is_made_under_inference_is_written_to_later(blocks: list[Any], schedule: Schedule):
    with torch.inference_mode():
        use(blocks[0])
    for tensors in blocks:
        use(tensors)


def test_other_scales_than_the_layers_are_taken_as_they_are(blocks: list[Any], schedule: Schedule):
    base, scale0, _ = blocks[1]
    with staged(base, scale0 * 2, None) as (found, scale, zero_point):
        assert torch.equal(found, base)
        assert torch.equal(scale, scale0 * 2)
        assert zero_point is None


def test_unknown_tensors_stay_where_they_are(schedule: Schedule):
    tensors = layer(9)
    with staged(*tensors) as found:
        assert all(a is b for a, b in zip(found, tensors, strict=True))
    assert in_memory(tensors[0], CPU) is tensors[0]


def test_a_block_grows(schedule: Schedule, blocks: list[Any]):
    use(blocks[0])
    more = layer(8, rows=50)
    schedule.hold(0, "another layer", more, CPU)
    use(more)
    use(blocks[0])
    use(blocks[1])


def test_a_copied_model_has_a_schedule_of_its_own(schedule: Schedule, blocks: list[Any]):
    one, other = copy.deepcopy([schedule, schedule])
    assert one is other is not schedule
    use(blocks[0])
    mine = layer(6)
    one.hold(0, "layer", mine, CPU)
    use(mine)
    use(blocks[0])


def test_another_schedule_takes_tensors_over(schedule: Schedule, blocks: list[Any]):
    """As a second conversion does, which may fail."""
    assert schedule.knows(1, "layer", blocks[1], CPU)
    other = Schedule()
    other.hold(0, "layer", blocks[1], CPU)
    assert other.knows(0, "layer", blocks[1], CPU)
    assert not schedule.knows(1, "layer", blocks[1], CPU)
    del other
    assert not schedule.knows(1, "layer", blocks[1], CPU)
    schedule.hold(1, "layer", blocks[1], CPU)
    use(blocks[1])
    assert schedule.knows(1, "layer", blocks[1], CPU)


def test_a_schedule_that_is_gone_leaves_nothing(blocks: list[Any]):
    gc.collect()
    before = len(staging._HELD)
    made = Schedule()
    made.hold(0, "layer", blocks[0], CPU)
    assert len(staging._HELD) == before + 1
    use(blocks[0])
    del made
    assert len(staging._HELD) == before


def test_gradients_are_those_of_tensors_in_place(schedule: Schedule):
    """Also where what is kept for backward was copied by somebody's hooks."""
    x, scale0 = torch.randn(4, 16, requires_grad=True), torch.rand(8, 2) + 0.1
    shift = torch.zeros(8, 2, requires_grad=True)
    A, B = (torch.randn(shape, requires_grad=True) for shape in ((2, 16), (8, 2)))
    base = torch.randint(-100, 100, (8, 16), dtype=torch.int8)

    def run(base: Tensor, scale0: Tensor) -> list[Tensor]:
        y = quantized_linear(x, base, scale0, shift, None, A, B, None, 2.0, 4, "fx8", "auto")
        return [y, *torch.autograd.grad(y.square().sum(), (x, shift, A, B))]

    expected = run(base.clone(), scale0.clone())
    schedule.hold(0, "linear", (base, scale0, None), CPU)
    assert all(map(torch.equal, run(base, scale0), expected))
    with torch.autograd.graph.save_on_cpu():
        assert all(map(torch.equal, run(base, scale0), expected))

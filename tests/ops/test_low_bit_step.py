"""What all weights of a step have in common."""

from __future__ import annotations

import itertools

import torch

from peft_lrqat.ops.low_bit_step import Scalars


class Interrupted(float):
    """A rate at whose every look-up another thread, of another device's weights, begins anew."""

    scalars: Scalars
    others = itertools.count(2)

    def __hash__(self) -> int:
        for rate in itertools.islice(self.others, 16):
            self.scalars.rate(float(rate), torch.device("cpu"))
        return super().__hash__()

    __eq__ = float.__eq__


def test_threads_of_several_devices_do_not_take_scalars_from_each_other():
    rate = Interrupted(0.5)
    rate.scalars = Scalars()
    for _ in range(3):
        assert float(rate.scalars.rate(rate, torch.device("cpu"))) == 0.5


def test_a_rate_is_fp32_whatever_it_was():
    scalars = Scalars()
    for lr in (1, 1.0, torch.tensor(1), torch.tensor(1.0, dtype=torch.float64)):
        found = Scalars().rate(lr, torch.device("cpu"))
        assert found.dtype == torch.float32
        assert float(found) == 1.0
    first = scalars.rate(0.1, torch.device("cpu"))
    assert scalars.rate(0.1, torch.device("cpu")) is first
    assert float(scalars.rate(0.2, torch.device("cpu"))) == float(torch.tensor(0.2))

"""What the references promise besides the formula: codes that depend on nothing but their operands."""

import pytest
import torch

from peft_lrqat.chunks import row_chunks
from peft_lrqat.ops.factors import round_factors
from peft_lrqat.ops.reference import build_weight, codes
from tests.problems import COLS, KINDS, ours, problem


@pytest.fixture
def medium_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def test_codes_do_not_depend_on_the_matmul_precision(medium_precision):
    p = problem(rows=64, cols=128, clip="many")
    A, B = p.A.detach(), p.B.detach()
    low = codes(p.base, A, B, p.fmt)
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # put back as it was
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(low, codes(p.base, A, B, p.fmt))


@pytest.mark.parametrize(("bits", "downcast"), KINDS)
def test_merged_codes_are_those_of_forward(bits, downcast):
    p = problem(bits, -1, False, downcast, clip="many")
    found = codes(p.base, p.A.detach(), p.B.detach(), p.fmt, p.c)
    assert found.dtype == torch.int8
    eye = torch.eye(COLS)
    p.x = eye
    exact = (found.float() - p.zero_point.float()) * p.scale.detach()
    assert torch.equal(ours(p).detach().t(), exact)


def test_chunks_do_not_change_codes():
    p = problem(rows=300, cols=64, clip="many")
    factors = round_factors(p.A.detach(), p.B.detach())
    whole = build_weight(p.base, p.scale.detach(), None, factors, p.fmt, torch.float32)
    for rows in row_chunks(300, 1 << 12, torch.device("cpu")):
        part = build_weight(p.base[rows], p.scale.detach()[rows], None, factors.rows(rows), p.fmt, torch.float32)
        assert torch.equal(part, whole[rows])

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from peft_lrqat import chunks
from peft_lrqat.packing import pack, unpack, words_per_row

WIDTHS = (1, 2, 3, 7, 8, 9, 15, 31, 32, 33, 63, 64, 65, 96, 100, 127, 250)


def _codes(rows: int, cols: int, bits: int) -> torch.Tensor:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, cols), dtype=torch.int8)
    codes[0], codes[-1] = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1  # rows of the two ends: the bits most easily lost
    return codes


@pytest.mark.parametrize("cols", WIDTHS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_layout_is_compressed_tensors(bits, cols):
    codes = _codes(5, cols, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (5, words_per_row(cols, bits))
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)


@pytest.mark.parametrize("cols", WIDTHS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_round_trip(bits, cols):
    codes = _codes(6, cols, bits)
    before = codes.clone()
    found = unpack(pack(codes, bits), bits, cols)
    assert found.dtype == torch.int8
    assert torch.equal(found, before)
    assert torch.equal(codes, before)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_at_every_position_of_a_word(bits):
    every = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8)
    codes = torch.stack([every.roll(i).repeat(-(-70 // every.numel()))[:70] for i in range(every.numel())])
    assert torch.equal(unpack(pack(codes, bits), bits, 70), codes)


def test_bit_stream_by_hand():
    # u = q + 4: 5, 0, 7, 2 -> ... 010 111 000 101, lowest bits first
    packed = pack(torch.tensor([[1, -4, 3, -2]], dtype=torch.int8), 3)
    assert packed.tolist() == [[0b010_111_000_101]]


def test_rows_are_packed_on_their_own():
    codes = _codes(8, 37, 3)
    parts = [pack(codes[rows], 3) for rows in (slice(0, 3), slice(3, 8))]
    assert torch.equal(torch.cat(parts), pack(codes, 3))


@pytest.mark.parametrize("bits", range(2, 9))
def test_row_chunks_change_nothing(monkeypatch, bits):
    codes = _codes(11, 37, bits)
    whole = pack(codes, bits)
    monkeypatch.setattr(chunks, "CPU_CHUNK", 4 * 37)
    assert torch.equal(pack(codes, bits), whole)
    assert torch.equal(unpack(whole, bits, 37), codes)


def test_views_and_transposes():
    codes = _codes(24, 40, 5)
    assert torch.equal(unpack(pack(codes.t(), 5), 5, 24), codes.t())
    packed = pack(codes, 5)
    column_major = packed.t().contiguous().t()
    assert torch.equal(unpack(column_major, 5, 40), codes)


def test_width():
    assert [words_per_row(33, bits) for bits in range(2, 9)] == [3, 4, 5, 6, 7, 8, 9]

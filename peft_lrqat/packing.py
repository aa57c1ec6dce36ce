"""Dense bit packing of codes into 32-bit words.

One layout serves training and checkpoints: code q becomes the unsigned number u = q + 2^(bits-1), element i of a row
occupies the bits [i * bits, (i + 1) * bits) of the row's little-endian bit stream, and each row is padded to whole
32-bit words:

    4 bits:   word 0 = | u7 | u6 | u5 | u4 | u3 | u2 | u1 | u0 |      (u0 in the lowest four bits)
    3 bits:   word 0 = | u10 (low 2 bits) | u9 | ... | u1 | u0 |,  word 1 starts with the high bit of u10

This is compressed-tensors' `weight_packed` (0.18 and later), so a merged weight is written without repacking. Rows are
never mixed, so FSDP2 may shard the packed tensor along its first dimension.
"""

from __future__ import annotations

import torch

from .chunks import row_chunks


def words_per_row(in_features: int, bits: int) -> int:
    """Count the int32 words that hold a row of `in_features` codes."""
    return -(-in_features * bits // 32)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack centred codes.

    Args:
        codes: int8 (out, in), each in [-2^(bits-1), 2^(bits-1) - 1].
        bits: 2 to 8.

    Returns:
        int32 (out, ceil(in * bits / 32)).

    Memory: work space for one row chunk (odd widths need about ten bytes a code) above the result.
    """
    rows, cols = codes.shape
    packed = torch.empty(rows, words_per_row(cols, bits), dtype=torch.int32, device=codes.device)
    for part in row_chunks(rows, cols, codes.device):
        packed[part] = _pack_rows(codes[part], bits)
    return packed


def _pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    rows, cols = codes.shape
    words = words_per_row(cols, bits)
    unsigned = codes.to(torch.int16).add_(1 << (bits - 1)).to(torch.uint8)
    if bits == 8:
        stream = unsigned
    elif bits in (2, 4):
        per_byte = 8 // bits
        padded = torch.nn.functional.pad(unsigned, (0, -cols % per_byte)).view(rows, -1, per_byte)
        stream = padded[..., 0].clone()
        for i in range(1, per_byte):
            stream |= padded[..., i] << (bits * i)
    else:  # eight codes make `bits` whole bytes
        padded = torch.nn.functional.pad(unsigned, (0, -cols % 8)).view(rows, -1, 8)
        block = torch.zeros(padded.shape[:2], dtype=torch.int64, device=codes.device)
        for i in range(8):
            block |= padded[..., i].to(torch.int64) << (bits * i)
        shifts = torch.arange(0, 8 * bits, 8, device=codes.device)
        stream = ((block.unsqueeze(-1) >> shifts) & 0xFF).to(torch.uint8).view(rows, -1)
    out = torch.zeros(rows, words * 4, dtype=torch.uint8, device=codes.device)
    width = min(stream.shape[1], out.shape[1])
    out[:, :width] = stream[:, :width]
    return out.view(torch.int32)


def unpack(packed: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    """Read the codes that `pack` stored.

    Args:
        packed: int32 (out, ceil(in * bits / 32)).

    Returns:
        int8 (out, in) centred codes.

    Memory: as for `pack`.
    """
    rows = packed.shape[0]
    codes = torch.empty(rows, in_features, dtype=torch.int8, device=packed.device)
    for part in row_chunks(rows, in_features, packed.device):
        codes[part] = _unpack_rows(packed[part], bits, in_features)
    return codes


def _unpack_rows(packed: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    rows = packed.shape[0]
    # flat first: a single column may be contiguous with any stride, and bytes cannot be seen through one
    stream = packed.contiguous().view(-1).view(torch.uint8).view(rows, packed.shape[1] * 4)
    if bits == 8:
        unsigned = stream
    elif bits in (2, 4):
        mask = (1 << bits) - 1
        parts = [(stream >> (bits * i)) & mask for i in range(8 // bits)]
        unsigned = torch.stack(parts, dim=-1).view(rows, -1)
    else:
        blocks = -(-in_features // 8)
        stream = torch.nn.functional.pad(stream, (0, max(0, blocks * bits - stream.shape[1])))
        by_block = stream[:, : blocks * bits].view(rows, blocks, bits).to(torch.int64)
        block = by_block[..., 0].clone()
        for i in range(1, bits):
            block |= by_block[..., i] << (8 * i)
        shifts = torch.arange(0, 8 * bits, bits, device=packed.device)
        unsigned = ((block.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).to(torch.uint8).view(rows, -1)
    unsigned = unsigned[:, :in_features].contiguous()
    if bits == 8:  # u - 128, seen as int8, is u with its top bit flipped
        return (unsigned ^ 0x80).view(torch.int8)
    return unsigned.view(torch.int8) - (1 << (bits - 1))

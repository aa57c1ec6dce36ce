"""Row chunks: how every weight-sized computation keeps its float temporaries small."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Elements of fp32 work space per chunk. On a CPU a chunk (1 MiB) stays in the L2 cache, which makes the elementwise
# passes of the rounding several times faster than passes over the whole matrix; on a GPU it bounds the launches.
CPU_CHUNK = 1 << 18
GPU_CHUNK = 1 << 25


def chunk_size(device: torch.device) -> int:
    """Return how many elements a chunk has on this device."""
    return CPU_CHUNK if device.type == "cpu" else GPU_CHUNK


def row_chunks(rows: int, cols: int, device: torch.device) -> Iterator[slice]:
    """Cover `rows` rows of `cols` elements with slices, each within the chunk size of the device, or of one row."""
    step = max(1, chunk_size(device) // max(1, cols))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))

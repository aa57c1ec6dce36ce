"""safetensors files as they are written: every dtype, shards, names."""

from __future__ import annotations

import pytest
import torch

from peft_lrqat.formats.shards import ShardWriter, parse_size
from tests.files import read


def test_shard_sizes_are_read():
    assert [parse_size(size) for size in (1000, "1000", "2KB", "1.5 GB")] == [1000, 1000, 2000, 1_500_000_000]


def test_every_dtype_is_read_back(tmp_path):
    dtypes = (torch.uint8, torch.bool, torch.float16, torch.int64, torch.bfloat16, torch.int32, torch.float64)
    tensors = {str(dtype): torch.randn(3, 5).mul(9).to(dtype) for dtype in dtypes}
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(1.5), "turned": torch.randn(4, 3).t()}
    shards = ShardWriter(tmp_path, 10**9)
    for name, tensor in tensors.items():
        shards.add(name, tensor)
    shards.close()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    found = read(tmp_path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n], tensors[n]) and found[n].dtype == tensors[n].dtype for n in tensors)


def test_names_come_once(tmp_path):
    shards = ShardWriter(tmp_path, 10**9)
    shards.add("a", torch.zeros(1))
    with pytest.raises(ValueError, match="'a'"):
        shards.add("a", torch.zeros(1))
    with pytest.raises(ValueError, match="complex64"):
        shards.add("b", torch.zeros(1, dtype=torch.complex64))

"""What torchao's files say of their tensors is read from their headers; other kinds are refused by name."""

from __future__ import annotations

import json

import pytest

from peft_lrqat.formats import torchao


def entry(**changes) -> str:
    data = {"target_dtype": {"_data": "int3"}, "activation_quantization": None, "block_size": [1, 32]}
    return json.dumps({"_type": "IntxUnpackedToInt8Tensor", "_data": {**data, **changes}})


def test_widths_and_groups_may_differ_from_layer_to_layer():
    metadata = {"a.weight": entry(), "b.weight": entry(target_dtype={"_data": "int8"}, block_size=[1, 96])}
    scheme_of = torchao.schemes({}, {**metadata, "norm.weight": json.dumps({"_type": "Tensor"})})
    assert [(scheme_of(name).bits, scheme_of(name).group_size) for name in "ab"] == [(3, 32), (8, 96)]


def test_what_cannot_be_read():
    with pytest.raises(ValueError, match="tensors are Float8Tensor; IntxUnpackedToInt8Tensor can be read"):
        torchao.schemes({}, {"a.weight": json.dumps({"_type": "Float8Tensor", "_data": {}})})
    scheme_of = torchao.schemes({}, {"a.weight": entry(activation_quantization="int8")})
    with pytest.raises(ValueError, match="'a' rounds its activations"):
        scheme_of("a")
    with pytest.raises(ValueError, match="'b' is stored quantized, but the files' metadata does not describe it"):
        scheme_of("b")

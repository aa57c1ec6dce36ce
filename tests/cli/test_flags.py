"""Python's arguments in a message become flags, and nothing else does."""

from __future__ import annotations

import pytest

from peft_lrqat.cli.flags import flags


@pytest.mark.parametrize(("said", "typed"), [
    ("Name another, or use `overwrite=True`.", "Name another, or use --overwrite."),
    ("`container_bits` is 9; 2 to 8, or None.", "`--container-bits` is 9; 2 to 8, or None."),
    ("write them with container_bits=4", "write them with --container-bits 4"),
    ("checkpoint_format='gptq_v2', or container_bits wider", "-o checkpoint_format=gptq_v2, or --container-bits wider"),
    ("use format='gptq', train with kv_rule='vllm'", "use --format gptq, train with kv_rule='vllm'"),
    ("write floats with `type='f32'`; choose `type`", "write floats with -o type=f32; choose `-o type`"),
    ("pass trust_remote_code=True.", "pass --trust-remote-code."),
    ("compare the files only, with engine=False.", "compare the files only, with --no-engine."),
    ("`format='gguf'` needs the package", "--format gguf needs the package"),
    ("Give `tokenizer=` (or `vocabulary=False`)", "Give `--tokenizer` (or -o vocabulary=false)"),
    ("`tokenizer_pre` is 'x'", "`-o tokenizer_pre` is 'x'"),
    # a training configuration has no flags, and names of files are nobody's to change
    ("train with LowBitSRConfig(bits=1.58, group_size=0)", "train with LowBitSRConfig(bits=1.58, group_size=0)"),
    ("the format of the engine, against 3 types", "the format of the engine, against 3 types"),
    ("'/a/overwrite/container_bits.x' has a.container_bits", "'/a/overwrite/container_bits.x' has a.container_bits"),
])  # fmt: skip
def test_messages(said: str, typed: str):
    assert flags(said) == typed

"""Options that users bring along, and a configuration does not have, are answered with what to do."""

from __future__ import annotations

import dataclasses

import pytest
from peft import LoraConfig

from peft_lrqat import LowBitSRConfig, LRQATConfig
from peft_lrqat.tuners.common.absent import OF_OTHERS


def fields(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]


def said(kind: type, option: str) -> str:
    with pytest.raises(TypeError, match=f"{kind.__name__} got an unexpected keyword argument `{option}`") as found:
        kind(**{option: 1})
    return str(found.value)


@pytest.mark.parametrize("kind", [LowBitSRConfig, LRQATConfig])
def test_every_option_of_lora_and_of_the_other_method_is_answered(kind: type):
    others = (fields(LoraConfig) | fields(LRQATConfig) | fields(LowBitSRConfig)) - fields(kind)
    assert len(others) >= 8
    for option in others:
        answer = said(kind, option)
        assert "help(" not in answer, option
        # names that are alike mislead: what is named has the same meaning
        named = answer.partition("Did you mean `")[2].partition("`")[0]
        assert named in ("", "init_weights", "init_lora_weights"), (option, named)


@pytest.mark.parametrize("kind", [LowBitSRConfig, LRQATConfig])
@pytest.mark.parametrize("option", OF_OTHERS)
def test_so_are_those_of_other_quantizers(kind: type, option: str):
    answer = said(kind, option)
    named = answer.partition("Did you mean `")[2].partition("`")[0]
    assert named in fields(kind) or "model" in answer


def test_what_is_said():
    assert "LRQATConfig, which has them" in said(LowBitSRConfig, "r")
    assert "LRQATConfig trains them" in said(LowBitSRConfig, "target_parameters")
    assert "Did you mean `r`?" in said(LRQATConfig, "lora_rank")
    assert "without a BitsAndBytesConfig" in said(LRQATConfig, "load_in_4bit")
    assert "Did you mean `group_size`?" in said(LowBitSRConfig, "groupsize")  # as for any typing error


def test_no_option_that_there_is_counts_as_absent():
    assert not set(OF_OTHERS) & (fields(LRQATConfig) | fields(LowBitSRConfig))

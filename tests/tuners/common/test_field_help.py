"""The docstrings of both configurations describe every field, with its true default, and are where its help is from."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from peft import LoraConfig, LoraRuntimeConfig, PeftConfig

from peft_lrqat import LowBitSRConfig, LRQATConfig
from peft_lrqat.tuners.common.field_help import attributes_of, with_help
from peft_lrqat.tuners.common.rules import SHARED
from peft_lrqat.tuners.lrqat import config as lrqat_config

#: What each method says for itself of a field that both have.
OWN_WORDS = {"target_modules", "learn_scales", "scale_dtype"}


@pytest.fixture
def config(method: ModuleType) -> Any:
    return {"LR-QAT": LRQATConfig, "Low-bit SR": LowBitSRConfig}[method.NAME]()


def test_every_field_is_described(config: Any):
    named = set(re.findall(r"`(\w+)`", type(config).__doc__))
    assert {field.name for field in dataclasses.fields(config)} - attributes_of(type(config)).keys() - named == set()


def test_defaults_are_those_of_a_configuration_that_leaves_all_out(config: Any):
    for name, (_, text) in attributes_of(type(config)).items():
        if name != "runtime_config":
            (said,) = re.findall(r"Default: `(.*?)`[.,;]? ?", text)
            assert ast.literal_eval(said) == getattr(config, name), name


def test_allowed_values_are_named(config: Any):
    for name, (kind, text) in attributes_of(type(config)).items():
        rule = config.rules.get(name)
        if rule is None:
            continue
        assert rule.allows(None) <= ("None" in kind), name
        if rule.says.startswith("allowed are "):
            for value in re.findall(r"'([\w-]+)'|([\d.]*\d)", rule.says):
                assert re.search(rf"\b{''.join(value)}\b", text), (name, value)


def test_types_hold_the_defaults(config: Any):
    known = {"TaskType": str, "LoftQConfig": dict, "LoraRuntimeConfig": LoraRuntimeConfig}
    for name, (kind, _) in attributes_of(type(config)).items():
        kinds = [eval(part, known) for part in re.sub(r"\[.*?\](?= \||$)", "", kind).split(" | ")]
        value = getattr(config, name)
        assert any(value is None if one is None else isinstance(value, one) for one in kinds), (name, kind, value)


def test_fields_help_is_the_docstrings(config: Any):
    helps = {field.name: field.metadata.get("help") for field in dataclasses.fields(config)}
    for name, (_, text) in attributes_of(type(config)).items():
        assert helps[name] == text
    assert helps["bits"].startswith("Width of ")


def test_peft_keeps_its_own_help():
    ours, theirs = ({field.name: field.metadata for field in dataclasses.fields(c)} for c in (LRQATConfig, LoraConfig))
    assert theirs["use_rslora"]["help"] != ours["use_rslora"]["help"]
    for name in theirs:  # what else is there, PEFT reads
        assert {**theirs[name], "help": ours[name].get("help")} == ours[name]


def test_refused_options_are_listed():
    (listed,) = re.findall(r"Refused, [^:]*: (.*?)\.\s", LRQATConfig.__doc__ or "", re.DOTALL)
    assert set(re.findall(r"`(\w+)`", listed)) == {*lrqat_config._REFUSED, "lora_dropout"}


def test_both_methods_say_the_same_of_what_both_have():
    ours, theirs = attributes_of(LRQATConfig), attributes_of(LowBitSRConfig)
    shared = SHARED.keys() & ours.keys() - OWN_WORDS
    assert {"act_bits", "kv_rule", "base_checksum", "exclude_modules"} <= shared
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


def test_a_docstring_describes_fields_only():
    @dataclasses.dataclass
    class Config:
        """A configuration.

        Attributes:
            bits (int): From 2
                to 8.
            width (int): There is none.
        """

        bits: int = 4

    with pytest.raises(TypeError, match="Config describes 'width'"):
        with_help(Config)
    assert attributes_of(Config) == {"bits": ("int", "From 2 to 8."), "width": ("int", "There is none.")}
    Config.__doc__ = None  # python -OO
    assert with_help(Config) is Config


def test_a_docstring_is_completed():
    class Base:
        """What is shared.

        Attributes:
            rule: for messages.
            bits (int): From 2
                to 8.
            width (int): In bytes.
        """

    @dataclasses.dataclass
    class Config(Base):
        """A configuration.

        Attributes:
            name (str): Its own.
            width, bits: Numbers, which are those of others. `Base`
                describes them.

        More.
        """

        name: str = ""
        bits: int = 4
        width: int = 1

    with_help(Config)
    entries = "    name (str): Its own.\n    width (int): In bytes.\n    bits (int): From 2\n        to 8.\n\nMore."
    assert inspect.getdoc(Config) == f"A configuration.\n\nAttributes:\n{entries}"
    assert [field.metadata["help"] for field in dataclasses.fields(Config)] == ["Its own.", "From 2 to 8.", "In bytes."]


def test_an_option_that_there_is_not_is_answered_with_the_nearest(config: Any):
    kind = type(config)
    with pytest.raises(
        TypeError, match=r"got an unexpected keyword argument `groupsize`\. Did you mean `group_size`\?"
    ):
        kind(groupsize=64)
    with pytest.raises(TypeError, match=rf"unexpected keyword argument `xyz`\. `help\({kind.__name__}\)` describes"):
        kind(bits=4, xyz=1)
    assert list(inspect.signature(kind).parameters) == [f.name for f in dataclasses.fields(kind) if f.init]


def test_an_option_of_a_later_version_is_left_out_of_a_file(config: Any, tmp_path: Path):
    config.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "of_tomorrow": 1}))
    with pytest.warns(UserWarning, match="of_tomorrow"):
        assert PeftConfig.from_pretrained(tmp_path).bits == config.bits

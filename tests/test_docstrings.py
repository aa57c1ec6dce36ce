"""Every public name has an example in its docstring, and all examples of the package run as they are shown."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedModel

import peft_lrqat
from peft_lrqat import export
from tests.models import adapted, tiny
from tests.tokenizers import VOCAB, bytewise

PACKAGE = Path(peft_lrqat.__file__).parent
NAMES = [name for name in peft_lrqat.__all__ if name != "__version__"]


def _examples() -> Iterator[doctest.DocTest]:
    """The docstrings of the package that have examples: of modules, functions, classes and their methods."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
            yield from (test for test in doctest.DocTestFinder().find(module) if test.examples)


EXAMPLES = {test.name: test for test in _examples()}


class _Checker(doctest.OutputChecker):
    """An example that shows no output may print."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.fixture(scope="module")
def float_model() -> PreTrainedModel:
    return tiny("qwen3", hidden_size=128, intermediate_size=128, num_hidden_layers=1, head_dim=32, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def folders(float_model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models that examples name."""
    work = tmp_path_factory.mktemp("examples")
    float_model.save_pretrained(work / "Qwen/Qwen3-0.6B")
    bytewise("gpt-2").save_pretrained(work / "Qwen/Qwen3-0.6B")
    model = adapted(copy.deepcopy(float_model), range_method="minmax", group_size=128)
    export(model, work / "path/or/repo-GPTQ", "gptq", tokenizer=bytewise("gpt-2"), progress=False)
    return work


@pytest.fixture
def given(float_model: PreTrainedModel, folders: Path) -> dict[str, Callable[[], Any]]:
    """What examples use without making it: a float model, an adapted one, a tokenizer, texts, a dataset of them."""

    def model() -> Any:
        base = copy.deepcopy(float_model)
        base.name_or_path = str(folders / "Qwen/Qwen3-0.6B")
        return adapted(base, range_method="minmax")

    texts = ["The quick brown fox jumps over the lazy dog, again and again. " * 20] * 4
    return {
        "base": lambda: copy.deepcopy(float_model),
        "model": model,
        "tokenizer": lambda: bytewise("gpt-2"),
        "texts": lambda: texts,
        "dataset": lambda: Dataset.from_dict({"text": [texts[0][:40]] * 2}),
    }


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, given: dict[str, Callable[[], Any]], folders: Path, tmp_path: Path, monkeypatch):
    test = EXAMPLES[name]
    monkeypatch.chdir(tmp_path)
    for folder in ("Qwen", "path"):
        (tmp_path / folder).symlink_to(folders / folder)
    (tmp_path / "site-packages").mkdir()
    test.globs = {key: make() for key, make in given.items() if key in test.docstring}
    for example in test.examples:  # on a machine without a GPU, and in less time
        example.source = example.source.replace('SFTConfig("adapter",', 'SFTConfig("adapter", use_cpu=True,')
        example.source = example.source.replace("max_steps=10", "max_steps=1")
    said: list[str] = []
    failed, tried = doctest.DocTestRunner(_Checker()).run(test, out=said.append)
    assert tried > 0
    assert failed == 0, "".join(said)


@pytest.mark.parametrize("name", NAMES)
def test_public_names_have_an_example(name: str):
    public = getattr(peft_lrqat, name)
    assert f"{public.__module__}.{public.__qualname__}" in EXAMPLES
    assert f"import {name}" in public.__doc__ or f" {name}\n" in public.__doc__, "examples import what they show"


def test_the_package_lists_its_names():
    assert set(NAMES) <= set(re.findall(r"\w+", peft_lrqat.__doc__ or ""))


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith(("Config", "Layer", "Model"))])
def test_public_names_describe_their_parameters(name: str):
    public = getattr(peft_lrqat, name)
    stars = {inspect.Parameter.VAR_KEYWORD: "**"}
    for parameter in inspect.signature(public).parameters.values():
        assert f" {stars.get(parameter.kind, '')}{parameter.name} (" in public.__doc__

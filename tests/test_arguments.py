"""Arguments that are wrong: names that there are not."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import peft_lrqat
from peft_lrqat import export, preprocess_blockwise
from peft_lrqat.arguments import check_flags, with_suggestions


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("Distillation", "temprature", "temperature"),
        ("LowBitAdamW", "weight_dekay", "weight_decay"),
        ("LowBitSRConfig", "groupsize", "group_size"),
        ("LRQATConfig", "groupsize", "group_size"),
        ("QuantizationCallback", "row", "rows"),
        ("distillation_loss", "temprature", "temperature"),
        ("preprocess_blockwise", "epoch", "epochs"),
        ("preprocess_gptq", "damp", "damping"),
        ("preprocess_rotation", "seeed", "seed"),
        ("store_logits", "tempereture", "temperature"),
    ],
)
def test_an_option_that_there_is_not_is_answered_with_the_nearest(name: str, wrong: str, right: str):
    called = getattr(peft_lrqat, name)
    given = f"{name} got an unexpected keyword argument"
    with pytest.raises(TypeError, match=rf"{given} `{wrong}`\. Did you mean `{right}`\?"):
        called(**{wrong: 1})
    with pytest.raises(TypeError, match=rf"{given} `xyz`\. `help\({name}\)` describes"):
        called(xyz=1)
    assert right in inspect.signature(called).parameters


def test_what_there_is_goes_on_as_it_was():
    @with_suggestions
    def add(a: int, *others: int, b: int = 1) -> int:
        """Add."""
        return a + sum(others) + b

    class Base:
        def __init__(self, a: int, *, b: int = 2) -> None:
            self.sum = a + b

    class Heir(with_suggestions(Base)):  # type: ignore[misc]
        def __init__(self, c: int, **options: Any) -> None:
            super().__init__(c, **options)

    assert (add(1), add(1, 2, b=3), add(a=1)) == (2, 6, 2)
    assert add.__doc__ == "Add."
    assert (Heir(1).sum, Heir(c=1, b=4).sum) == (3, 5)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        add()


@pytest.mark.parametrize("value", ["no", 1, None])
def test_flags(value: object):
    check_flags(first=True, second=False)
    with pytest.raises(ValueError, match=f"`second` is {value!r}; allowed are True, False"):
        check_flags(first=True, second=value)


@pytest.mark.parametrize("given", [5, None, ""])
def test_what_is_no_folder(given: Any):
    says = r"is (5|None|''); it must be the path of a folder"
    with pytest.raises(ValueError, match=f"`out` {says}"):
        export("model", given)
    if given is not None:  # which says that nothing is kept
        with pytest.raises(ValueError, match=f"`resume_from` {says}"):
            preprocess_blockwise("model", peft_lrqat.LRQATConfig(), ["text"], resume_from=given)

"""What model cards say about loading a format."""

from __future__ import annotations


def how_to_load(
    install: str = "",
    load: str = "from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained",
) -> str:
    """A card's section on loading it in Python, in Markdown.

    Args:
        install: what pip must install first.
        load: the lines that load a model, up to the call's parenthesis.
    """
    first = f"# pip install {install}\n" if install else ""
    return f'```python\n{first}{load}("path/or/repo")\n```'

"""The model card of an adapter: how to load it, its grid, and what the Trainer knows, before all else.

Three programs write that README.md. PEFT does with every save: a template without content. transformers' and TRL's
`create_model_card` write over it before an upload, with text that does not load the adapter. What says something is
kept, above all a user's own words; the rest goes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import CardData, ModelCard, ModelCardData

from .._version import __version__
from ..files import write_atomically
from ..installing import where_from
from .card import PIPELINES, base_name, linked, table

#: PEFT's and transformers' word for a task, and the end of the Auto class that loads a model for it.
_CLASSES = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "ForFeatureExtraction",
}

_BLOCK = re.compile(r"<!-- peft-lrqat: (\S+) -->\n.*?<!-- end of \1 -->\n*", re.DOTALL)
_VERSIONS = "### Framework versions"
#: By these, cards of transformers' and of TRL's Trainers are known.
_GENERATED = ("This model card has been generated automatically", "It has been trained using [TRL]")
#: What such cards say without knowing it, or wrongly: a pipeline that raises KeyError, and places for text.
_EMPTY = (
    r"^This model is a fine-tuned version of .*\n",
    r"^## Quick start\n(?:(?!^## ).*\n)*",
    r"^## .*\n\nMore information needed\n\n?",
)


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter's card says.

    Attributes:
        method: its name.
        peft_type: PEFT's name for it, which is an unknown key without this package.
        bits: of the grid.
        grid: the grid in words.
        base: the base model: a repository of the Hub, or a folder, of which only the name is said.
        task: PEFT's `task_type`, None if it has none.
        quantized_base: whether the base was quantized before, so that `load_quantized` loads it.
        recipe: how it is trained.
        dtype: in which the base was used, None if unknown.
        classes: how many a trained head tells apart, None if there is none.
        rows: more rows of the table: name -> Markdown.
        datasets: repositories of the Hub that it was trained on.
    """

    method: str
    peft_type: str
    bits: float
    grid: str
    base: str
    task: str | None
    quantized_base: bool
    recipe: str
    dtype: str | None = None
    classes: int | None = None
    rows: Mapping[str, str] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()


def write_adapter_card(
    folder: str | os.PathLike, facts: AdapterFacts, adapter: str = "default", repo: str | None = None
) -> None:
    """Write or complete the README.md of a saved adapter.

    PEFT saves adapters that are not called "default" in folders of their own, and writes one README.md beside these.

    Args:
        folder: where the adapter's files are.
        adapter: its name.
        repo: where it is going to be on the Hub, if that is known.
    """
    path, inside = Path(folder) / "README.md", None
    above = path.parent.parent / "README.md"
    if path.parent.name == adapter and not path.exists() and above.exists():
        inside = adapter if ModelCard(above.read_text(encoding="utf-8")).data.get("library_name") == "peft" else None
    path = above if inside else path
    existing = path.read_text(encoding="utf-8") if path.exists() else ""
    write_atomically(path, adapter_card(existing, facts, inside, repo))


def adapter_card(existing: str, facts: AdapterFacts, inside: str | None = None, repo: str | None = None) -> str:
    """README.md of an adapter.

    Args:
        existing: the file as it is, "" for none.
        inside: the folder of the repository that holds the adapter; None: the repository itself.
        repo: as in `write_adapter_card`.
    """
    card = ModelCard(existing)
    base, on_hub = base_name(facts.base)
    blocks = {match[1]: match[0] for match in _BLOCK.finditer(card.text)}
    name = inside or "default"
    others = [block for key, block in blocks.items() if key != name]
    block = _further(facts, name, repo) if inside and others else _block(facts, inside, repo)
    blocks[name] = f"<!-- peft-lrqat: {name} -->\n{block}\n<!-- end of {name} -->\n\n"
    title, rest = _title_and_rest(_BLOCK.sub("", card.text))
    title = title or f"# {Path(base).name}: a {facts.bits:g}-bit {facts.method} adapter"
    _complete(card.data, facts, base if on_hub else None)
    text = f"{title}\n\n{''.join(blocks.values())}{_with_versions(rest)}"
    return f"---\n{card.data.to_yaml()}\n---\n\n{text.rstrip()}\n"


def _complete(data: CardData, facts: AdapterFacts, base: str | None) -> None:
    """The fields that the Hub reads."""
    found: list[str] = data.get("tags") or []
    tags = [tag for tag in found if base is not None or not tag.startswith("base_model:")]
    own = [facts.method.lower().replace(" ", "-"), "qat", f"{facts.bits:g}-bit"]
    data["tags"] = [*tags, *(tag for tag in own if tag not in tags)]
    data["library_name"] = "peft"
    for key, value in {"base_model": base, "base_model_relation": base and "adapter"}.items():
        data[key] = value  # None is not written; the Hub refuses what is no repository, such as a folder
    if (task := PIPELINES.get(_CLASSES.get(facts.task or "", ""))) and not data.get("pipeline_tag"):
        data["pipeline_tag"] = task
    if facts.datasets and not data.get("datasets"):
        data["datasets"] = list(facts.datasets)
    if data.get("licence") == "license":  # TRL's template
        data["licence"] = None


def _block(facts: AdapterFacts, inside: str | None, repo: str | None) -> str:
    base, on_hub = base_name(facts.base)
    shown = f"[{base}](https://huggingface.co/{base})" if on_hub else base
    rows = {"base model": shown, "grid": facts.grid, "recipe": linked(facts.recipe), **facts.rows}
    return f"""{facts.method} trains a model on the grid that it is served on. This is the adapter.

```python
{_loading(facts, inside, repo)}
merged = model.merge_and_unload()  # a quantized model that needs neither PEFT nor peft-lrqat
```

Without `import peft_lrqat`, PEFT raises `KeyError: '{facts.peft_type}'`.

{table(rows)}"""


def _further(facts: AdapterFacts, inside: str, repo: str | None) -> str:
    return f"""The folder `{inside}` holds another adapter ({facts.method}: {facts.grid}):

```python
{_loading(facts, inside, repo)}
```"""


def _loading(facts: AdapterFacts, inside: str | None, repo: str | None) -> str:
    base, where = f'"{base_name(facts.base)[0]}"', f'"{repo or "path/or/repo"}"'
    kind, options = _CLASSES.get(facts.task or "", ""), "" if facts.dtype is None else f', dtype="{facts.dtype}"'
    options += "" if facts.classes is None else f", num_labels={facts.classes}"
    first = f"import peft_lrqat  # {where_from()}"
    if not facts.quantized_base and not inside:
        auto = f"AutoPeftModel{kind}"
        return f"{first}\nfrom peft import {auto}\n\nmodel = {auto}.from_pretrained({where}{options})"
    # AutoPeftModel would look for the base's files in the adapter's folder, too, and read no packed base
    lines = [first, "from peft import PeftModel"]
    if facts.quantized_base:
        lines += ["", f"base = peft_lrqat.load_quantized({base}{options})"]
    else:
        auto = "AutoModel" if facts.task == "FEATURE_EXTRACTION" else f"AutoModel{kind or 'ForCausalLM'}"
        lines += [f"from transformers import {auto}", "", f"base = {auto}.from_pretrained({base}{options})"]
    folder = f', subfolder="{inside}"' if inside else ""
    return "\n".join([*lines, f"model = PeftModel.from_pretrained(base, {where}{folder})"])


def _title_and_rest(text: str) -> tuple[str, str]:
    """The first heading, "" if there is none, and what others wrote that says something."""
    template = ModelCard.from_template(ModelCardData()).text
    body, _, versions = text.partition(_VERSIONS)
    if body.split() == template.split():  # PEFT adds its version
        body, text = "", f"{_VERSIONS}{versions}"
    if any(words in text for words in _GENERATED):
        for pattern in _EMPTY:
            text = re.sub(pattern, "", text, flags=re.MULTILINE)
    lines = text.strip("\n").split("\n")
    heading = next((i for i, line in enumerate(lines) if line.startswith("# ")), None)
    code = next((i for i, line in enumerate(lines) if line.startswith("```")), len(lines))
    if heading is None or heading > code:  # a comment in a piece of code
        return "", "\n".join(lines).strip("\n")
    rest = [*lines[:heading], *lines[heading + 1 :]]
    return lines[heading], "\n".join(rest).strip("\n")


def _with_versions(text: str) -> str:
    """The text with this package's version, where PEFT and the Trainers put theirs."""
    lines = [line for line in text.split("\n") if not line.startswith("- peft-lrqat ")]
    if _VERSIONS not in lines:
        lines += ["", _VERSIONS, "", f"- PEFT {version('peft')}"]
    lines.insert(lines.index(_VERSIONS) + 2, f"- peft-lrqat {__version__}")
    return "\n".join(lines).strip("\n")

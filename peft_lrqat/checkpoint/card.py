"""The model card of a merged checkpoint: what was done. (That of an adapter: `adapter_card.py`.)"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from ..files import bytes_in_words, write_atomically
from ..formats.record import DATASET, ROWS, Record
from ..formats.usage import how_to_load
from ..installing import named
from ..modules.kv_cache import rounding_of
from ..modules.packed import MERGED
from .serving import Serving, serving

#: By the end of a card, one that this module wrote is known.
_SIGNATURE = re.compile(r"^Made with \[?peft-lrqat\b", re.MULTILINE)


#: The end of a class's name -> the Hub's word for what it does.
PIPELINES = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForFeatureExtraction": "feature-extraction",
}


def attach_card(model: nn.Module, text: str) -> None:
    """Make `save_pretrained` write a README.md beside the checkpoint, and `push_to_hub` push it.

    A README.md that is there is replaced if it is a card of this package, which another model may have left.
    """
    if not hasattr(model, "save_pretrained"):
        return
    object.__setattr__(model, "save_pretrained", partial(_save_with_card, model, text))
    object.__setattr__(model, "_upload_modified_files", partial(_upload_with_card, model, text))


def _save_with_card(model: Any, text: str, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
    result = type(model).save_pretrained(model, save_directory, *args, **kwargs)
    path = Path(save_directory) / "README.md"
    if kwargs.get("is_main_process", True) and path.parent.is_dir() and not _of_somebody(path):
        write_atomically(path, text)
    return result


def _of_somebody(card: Path) -> bool:
    return card.exists() and not _SIGNATURE.search(card.read_text(encoding="utf-8", errors="replace"))


def _upload_with_card(model: Any, text: str, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
    # push_to_hub writes an automatic card over the one that save_pretrained wrote; a card the repository has is kept
    path = Path(working_dir) / "README.md"
    if path.exists() and "This model card has been automatically generated" in (made := path.read_text("utf-8")):
        card: Any = ModelCard(text)  # its `data` are typed as those of any card, without `tags`
        made_tags: list[str] = ModelCard(made).data.get("tags") or []
        card.data.tags = [*card.data.tags, *(tag for tag in made_tags if tag not in card.data.tags)]
        write_atomically(path, card.content)
    return type(model)._upload_modified_files(model, working_dir, *args, **kwargs)


def merged_card(
    model: nn.Module,
    config: Any,
    record: Record,
    served: Serving,
) -> str:
    """The card of a merged model.

    Args:
        config: of the adapter that was merged: `method`, `bits`, `stored_bits`, `export_format` and
            `base_model_name_or_path` are read.
        record: how it was trained.
        served: how to serve it.
    """
    causal = type(model).__name__.endswith("ForCausalLM")
    quantized: list[Any] = [m for m in model.modules() if isinstance(m, MERGED)]
    weights = sum(m.in_features * m.out_features for m in quantized)
    packed = sum(b.numel() * b.element_size() for m in quantized for b in m.buffers())
    described = getattr(model.config, "quantization_config", None) or {}
    form = described.get("format", "2 bits").replace("quantized", f"quantized, {config.stored_bits} bits")
    return card_text(
        origin=config.base_model_name_or_path or getattr(model.config, "_name_or_path", "") or "a float model",
        title=f"{config.bits} bits, trained with {config.method}",
        tags=[config.export_format or "", config.method.lower().replace(" ", "-"), "qat", f"{config.bits}-bit"],
        grid=record.grid.describe(),
        container=f"{described.get('quant_method')} {form}" if weights else "dense, values on the grid",
        layers=len(quantized),
        weights=weights,
        packed_bytes=packed,
        total_bytes=sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())),
        scale_dtype=record.scale_dtype,
        recipe=record.recipe,
        usage=usage(_how_to_load(model, described), served, in_vllm=causal),
        trainings=record.trainings,
        pipeline=next((task for end, task in PIPELINES.items() if type(model).__name__.endswith(end)), None),
    )


def _how_to_load(model: nn.Module, described: Mapping[str, Any]) -> str:
    """By the Auto class of causal language models, or by the model's own class, so that no head is lost."""
    install = '"compressed-tensors>=0.18"' if described.get("quant_method") == "compressed-tensors" else ""
    name = type(model).__name__
    if name.endswith("ForCausalLM") or not hasattr(transformers, name):
        return how_to_load(install)
    return how_to_load(install, f"from transformers import {name}\nmodel = {name}.from_pretrained")


def base_name(origin: str) -> tuple[str, bool]:
    """What a card calls a base model, and whether that is a repository of the Hub.

    Args:
        origin: a repository of the Hub, or a folder; its path means nothing to others.
    """
    on_hub = "/" in origin and not os.path.isabs(origin) and not os.path.exists(origin)
    return (origin, True) if on_hub else (Path(origin).name or "a float model", False)


def table(rows: Mapping[str, str]) -> str:
    """A Markdown table of two columns without headings."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def linked(recipe: str) -> str:
    """A recipe, which is plain text, in Markdown: its papers are links."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[\g<0>](https://arxiv.org/abs/\1)", recipe)


def training_rows(trainings: Sequence[Mapping[str, str]]) -> tuple[dict[str, str], list[str]]:
    """What a card says of trainings: rows of its table (name -> Markdown), and repositories of data sets on the Hub.

    Args:
        trainings: as `Record` has them.
    """
    rows = {
        f"{name} {number}" if len(trainings) > 1 else name: said
        for number, training in enumerate(trainings, 1)
        for name in ROWS
        if (said := training.get(name))
    }
    return rows, list(dict.fromkeys(training[DATASET] for training in trainings if training.get(DATASET)))


def merged_serving(model: nn.Module, format: str | None, problem: str) -> Serving:
    """How to serve what `save_pretrained` writes of a merged model.

    Args:
        format: of what is written.
        problem: what keeps transformers from computing as was trained, or nothing.
    """
    quantized: list[Any] = [m for m in model.modules() if isinstance(m, MERGED)]
    infos = [m.info for m in quantized]
    layers = [(info.grid, info.container_bits, info.activations) for info in infos if info.kind == "linear"]
    return serving(format, layers, rounding_of(model), problem)


def usage(in_python: str, served: Serving, in_vllm: bool = True) -> str:
    """A card's section on loading, in Markdown.

    Args:
        in_python: its first part.
        in_vllm: whether vLLM serves the format.
    """
    parts = [in_python]
    if in_vllm and served.options is not None:
        parts.append(f"```bash\n{' '.join(filter(None, ('vllm serve path/or/repo', served.options)))}\n```")
    return "\n\n".join([*parts, *served.notes])


def card_text(
    *,
    origin: str,
    title: str,
    tags: list[str],
    grid: str,
    container: str,
    layers: int,
    weights: int,
    packed_bytes: int,
    total_bytes: int,
    scale_dtype: str | None,
    recipe: str | None,
    usage: str,
    exact: str = "The integers in this checkpoint are the ones that were trained: nothing was rounded afterwards.",
    trainings: Sequence[Mapping[str, str]] = (),
    pipeline: str | None = None,
) -> str:
    """README.md of a checkpoint on a grid.

    Args:
        origin: the base model: a repository of the Hub, or a folder, of which only the name is said.
        packed_bytes: of the quantized layers.
        usage: Markdown: how to load it.
        exact: what happened to the trained values.
        trainings: what Trainers have done (`Record`).
        pipeline: the Hub's word for what it does, if that is certain.
    """
    base, on_hub = base_name(origin)
    rows, datasets = training_rows(trainings)
    data = ModelCardData(
        library_name="transformers",
        tags=tags,
        base_model=base if on_hub else None,
        base_model_relation="quantized" if on_hub else None,
        datasets=datasets or None,
        pipeline_tag=pipeline,
    )
    size = f"{packed_bytes * 8 / weights:.2f} bits a quantized weight with scales; " if weights else ""
    scales = "exact in bf16 and fp16" if scale_dtype == "auto" else scale_dtype or "as found"
    facts = {
        "base model": f"[{base}](https://huggingface.co/{base})" if on_hub else base,
        "grid": grid,
        "container": container,
        "quantized layers": f"{layers} linear layers, {_count(weights)} weights",
        "size": f"{size}{bytes_in_words(total_bytes)} in all",
        "scales": scales,
        "recipe": linked(recipe or "unknown"),
        **rows,
    }
    return f"""---
{data.to_yaml()}
---

# {Path(base).name}, {title}

{table(facts)}

{exact}

{usage}

Made with {named()}.
"""


def _count(weights: int) -> str:
    return f"{weights / 1e6:.1f} M" if weights >= 1e6 else f"{weights:,}"

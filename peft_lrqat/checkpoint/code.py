"""Which class a checkpoint's model has, and the Python files of models that transformers does not know.

Such files are run only with `trust_remote_code=True`, and nobody is asked on the terminal. They travel along with what
is written, whether they are run or not.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.dynamic_module_utils import get_relative_imports
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..files import read_json

# The files whose `auto_map` names code.
_CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
            "video_preprocessor_config.json")  # fmt: skip


def read_config(folder: Path, described: dict[str, Any], trust_remote_code: bool) -> Any:
    """The configuration of a checkpoint.

    Args:
        described: what the folder's config.json says.

    Raises:
        ValueError: it is of a class that the folder's own code defines, which may not be run.
    """
    own = "AutoConfig" in (described.get("auto_map") or {}) and described.get("model_type") not in CONFIG_MAPPING
    if own and not trust_remote_code:
        raise ValueError(
            f"The model in {str(folder)!r} is defined by Python files of its own "
            f"({', '.join(path.name for path in code_files(folder)) or 'elsewhere on the Hub'}), which are run only if "
            "you say so. If you trust them, pass trust_remote_code=True."
        )
    return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def class_of(config: Any, trust_remote_code: bool) -> Any:
    """The class that `config.architectures` names, to load it with: transformers' own, or, where the model's code may
    be run, the `AutoModel...` that knows it; None if there is none."""
    name = (config.architectures or [""])[0]
    if trust_remote_code:
        for auto, reference in (getattr(config, "auto_map", None) or {}).items():
            if isinstance(reference, str) and reference.rpartition(".")[2] == name and hasattr(transformers, auto):
                return getattr(transformers, auto)
    if not name:
        return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return getattr(transformers, name, None)


def without_weights(config: Any, trust_remote_code: bool) -> Any:
    """The model that a configuration describes, on the meta device; None if `class_of` knows no class."""
    kind = class_of(config, trust_remote_code)
    if kind is None:
        return None
    with torch.device("meta"):
        if hasattr(kind, "_from_config"):
            return kind._from_config(config)
        return kind.from_config(config, trust_remote_code=True)


def code_files(folder: Path) -> list[Path]:
    """The Python files in a folder that its configurations name, and those that these import."""
    waiting: list[str] = []
    for path in (folder / name for name in _CONFIGS):
        auto_map = read_json(path).get("auto_map") if path.exists() else None
        for entry in auto_map.values() if isinstance(auto_map, dict) else ():
            references = entry if isinstance(entry, list | tuple) else [entry]
            # "repository--file.Class" is elsewhere
            waiting += [r.partition(".")[0] for r in references if isinstance(r, str) and "--" not in r]
    found: dict[Path, None] = {}
    while waiting:
        path = folder / f"{waiting.pop()}.py"
        if path not in found and path.exists() and path.resolve().is_relative_to(folder.resolve()):
            found[path] = None
            waiting += get_relative_imports(path)
    return list(found)


def copy_code(source: Path, folder: Path) -> None:
    """Copy the files that `code_files` finds."""
    for path in code_files(source):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)

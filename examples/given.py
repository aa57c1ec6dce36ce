"""What users give the examples, data and models: opened, or refused in a sentence that names the option."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

_LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


def rows(name: str, split: str = "train") -> Dataset:
    """The rows of a file (.jsonl, .jsonl.gz, .parquet, .csv, .txt) or of a data set of the Hub.

    Args:
        name: a file, or a Hub id; after a colon its configuration, if it has several ("wikitext:wikitext-2-raw-v1").
        split: slices are allowed ("train[:10000]").

    Raises:
        ValueError: there is no such file or data set, it cannot be read, or it is empty.
    """
    path = Path(name)
    suffix = next((s for s in reversed(path.suffixes) if s in _LOADERS), None)
    if path.is_dir():
        raise ValueError(f"--dataset {name} is a folder. Name a file in it.")
    if path.exists() and suffix is None:
        raise ValueError(f"--dataset {name}: the file must be one of {', '.join(_LOADERS)}, perhaps with .gz.")
    if not path.exists() and (suffix is not None or path.is_absolute() or name.startswith(".")):
        raise ValueError(f"--dataset {name}: there is no such file in {path.parent.absolute()}.")
    if path.exists() and not path.stat().st_size:
        raise ValueError(f"--dataset {name}: the file is empty.")
    try:
        if path.exists():
            options = {"sample_by": "paragraph"} if suffix == ".txt" else {}
            found = load_dataset(_LOADERS[str(suffix)], data_files=name, split=split, **options)
        else:
            hub_id, _, configuration = name.partition(":")
            found = load_dataset(hub_id, configuration or None, split=split)
    except (DatasetsError, OSError, ValueError) as error:
        kind = f"as {suffix}" if path.exists() else "from the Hub, and there is no such file"
        raise ValueError(f"--dataset {name} cannot be read {kind}: {_reason(error)}") from error
    if not len(found):
        raise ValueError(f"--dataset {name} has no row in {split!r}.")
    return found


def chats(name: str, split: str = "train") -> Dataset:
    """Rows whose column "messages" is a chat: a list of messages, each with "role" and "content".

    Raises:
        ValueError: as `rows`, or the first row is no chat.
    """
    found = rows(name, split)
    check_chats(name, found)
    return found


def check_chats(name: str, documents: Dataset) -> None:
    """Raise ValueError unless the first row has a chat in its column "messages"."""
    if "messages" not in documents.column_names:
        raise ValueError(f'--dataset {name} has the columns {documents.column_names}, but no chats in "messages".')
    first = documents[0]["messages"]
    if not (
        isinstance(first, list)
        and first
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in first)
    ):
        raise ValueError(
            f'--dataset {name}: "messages" of the first row is {first!r:.80}, but a chat is a list of messages, each '
            'with "role" and "content".'
        )


def tokenizer_of(model: str, *, for_chats: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, which is a folder or a Hub id.

    Args:
        for_chats: it must have a chat template.

    Raises:
        ValueError: there is no such model, or its folder has no tokenizer, or that has no template.
    """
    folder = Path(model)
    if not folder.is_dir() and (folder.exists() or folder.is_absolute() or model.startswith(".")):
        raise ValueError(f"--model {model}: there is no such folder.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"--model {model}: the folder has no config.json, so it holds no model of transformers.")
    try:
        found = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        if folder.is_dir():
            raise ValueError(
                f"--model {model}: the folder has no tokenizer that transformers can load. Save that of the model "
                f"there: `AutoTokenizer.from_pretrained(...).save_pretrained({model!r})`."
            ) from error
        raise ValueError(f"--model {model} is no folder, and cannot be had from the Hub: {_reason(error)}") from error
    if for_chats and found.chat_template is None:
        raise ValueError(f"--model {model}: its tokenizer has no chat template. Take an instruct model.")
    return found


def _reason(error: BaseException) -> str:
    """The first line of what went wrong in the first place."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

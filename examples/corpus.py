"""Text to train and to evaluate on: any data set of the Hub, a local file, or Python's own documentation."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from datasets import Dataset
from given import check_chats, rows

#: Every tenth module of the standard library is held out.
HELD_OUT_EVERY = 10
#: So much of each module, in characters: many modules, a little of each, and quick to collect.
MODULE_LENGTH = 6000
#: Left out: tests, the generated, and what `pip` brings.
_SKIPPED = ("test", "tests", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages", "lib-dynload")


def python_documentation() -> tuple[Dataset, Dataset]:
    """(training, held-out) documents, column "text": the texts of `help()` and the standard library's docstrings.

    Every Python installation has them, and they differ a little between versions. The split is by module, and a
    paragraph of the training text never occurs in the held-out text.
    """
    seen: set[str] = set()
    modules = list(_modules(Path(sysconfig.get_paths()["stdlib"])))
    held_out = modules[::HELD_OUT_EVERY]
    training = [text for text in modules if text not in set(held_out)]
    trained = [_without(seen, text) for text in (*topics.values(), *training)]
    evaluated = [_without(seen, text) for text in held_out]
    return tuple(Dataset.from_dict({"text": [t for t in texts if len(t) > 200]}) for texts in (trained, evaluated))


def _modules(library: Path) -> Iterator[str]:
    """The documentation of each top-level module or package of the standard library, as one text."""
    for path in sorted(library.iterdir()):
        if path.name in _SKIPPED or not (path.suffix == ".py" or (path / "__init__.py").is_file()):
            continue
        text = f"Help on {path.stem}"
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            if len(text) < MODULE_LENGTH and not set(file.relative_to(library).parts) & set(_SKIPPED):
                text = "\n\n".join((text, *_docstrings(file)))
        yield text[:MODULE_LENGTH]


def _docstrings(file: Path) -> Iterator[str]:
    """Docstrings of a source file, each under the name and arguments of what it documents."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        doc = ast.get_docstring(node)
        if doc and isinstance(node, ast.Module):
            yield doc
        elif doc:
            arguments = f"({ast.unparse(node.args)})" if hasattr(node, "args") else ""
            yield f"{node.name}{arguments}\n" + "\n".join(f"    {line}".rstrip() for line in doc.splitlines())


def _without(seen: set[str], text: str) -> str:
    """`text` less the paragraphs that were seen before, spaces aside; adds the others to `seen`."""
    kept = []
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split())
        if key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept)


def from_user(name: str, split: str, eval_split: str | None, column: str | None) -> tuple[Dataset, Dataset]:
    """(training, held-out) documents of a file (.jsonl, .jsonl.gz, .parquet, .csv, .txt) or of a data set of the Hub.

    Args:
        name: a file, or a Hub id; after a colon its configuration, if it has several ("wikitext:wikitext-2-raw-v1").
        split: training split, slices allowed ("train[:10000]").
        eval_split: held-out split; None: every twentieth document of `split`, at most 500.
        column: "text", "messages" or what it is called; None: found.

    Returns:
        Data sets with one column, "text" or "messages".

    Raises:
        ValueError: there is no such data, or it cannot be read, or there is no such column.
    """
    documents = rows(name, split)
    column = column or next((c for c in ("messages", "text") if c in documents.column_names), None)
    if column is None:
        raise ValueError(f"--dataset {name} has the columns {documents.column_names}; name one with --text-column.")
    target = "messages" if column == "messages" else "text"
    documents = _filled(name, documents, column)
    if eval_split is not None:
        held_out = _filled(name, rows(name, eval_split), column)
    else:
        if len(documents) < 2:
            raise ValueError(f"--dataset {name} has one document, so nothing can be held out; name an --eval-split.")
        every = min(20, len(documents))
        held = range(0, min(len(documents), 500 * every), every)
        rest = sorted(set(range(len(documents))) - set(held))
        documents, held_out = documents.select(rest), documents.select(held)
    if column != target:
        documents, held_out = (d.rename_column(column, target) for d in (documents, held_out))
    return documents, held_out


def _filled(name: str, documents: Dataset, column: str) -> Dataset:
    """One column, without the rows in which it is empty."""
    if column not in documents.column_names:
        raise ValueError(f"--dataset {name} has the columns {documents.column_names}; name one with --text-column.")
    filled = documents.select_columns(column).filter(lambda document: bool(document[column]))
    if not len(filled):
        raise ValueError(f"--dataset {name}: {column!r} is empty in every row.")
    if column == "messages":
        check_chats(name, filled)
    elif not isinstance(filled[0][column], str):
        raise ValueError(f"--dataset {name}: {column!r} of the first row is {filled[0][column]!r:.80}, no text.")
    return filled

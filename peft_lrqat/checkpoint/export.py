"""`export`: write a trained model in a format that an engine reads, exactly; `can_export`: whether that is possible."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils.logging import tqdm

from ..arguments import check_flags, check_folder, options_of
from ..files import new_folder, write_atomically
from ..formats import writer_of
from ..formats.gguf.reader import GGUFFile
from ..formats.shards import parse_size
from ..formats.source import Source
from ..formats.writer import Settings, Writer, Written, make_options
from . import compare
from .card import card_text, usage
from .code import copy_code
from .findings import Check, Report
from .folder import FolderSource
from .hub import repository
from .open import open_source
from .places import check_apart, fetched_apart
from .serving import Serving, stored_serving
from .verify_gguf import differences, float_differences, gguf_file

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip


def can_export(
    model_or_dir: Any,
    format: str = "compressed-tensors",
    *,
    container_bits: int | None = None,
    allow_inexact: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> Check:
    """Tell whether `export` would succeed. Nothing is written.

    The answer is found from shapes, grids and scales. Codes are read only where they decide: for a GGUF `type` that was
    named, and that holds some values of a grid and not others. The tokenizer, which a GGUF file holds too, is not asked
    for.

    Args:
        model_or_dir (Any): as for `export`.
        format (str): as for `export`.
        container_bits (int | None): as for `export`.
        allow_inexact (bool): count what would change values as possible.
        trust_remote_code (bool): as for `export`.
        **options (Any): as for `export`.

    Returns:
        A `Check`. It is true or false, and has the `problems` by layer. Printed, it gives reasons and what helps.

    Raises:
        ValueError: there is no such format or option, or the source cannot be read.

    Examples:
        >>> from peft_lrqat import can_export
        >>> print(can_export(model, "gptq"))
        gptq: exact.
        >>> bool(can_export(model, "bitnet"))  # it holds ternary weights only
        False
    """
    check_flags(trust_remote_code=trust_remote_code)
    chosen, settings = _settings(format, container_bits, allow_inexact, options)
    return Check(format, tuple(chosen.problems(open_source(model_or_dir, trust_remote_code), settings)), allow_inexact)


def export(
    model_or_dir: Any,
    out: str | os.PathLike,
    format: str = "compressed-tensors",
    *,
    tokenizer: Any = None,
    container_bits: int | None = None,
    overwrite: bool = False,
    allow_inexact: bool = False,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
    trust_remote_code: bool = False,
    **options: Any,
) -> Report:
    """Write a trained model in another format, from its codes and scales. No weight is rounded a second time.

    Layers are merged, packed and written one at a time. The folder appears when it is complete, or not at all. What is
    wrong with its place is found before the source is opened.

    Args:
        model_or_dir (Any): a merged model; a PeftModel with LR-QAT or low-bit SR adapters, which stays as it is; the
            folder of either, as `save_pretrained` wrote it; or its repository on the Hub ("owner/name",
            "owner/name@revision", "owner/name/subfolder"). For an adapter's folder the base model is loaded.
        out (str | os.PathLike): the folder to write.
        format (str): "compressed-tensors", "gptq", "bitnet", "torchao" or "gguf" (`peft_lrqat.formats.FORMATS`).
        tokenizer (Any): a tokenizer, or the folder or repository of one, which is saved too, with its chat template.
            None: the one beside the source, or beside an adapter's base model, if there is one.
        container_bits (int | None): width of the stored codes, at least the grid's. None: what training chose.
        overwrite (bool): replace a non-empty `out`.
        allow_inexact (bool): write even if values change. The report then has the measured loss.
        max_shard_size (int | str): bytes, or a text such as "5GB" or "200MB".
        progress (bool): show a bar. `transformers.utils.logging.disable_progress_bar` hides it, too.
        trust_remote_code (bool): run the Python files that a model brings along, in its folder or that of an adapter's
            base model. They are copied to `out` in any case.
        **options (Any): of the format. "gptq": `checkpoint_format` ("gptq" or "gptq_v2"). "gguf": `type` (ggml's type
            of the quantized layers, "auto"), `embedding_type` (of embeddings and head, "auto"), `tokenizer_pre`
            (llama.cpp's name of the pre-tokenizer, None), `vocabulary` (False leaves the tokenizer out).

    Returns:
        Report: where and what was written, how many layers and bytes, and the loss, which is None where every value is
            as trained.

    Raises:
        ValueError: the model cannot be written exactly in this format (see `can_export`), or an option is wrong.
            Nothing was written then.
        FileExistsError: `out` is not empty and `overwrite` is False; or it is a file, a mount point, the working
            directory, the source, the base model that an adapter needs, or a folder above or in one of these.
        BlockingIOError: another export is writing there.
        OSError: its place cannot be written in, or has no room.

    Examples:
        >>> from peft_lrqat import export
        >>> report = export(model, "out-gptq", "gptq", tokenizer=tokenizer)
        >>> report.loss is None  # exact
        True
        >>> report = export("out-gptq", "out", "compressed-tensors")
    """
    check_folder(out=out)
    out = Path(out)
    size = parse_size(max_shard_size)
    check_flags(overwrite=overwrite, progress=progress, trust_remote_code=trust_remote_code)
    chosen, settings = _settings(format, container_bits, allow_inexact, options)
    check_apart(out, model_or_dir, tokenizer)
    with new_folder(out, overwrite) as folder:
        source = open_source(fetched_apart(out, model_or_dir, tokenizer), trust_remote_code)
        check = Check(format, tuple(chosen.problems(source, settings)), allow_inexact)
        if not check:
            raise ValueError(str(check))
        _check_room(source, folder)
        found = tokenizer_of(tokenizer or source.tokenizer, trust_remote_code)
        settings = replace(settings, max_shard_size=size, tokenizer=found)
        with tqdm(total=len(source.grids()), desc=f"Writing {format}", unit="layer", disable=not progress) as bar:
            written = chosen.write(source, folder, settings, lambda name: bar.update())
        if written.loss is None:
            check_written(source, folder, progress)
        if chosen.tokenizer_files:
            save_tokenizer(settings.tokenizer, folder)
        served = _serving(source, folder)
        report = _report(chosen, source, written, folder, out, check, served.notes)
        write_atomically(folder / "README.md", _card(chosen, source, report, served))
    return report


def _serving(source: Source, folder: Path) -> Serving:
    """How to serve what was written."""
    if gguf_file(folder) is not None:
        return Serving()  # its writer's notes say it
    return stored_serving(FolderSource(folder, source.config))


def _settings(
    format: str, container_bits: Any, allow_inexact: bool, options: dict[str, Any]
) -> tuple[Writer, Settings]:
    check_flags(allow_inexact=allow_inexact)
    chosen = writer_of(format)
    made = make_options(chosen, options, options_of(export))
    whole = isinstance(container_bits, int) and not isinstance(container_bits, bool) and 2 <= container_bits <= 8
    if container_bits is not None and not whole:
        raise ValueError(f"`container_bits` is {container_bits!r}; it must be 2 to 8, or left out.")
    return chosen, Settings(container_bits, allow_inexact, options=made)


def _check_room(source: Source, folder: Path) -> None:
    """Raise OSError if not even the codes fit on the disk."""
    least = sum(info.weights * info.grid.code_bits for info in source.grids().values()) // 8
    free = shutil.disk_usage(folder).free
    if free < least:
        raise OSError(
            f"The codes alone take {least / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free in "
            f"{str(folder.parents[1])!r}. Make room, or name a folder on another disk."
        )


def check_written(source: Source, folder: Path, progress: bool = True) -> None:
    """Read the files back, and compare all integers, scales and zero points, and every other tensor, with the source's.

    Raises:
        RuntimeError: something differs: an error of this package, or of the disk.
    """
    if (file := gguf_file(folder)) is not None:
        stored = GGUFFile(file)
        wrong = {**differences(stored, source), **float_differences(stored, source)}
        different = [f"{name}: {what}" for name, what in wrong.items()]
    else:
        checkpoint = FolderSource(folder, source.config)
        with tqdm(total=len(checkpoint.grids()), desc="Comparing", unit="layer", disable=not progress) as bar:
            findings = [
                compare.integers(checkpoint, source, lambda name: bar.update()),
                compare.floats(checkpoint, source),
            ]
        different = [f"{finding.what}: {finding.detail}" for finding in findings if not finding.equal]
    if different:
        raise RuntimeError(
            f"What was written is not what was trained ({'; '.join(different[:3])}), so it was removed again. Check "
            "the disk; if it is sound, this is an error of peft-lrqat: please report it."
        )


def tokenizer_of(tokenizer: Any, trust_remote_code: bool) -> Any:
    """What `export` was given as a tokenizer, or the source has: a tokenizer, the folder of one, or None."""
    if (named := repository(tokenizer)) is None:
        return tokenizer
    return AutoTokenizer.from_pretrained(
        named.name, revision=named.revision or "main", subfolder=named.inside, trust_remote_code=trust_remote_code
    )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Put a tokenizer, or the files of the folder of one, beside a checkpoint.

    Raises:
        ValueError: there is no such folder, or no tokenizer in it.
    """
    if tokenizer is None:
        return
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
        return
    found = [Path(tokenizer) / name for name in _TOKENIZER_FILES if (Path(tokenizer) / name).exists()]
    if not found:
        what = "a folder without a tokenizer's files" if Path(tokenizer).is_dir() else "no folder"
        raise ValueError(f"`tokenizer` is {str(tokenizer)!r}, {what}. Name the folder of a tokenizer.")
    for path in found:
        shutil.copyfile(path, folder / path.name)
    copy_code(Path(tokenizer), folder)


def _report(
    chosen: Writer, source: Source, written: Written, folder: Path, out: Path, check: Check, notes: tuple[str, ...]
) -> Report:
    infos = source.grids()
    packed = [info for name, info in infos.items() if name not in written.dense]
    return Report(
        chosen.name,
        out,
        written.container,
        ", ".join(dict.fromkeys(info.grid.describe() for info in packed)),
        len(packed),
        written.weights,
        written.layer_bytes,
        sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        tuple(written.dense),
        written.loss,
        (*written.notes, *notes),
        tuple(dict.fromkeys(p.reason for p in check.problems if p.layer is None)),
    )


def _card(chosen: Writer, source: Source, report: Report, served: Serving) -> str:
    infos = list(source.grids().values())
    bits = infos[0].grid.bits
    lost = [*([str(report.loss)] if report.loss else []), *report.inexact]
    exact: dict[str, Any] = {"exact": f"This file is *not* exact: {'; '.join(lost)}."} if lost else {}
    return card_text(
        origin=source.base or source.origin,
        title=f"{bits} bits, {chosen.name}",
        tags=[chosen.name, "qat", f"{bits}-bit"],
        grid=report.grid,
        container=f"{chosen.name} {report.container}".strip(),
        layers=report.layers,
        weights=report.weights,
        packed_bytes=report.layer_bytes,
        total_bytes=report.total_bytes,
        scale_dtype=source.scale_dtype,
        recipe=source.recipe,
        trainings=source.trainings,
        usage=usage(chosen.usage, served, chosen.in_vllm),
        **exact,
    )

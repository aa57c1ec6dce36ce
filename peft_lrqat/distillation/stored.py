"""A teacher's k most likely tokens at each position of a training set, written once and read in place of a teacher.

    teacher.json               what was stored: teacher, k, temperature, vocabulary; whether all rows are there
    000-00000.safetensors      process and number; of n sequences with m tokens that count
        keys                   uint8 (n, 16), see `Segment`
        ends                   int64 (n,): where a sequence ends among the m
        indices                (m, k) uint16, or int32 for vocabularies above 65,536
        log_probs              fp16 (m, k + 1), see `TopK`

Files appear whole or not at all. A token takes 4 k + 2 bytes (258 for k = 64), or 6 k + 2 (386) with a large
vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import Trainer

from ..arguments import check_folder, with_suggestions
from ..files import read_json, write_atomically
from ..tuners.common import loss as lean
from .loss import TopK, check_options, top_k
from .segments import check_positions, segments, without_padding
from .teacher import ModelTeacher, causal_lm, check_keep, check_teacher, load_teacher

MANIFEST = "teacher.json"


@with_suggestions
def store_logits(
    trainer: Any,
    folder: str | os.PathLike,
    teacher: str | os.PathLike | nn.Module,
    *,
    k: int = 64,
    temperature: float = 1.0,
    keep: str | None = None,
    shard_tokens: int = 1 << 19,
    progressbar: bool = True,
) -> None:
    """Store a teacher's predictions for all that a Trainer will train on. Training then needs no teacher.

    The batches are the Trainer's own, one epoch of them, so the chat template, truncation and packing are those of
    training. Every process stores its share. Only positions whose label counts are stored. After an interruption the
    same call goes on where it was; sequences that are there already are not computed again.

    Args:
        trainer (Trainer): transformers' Trainer, or a subclass such as TRL's SFTTrainer, with a training set that comes
            to an end.
        folder (str | os.PathLike): where to. It is made if it does not exist, and all processes share it.
        teacher (str | os.PathLike | nn.Module): as for `Distillation`.
        k (int): how many tokens are kept at each position, from 1 to the vocabulary's size. The others become one
            event.
        temperature (float): at which `Distillation` will be used, above 0.
        keep (str | None): as for `Distillation`.
        shard_tokens (int): tokens a file.
        progressbar (bool): show the batches go by.

    Raises:
        ValueError: an option is out of range, the folder holds logits of something else, or the teacher does not fit
            the student, as for `Distillation`.

    Examples:
        >>> from peft_lrqat import Distillation, LRQATConfig, store_logits
        >>> from trl import SFTConfig, SFTTrainer
        >>> trainer = SFTTrainer(
        ...     "Qwen/Qwen3-0.6B",
        ...     SFTConfig("adapter", learning_rate=1e-3, max_steps=10),
        ...     train_dataset=dataset,
        ...     peft_config=LRQATConfig(task_type="CAUSAL_LM"),
        ...     callbacks=[Distillation("logits")],
        ... )
        >>> store_logits(trainer, "logits", "Qwen/Qwen3-0.6B", k=64)
        >>> trainer.train()
    """
    check_options(temperature, 1.0)
    if not isinstance(trainer, Trainer):
        raise ValueError(
            f"`trainer` is a {type(trainer).__name__}; it must be the Trainer that will train, whose batches are read."
        )
    check_folder(folder=folder)
    check_teacher(teacher)
    check_keep(keep, teacher)
    student = causal_lm(trainer.model)
    vocabulary = student.config.get_text_config().vocab_size
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= vocabulary:
        raise ValueError(f"`k` is {k!r}; it must be from 1 to the vocabulary's size, {vocabulary}.")
    if not isinstance(teacher, nn.Module):
        teacher = load_teacher(teacher, student, keep)
    source = ModelTeacher(teacher, student)
    try:
        made = {"k": k, "temperature": temperature, "vocabulary": vocabulary, **_identity(teacher)}
        rank = trainer.accelerator.process_index
        with trainer.accelerator.main_process_first():
            writer = _Writer(Path(folder), made, rank, shard_tokens)
        trainer.accelerator.wait_for_everyone()  # nobody lists files before all have read what is there
        with torch.random.fork_rng(devices=[]):  # the order of training is not to depend on this
            batches = tqdm(_all_batches(trainer), desc="teacher", disable=not progressbar or rank > 0)
            for batch in batches:
                with torch.no_grad(), trainer.accelerator.autocast():
                    writer.add(source, {n: v for n, v in batch.items() if n != "num_items_in_batch"})
        writer.flush()
        trainer.accelerator.wait_for_everyone()
        if rank == 0:
            write_atomically(Path(folder) / MANIFEST, json.dumps({**made, "complete": True}, indent=2))
        trainer.accelerator.wait_for_everyone()
    finally:
        source.release()


def _all_batches(trainer: Any) -> Any:
    """The Trainer's batches, with the last one even if training drops it: another epoch drops other rows."""
    dropped, trainer.args.dataloader_drop_last = trainer.args.dataloader_drop_last, False
    try:
        return trainer.get_train_dataloader()
    finally:
        trainer.args.dataloader_drop_last = dropped


def _identity(teacher: Any) -> dict[str, Any]:
    """Which model: its name, and a checksum of the first numbers of every tensor."""
    found = hashlib.blake2b(digest_size=8)
    for name, tensor in teacher.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta":  # accelerate keeps it elsewhere
            found.update(tensor.flatten()[:64].to("cpu", torch.float32).numpy().tobytes())
    return {"teacher": getattr(teacher.config, "_name_or_path", ""), "checksum": found.hexdigest()}


class _Writer:
    """Collects sequences, and writes a file whenever there are enough."""

    def __init__(self, folder: Path, made: dict[str, Any], rank: int, shard_tokens: int) -> None:
        self.folder, self.rank, self.shard_tokens = folder, rank, shard_tokens
        self.k, self.temperature = made["k"], made["temperature"]
        self.indices = torch.uint16 if made["vocabulary"] <= 1 << 16 else torch.int32
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / MANIFEST
        if not path.exists():
            if any(folder.iterdir()):
                raise ValueError(f"The folder {str(folder)!r} holds something else. Name a new one.")
            write_atomically(path, json.dumps({**made, "complete": False}, indent=2))
        found = read_json(path)
        other = sorted(key for key in made if made[key] != found.get(key))
        if other:
            listed = "; ".join(f"{key}: {found.get(key)!r} there, {made[key]!r} here" for key in other)
            raise ValueError(f"{str(folder)!r} holds other logits ({listed}). Use the same settings, or a new folder.")
        self.known = {key for shard in _shards(folder) for key in _keys(shard)}
        self.number = sum(1 for path in folder.glob(f"{rank:03d}-*.safetensors"))
        self._clear()

    def _clear(self) -> None:
        self.keys: list[bytes] = []
        self.ends: list[int] = []
        self.parts: list[TopK] = []
        self.tokens = 0

    def add(self, source: ModelTeacher, batch: Mapping[str, Any]) -> None:
        """Ask the teacher for a batch, if there is a sequence in it that is not stored."""
        given = batch.get("labels") if batch.get("shift_labels") is None else batch["shift_labels"]
        if given is None:
            raise ValueError(
                "The Trainer's batches have no `labels`, which say what is predicted. Add them to its data."
            )
        targets = lean.shifted(given, batch.get("shift_labels"), -100).view(given.shape)
        targets = without_padding(batch, targets)
        new = []
        for segment in segments(batch, targets):
            if segment.key not in self.known:
                self.known.add(segment.key)
                new.append(segment)
        if not new:
            return
        check_positions(source.model, batch)
        logits = source.targets(batch, targets).flatten(0, -2)
        for segment in new:
            rows = segment.rows.to(logits.device)
            for part in lean.chunks(len(rows), logits.shape[1]):
                found = top_k(logits[rows[part]], self.k, self.temperature)
                self.parts.append(TopK(found.indices.to("cpu", self.indices), found.log_probs.to("cpu", torch.float16)))
            self.keys.append(segment.key)
            self.tokens += len(rows)
            self.ends.append(self.tokens)
        if self.tokens >= self.shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Write what was collected."""
        if not self.keys:
            return
        tensors = {
            "keys": torch.frombuffer(bytearray(b"".join(self.keys)), dtype=torch.uint8).view(-1, 16),
            "ends": torch.tensor(self.ends),
            "indices": torch.cat([part.indices for part in self.parts]),
            "log_probs": torch.cat([part.log_probs for part in self.parts]),
        }
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".writing-") as scratch:
            save_file(tensors, Path(scratch) / "shard")
            os.replace(Path(scratch) / "shard", self.folder / f"{self.rank:03d}-{self.number:05d}.safetensors")
        self.number += 1
        self._clear()


class StoredLogits:
    """A folder that `store_logits` wrote, as a teacher."""

    def __init__(self, folder: str | os.PathLike, student: Any, temperature: float) -> None:
        """
        Args:
            student: the causal language model that is trained.
            temperature: of the loss.

        Raises:
            ValueError: writing did not come to its end, a file is damaged, or the logits are of another vocabulary or
                temperature.
        """
        self.folder, self.student = Path(folder), student
        made = read_json(self.folder / MANIFEST)
        if not made.get("complete"):
            raise ValueError(f"The logits in {str(folder)!r} are not complete. Call `store_logits` again; it goes on.")
        own = student.config.get_text_config().vocab_size
        if made["vocabulary"] != own:
            raise ValueError(
                f"The logits in {str(folder)!r} are of a vocabulary of {made['vocabulary']} tokens; the student's has "
                f"{own}. Store those of a teacher with the student's tokenizer."
            )
        if made["temperature"] != temperature:
            raise ValueError(
                f"The logits in {str(folder)!r} are stored at the temperature {made['temperature']}, and `temperature` "
                f"is {temperature}. Use that one, or store them again."
            )
        self._shards = list(_shards(self.folder))
        self._places: dict[bytes, tuple[int, int, int]] = {}
        for number, shard in enumerate(self._shards):
            start = 0
            for key, end in zip(_keys(shard), shard.get_tensor("ends").tolist(), strict=True):
                self._places[key] = (number, start, end)
                start = end

    def release(self) -> None:
        """Close the files, and let go of the student."""
        self._shards, self.student = [], None

    def targets(self, inputs: Mapping[str, Any], shift_labels: torch.Tensor) -> TopK:
        """The `TopK` of a batch, on the labels' device.

        Args:
            inputs: what the student's forward is called with.
            shift_labels: (batch, tokens), as `without_padding` returns them.

        Raises:
            ValueError: a sequence is not there, or `segments` cannot read the batch.
        """
        check_positions(self.student, inputs)
        parts = []
        for segment in segments(inputs, shift_labels):
            place = self._places.get(segment.key)
            if place is None:
                raise ValueError(
                    f"A sequence that begins with the tokens {segment.ids} is not in {str(self.folder)!r}, or other "
                    "labels of it count. The training set, its truncation or its packing is not the one that was "
                    "stored. Call `store_logits` with this Trainer; it adds what is not there. (Rows that are packed "
                    "anew in each epoch are never all there: leave out their attention mask, or give a model.)"
                )
            number, start, end = place
            shard = self._shards[number]
            parts.append(TopK(*(shard.get_slice(name)[start:end] for name in TopK._fields)))
        device = shift_labels.device
        if not parts:
            shard = self._shards[0]
            parts = [TopK(*(shard.get_slice(name)[0:0] for name in TopK._fields))]
        with torch.autocast("cpu", enabled=False):  # it cannot join fp16, which the files hold
            joined = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
        return TopK(*(tensor.to(device) for tensor in joined))


def _shards(folder: Path) -> list[Any]:
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            found.append(safe_open(path, "pt"))
        except SafetensorError as error:
            raise ValueError(
                f"{str(path)!r} is damaged ({error}). Delete it, and call `store_logits` again."
            ) from error
    return found


def _keys(shard: Any) -> list[bytes]:
    return [bytes(row) for row in shard.get_tensor("keys").numpy()]

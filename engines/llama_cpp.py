"""Merged SmolLM2 checkpoints, exported to GGUF, beside transformers: perplexity, greedy tokens, a chat.

    python engines/llama_cpp.py            all that run.py trained, and mixtures that are trained here
    python engines/llama_cpp.py w4-g64     only these, and only their rows of benchmarks/results/llama_cpp.json

Run by the project's Python. llama.cpp comes with `xllamacpp`. transformers computes in
float32 with the exact weights of the grid; llama.cpp has the same weights, rounds activations to 8 bits in blocks of 32
(256 for some types), and keeps its cache in float32 here, so the difference is that rounding's.

Exit code 0: perplexities within 2 %, and texts split into the same tokens. Where llama.cpp's greedy token differs from
transformers', its distance from the best logit is recorded.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from checkpoints import make
from corpus import python_documentation
from environment import machine
from perplexity import perplexity, windows
from specs import CHATS, COMPLETIONS, MIXTURES, NEW_TOKENS

from peft_lrqat import export
from peft_lrqat.checkpoint.open import open_source
from tests.ggml import Llama

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "llama_cpp.json"
WINDOW, TOKENS = 512, 2048
#: (checkpoint, options of the export)
RUNS: list[tuple[str, dict[str, str]]] = [
    ("w4-g64", {}),
    ("w4-g64", {"embedding_type": "q8_0"}),
    ("w4-channel", {}),
    ("w3-g64-in-4", {}),
    ("w4-g64-asym", {}),
    ("w2-g64-asym-in-4", {}),
    *((spec.name, {}) for spec in MIXTURES),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="checkpoints; default: all")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "engines", help="where they are")
    arguments = parser.parse_args()
    names = arguments.names
    # now: the commit that runs, whatever is committed meanwhile
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    head = {"commit": commit, "date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": machine()}
    head |= {"versions": {package: version(package) for package in ("xllamacpp", "torch", "transformers", "gguf")}}
    rows = []
    for name, options in RUNS:
        if names and name not in names:
            continue
        spec = next((spec for spec in MIXTURES if spec.name == name), None)
        if spec is not None and not (arguments.folder / name / "tokenizer.json").exists():
            make(spec, arguments.folder / name)
        if (arguments.folder / name).is_dir():
            rows.append(compare(arguments.folder / name, options) | head)
            print(json.dumps(rows[-1]), flush=True)
    print("\n" + table(rows))
    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    by_run = {_run(row): row for row in (*kept, *rows)}
    ordered = [by_run[run] for name, options in RUNS if (run := (name, json.dumps(options))) in by_run]
    record = {"command": "python engines/llama_cpp.py", "rows": ordered}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    failed = [row for row in rows if not row["ok"]]
    print(f"\n{len(rows) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed or not rows else 0


def _run(row: dict[str, Any]) -> tuple[str, str]:
    return row["checkpoint"], json.dumps(row["options"])


def compare(folder: Path, options: dict[str, str]) -> dict[str, Any]:
    """One row."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = exact_model(folder)
    texts = [tokenizer(document)["input_ids"] for document in python_documentation()[1]["text"]]
    tokens = windows(texts, tokenizer.eos_token_id, WINDOW, TOKENS)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        started = time.perf_counter()
        report = export(folder, out, format="gguf", progress=False, **options)
        seconds = time.perf_counter() - started
        path = next(out.glob("*.gguf"))
        theirs = perplexity_in_llama_cpp(path, tokens)
        with Llama(path, context=WINDOW) as llama:
            prompts = [tokenizer.encode(text) for text in COMPLETIONS]
            chats = [chat(tokenizer, text) for text in CHATS]
            alike = all(llama.tokenize(text) == ids for text, ids in zip(COMPLETIONS, prompts, strict=True))
            alike &= all(llama.tokenize(text) == ids for text, ids in chats)
            answers = [greedy(model, path, ids) for ids in (*prompts, *(ids for _, ids in chats))]
            said = llama.pieces(answers[len(prompts)]["theirs"])
    ours = perplexity(model, tokens, batch_size=1)
    gaps = [answer["gap"] for answer in answers if answer["gap"] is not None]
    return {
        "checkpoint": folder.name,
        "options": options,
        "container": report.container,
        "bits_per_weight": round(report.bits_per_weight, 3),
        "megabytes": round(report.total_bytes / 1e6, 1),
        "export_seconds": round(seconds, 1),
        "perplexity_transformers": round(ours, 3),
        "perplexity_llama_cpp": round(theirs, 3),
        "same_tokens_for_text": alike,
        "equal_greedy": f"{sum(answer['equal'] for answer in answers)}/{len(answers) * NEW_TOKENS}",
        "gaps": [round(gap, 3) for gap in gaps],
        "tokens_per_second": round(
            len(answers) * NEW_TOKENS / sum(answer["seconds"] for answer in answers), 1
        ),
        "chat": said,
        "notes": list(report.notes),
        "ok": alike and abs(math.log(theirs / ours)) < 0.02,
    }  # fmt: skip


def exact_model(folder: Path) -> nn.Module:
    """The checkpoint in float32, with the grid's own weights. (transformers would round them to the scales' dtype.)"""
    source = open_source(folder)
    state = {name: tensor.float() for name, tensor in source.floats(source.grids())}
    for name in source.grids():
        state[f"{name}.weight"] = source.layer(name).dequantize(torch.float32)
    kind = getattr(transformers, source.config.architectures[0])
    return kind.from_pretrained(None, config=source.config, state_dict=state, dtype=torch.float32).eval()


def chat(tokenizer: Any, text: str) -> tuple[str, list[int]]:
    """The prompt that the chat template makes, as text and as tokens."""
    messages = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return prompt, tokenizer(prompt, add_special_tokens=False)["input_ids"]


def perplexity_in_llama_cpp(path: Path, tokens: torch.Tensor) -> float:
    losses = []
    for window in tokens:
        with Llama(path, context=WINDOW) as llama:
            logits = llama.logits(window.tolist())
        losses.append(nn.functional.cross_entropy(logits[:-1], window[1:]).item())
    return math.exp(sum(losses) / len(losses))


@torch.no_grad()
def greedy(model: Any, path: Path, prompt: list[int]) -> dict[str, Any]:
    """NEW_TOKENS greedy tokens of both; "gap": how far llama.cpp's first other token was from transformers' best."""
    theirs: list[int] = []
    with Llama(path, context=WINDOW) as llama:
        logits = llama.logits(prompt)[-1]
        started = time.perf_counter()
        for i in range(NEW_TOKENS):
            theirs.append(int(logits.argmax()))
            logits = llama.logits(theirs[-1:], len(prompt) + i)[-1]
        seconds = time.perf_counter() - started
    scores = model(torch.tensor([prompt + theirs])).logits[0, len(prompt) - 1 : -1]
    best = scores.argmax(-1).tolist()
    equal = next((i for i, (a, b) in enumerate(zip(best, theirs, strict=True)) if a != b), NEW_TOKENS)
    gap = None if equal == NEW_TOKENS else (scores[equal].max() - scores[equal, theirs[equal]]).item()
    return {"theirs": theirs, "equal": equal, "gap": gap, "seconds": seconds}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| checkpoint | types | bits a weight | MB | transformers | llama.cpp | equal greedy tokens |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        embeddings = row["options"].get("embedding_type")
        name = row["checkpoint"] + (f", embeddings {embeddings}" if embeddings else "")
        lines.append(
            f"| {name} | {row['container']} | {row['bits_per_weight']:g} | {row['megabytes']} "
            f"| {row['perplexity_transformers']:.2f} | {row['perplexity_llama_cpp']:.2f} | {row['equal_greedy']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

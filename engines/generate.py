"""Plain transformers on the served checkpoints: the tokens to compare with, and how close a race a token was.

    python generate.py tokens JOB.json ANSWER.json     greedy tokens of every checkpoint, dtype and prompt
    python generate.py races JOB.json ANSWER.json      logits where an engine chose another token

Runs in the project's environment, and in the engine's, whose transformers is another version; peft_lrqat cannot be
imported here. The dtypes are the engine's, and float32, in which the weights of a grid of up to 4 bits are exact.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

assert "peft_lrqat" not in sys.modules
sys.modules["peft_lrqat"] = None  # from here on, importing it fails


def load(folder: str, dtype: str) -> transformers.PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


@torch.no_grad()
def tokens(job: dict[str, Any]) -> dict[str, Any]:
    """{"checkpoint/dtype": [{"prompt", "tokens", "text", "logits": hash of the prompt's logits}]}."""
    answer: dict[str, Any] = {}
    for folder, dtype in job["runs"]:
        model, tokenizer = load(folder, dtype), AutoTokenizer.from_pretrained(folder)
        results = []
        for kind, text in job["prompts"]:
            if kind == "chat":
                message = [{"role": "user", "content": text}]
                ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
            else:
                ids = tokenizer(text)["input_ids"]
            prompt = torch.tensor([ids])
            logits = model(prompt).logits.float().contiguous()
            new = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=job["new_tokens"], do_sample=False
            )[0, len(ids) :].tolist()
            digest = hashlib.sha256(logits.numpy().tobytes()).hexdigest()[:16]
            results.append({"prompt": ids, "tokens": new, "text": tokenizer.decode(new), "logits": digest})
        answer[f"{Path(folder).name}/{dtype}"] = results
        print(f"transformers {transformers.__version__}: {Path(folder).name}, {dtype}", flush=True)
    return answer


@torch.no_grad()
def races(job: dict[str, Any]) -> list[dict[str, Any]]:
    """For each {"folder", "dtype", "prefix", "ours", "theirs"}: how far apart the two tokens' logits are.

    gap: logit(ours) - logit(theirs) in the dtype; gap_float32: with the same weights in float32; noise: the largest
    error, over the vocabulary, of the dtype's logits at this position. A gap_float32 within twice the noise is a tie as
    far as the dtype can tell.
    """
    out = []
    for race in job["races"]:
        ids = torch.tensor([race["prefix"]])
        low = load(race["folder"], race["dtype"])(ids).logits[0, -1].float()
        exact = load(race["folder"], "float32")(ids).logits[0, -1]
        ours, theirs = race["ours"], race["theirs"]
        out.append(
            {
                "gap": (low[ours] - low[theirs]).item(),
                "gap_float32": (exact[ours] - exact[theirs]).item(),
                "noise": (low - exact).abs().max().item(),
            }
        )
    return out


if __name__ == "__main__":
    mode, job_file, answer_file = sys.argv[1:]
    transformers.logging.set_verbosity_error()
    result = {"tokens": tokens, "races": races}[mode](json.loads(Path(job_file).read_text()))
    Path(answer_file).write_text(json.dumps(result))

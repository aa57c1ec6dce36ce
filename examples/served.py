"""Loads a merged checkpoint as any user would, without peft_lrqat, and reports what it computes: one JSON line.

    python examples/served.py CHECKPOINT JOB.json

JOB.json: {"windows": token ids to compute the perplexity of, "prompt": text to continue, or a list of texts, "device",
"dtype", "threads"}.
"""

from __future__ import annotations

import json
import sys

for plugin in ("peft_lrqat", "peft"):
    sys.modules[plugin] = None  # from here on, importing it raises ImportError

import quiet  # noqa: E402, F401

# isort: split
import torch  # noqa: E402
from perplexity import perplexity  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def main(checkpoint: str, job_file: str) -> None:
    with open(job_file, encoding="utf-8") as file:
        job = json.load(file)
    torch.set_num_threads(job["threads"])  # sums may depend on how they are split
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, job["dtype"])).to(job["device"])
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    value = perplexity(model, torch.tensor(job["windows"]))
    prompts = [job["prompt"]] if isinstance(job["prompt"], str) else job["prompt"]
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        texts.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(json.dumps({"perplexity": value, "text": texts[0] if isinstance(job["prompt"], str) else texts}))


if __name__ == "__main__":
    main(*sys.argv[1:])

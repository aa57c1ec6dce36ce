"""vLLM in this process, and weights that are loaded into it as TRL's colocated trainers do.

    python in_vllm.py JOB.json ANSWER.json

JOB: {"folder", "dtype", "prompts": [text], "new_tokens", "updates": [[way, safetensors file]]}.
ANSWER: greedy tokens, one list of lists before any update and one after each.

The ways are those of TRL's two modes: "colocate" calls the model's `load_weights` for one weight after the other;
"server" has the life cycle of a reload around that (`start_weight_update`, `finish_weight_update`).

vLLM's CPU build repacks the weights of linear layers for oneDNN, and keeps no place to load others into; the GPU build
leaves them as they are. The repacking is off here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}  # the first as TRL sets it

from safetensors.torch import load_file
from vllm import LLM, SamplingParams, _custom_ops

_custom_ops._supports_onednn = False

sys.modules.setdefault("peft_lrqat", None)  # type: ignore[arg-type]  # from here on, importing it fails


def answer(job: dict[str, Any]) -> list[list[list[int]]]:
    engine = LLM(job["folder"], dtype=job["dtype"], max_model_len=512, max_num_seqs=4, enforce_eager=True)
    greedy = SamplingParams(temperature=0, max_tokens=job["new_tokens"])

    def tokens() -> list[list[int]]:
        # one after the other: sums of a batch may be in another order
        return [list(engine.generate(text, greedy, use_tqdm=False)[0].outputs[0].token_ids) for text in job["prompts"]]

    found = [tokens()]
    runner = engine.llm_engine.model_executor.driver_worker.model_runner  # as TRL reaches it
    for way, file in job["updates"]:
        weights = load_file(file).items()
        if way == "server":
            runner.reload_weights(weights_iterator=iter(weights))
        else:
            for name, weight in weights:
                runner.model.load_weights([(name, weight)])
        engine.reset_prefix_cache()
        found.append(tokens())
    return found


if __name__ == "__main__":
    job_file, answer_file = map(Path, sys.argv[1:])
    answer_file.write_text(json.dumps(answer(json.loads(job_file.read_text()))))

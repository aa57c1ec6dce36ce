"""What `sync.py` gives to vLLM: a policy of each method, as TRL sends it and as its checkpoint has it.

python policies.py train FOLDER     FOLDER/float, and for each method FOLDER/<method>/{sent.safetensors, merged}
python policies.py dense FOLDER     FOLDER/<method>/dense: the merged checkpoint, decompressed by plain transformers; it
                                    must have what was sent, bit for bit
"""

from __future__ import annotations

import contextlib
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

METHODS = ("lrqat", "lowbit_sr")  # as in sync.py


def train(folder: Path) -> None:
    from checkpoints import batches
    from peft import get_peft_model
    from smollm2 import load_smollm2
    from trl.generation.vllm_generation import VLLMGeneration

    from peft_lrqat import LowBitAdamW, LowBitSRConfig, LRQATConfig, create_lrqat_optimizer

    for method in METHODS:
        torch.manual_seed(0)
        model, tokenizer = load_smollm2(torch.bfloat16)
        if method == METHODS[0]:
            for kept in (model, tokenizer):
                kept.save_pretrained(folder / "float")
        common = {"bits": 4, "group_size": 64, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        if method == "lrqat":
            model = get_peft_model(model, LRQATConfig(**common))
            optimizer = create_lrqat_optimizer(model, lr=4e-3)
        else:
            model = get_peft_model(model, LowBitSRConfig(**common))
            optimizer = LowBitAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        for ids in batches(tokenizer):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        syncing = VLLMGeneration.__new__(VLLMGeneration)  # its __init__ starts vLLM, which is in another environment
        syncing.model = model
        syncing._dist = types.SimpleNamespace(is_fsdp=False, gather_params=lambda _: contextlib.nullcontext())
        (folder / method).mkdir(parents=True, exist_ok=True)
        save_file(dict(syncing._iter_named_params()), folder / method / "sent.safetensors")
        model.merge_and_unload().save_pretrained(folder / method / "merged")
        tokenizer.save_pretrained(folder / method / "merged")
        print(f"{method}: trained, sent and merged", flush=True)


def dense(folder: Path) -> None:
    sys.modules["peft_lrqat"] = None  # type: ignore[assignment]  # from here on, importing it fails
    for method in METHODS:
        merged = folder / method / "merged"
        decompressed = CompressedTensorsConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16, quantization_config=decompressed)
        sent = load_file(folder / method / "sent.safetensors")
        wrong = [name for name, weight in model.named_parameters() if not torch.equal(sent.pop(name), weight)]
        if wrong or sent:
            raise SystemExit(f"{method}: {wrong or list(sent)} were sent otherwise than the checkpoint has them")
        model.save_pretrained(folder / method / "dense")
        AutoTokenizer.from_pretrained(merged).save_pretrained(folder / method / "dense")


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
    {"train": train, "dense": dense}[sys.argv[1]](Path(sys.argv[2]))

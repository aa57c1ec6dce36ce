"""Mixtures in GPTQ's format, both ways, with gptqmodel's own reader and quantizer on a CPU.

    .venv/bin/python engines/gptq_mixtures.py     writes benchmarks/results/gptq_mixtures.json

Tiny random mixtures (`tests/mixtures.py`). One way: adapters on all layers and experts, merged, exported, and read by
gptqmodel. The other: gptqmodel quantizes the float model on random tokens, `load_quantized` reads that, and an adapter
starts from it. Weights of every layer are compared for equality in fp16, logits and greedy tokens with transformers on
the same weights in float16. gptqmodel's environment is that of `make engines` (.venv-gptq, made on the first call).

Exit code 0: all weights that were read are equal, and adapters start where the checkpoint is.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from environment import clean_environment, ensure
from peft import get_peft_model
from run import HERE, ROOT, record

sys.path.insert(0, str(ROOT))
from peft_lrqat import LRQATConfig, export, load_quantized
from peft_lrqat.formats.gguf.tokenizer import PRE_TOKENIZERS
from tests.mixtures import FAMILIES, of_family, on_experts
from tests.tokenizers import VOCAB, bytewise

RESULTS = ROOT / "benchmarks" / "results" / "gptq_mixtures.json"
COUNT = 16
#: Layers of DeepSeek's that are left float: 48 rows here, which do not divide by 32.
_FLOAT = ["kv_a_proj_with_mqa"]
#: What gptqmodel calls parts of experts -> what Mixtral does.
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def main() -> int:
    python = ensure("gptq", ROOT)
    packages = ("torch", "transformers", "gptqmodel", "defuser")
    head = record(Path(sys.executable), {"engine": (python, packages)}, "python engines/gptq_mixtures.py")
    for other in ("model", "new_tokens_per_prompt", "prompts"):
        head.pop(other)
    numbers = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB - 8, (1, 12), generator=numbers)
    calibration = torch.randint(3, VOCAB - 8, (12, 64), generator=numbers)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        torch.save({"ids": ids, "calibration": calibration, "count": COUNT}, root / "job.pt")
        for family in FAMILIES:
            _write(family, root / family)
        environment = clean_environment() | {"TORCHDYNAMO_DISABLE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
        command = [str(part) for part in (python, HERE / "in_gptqmodel_mixtures.py", root, *FAMILIES)]
        subprocess.run(command, check=True, cwd=root, env=environment, stdout=subprocess.DEVNULL)  # it writes logs
        for family in FAMILIES:
            read = torch.load(root / family / "read.pt")
            for written in ("ours", "theirs"):
                row = _compare(root / family / written, read[written], ids)
                by = "peft_lrqat" if written == "ours" else "gptqmodel"
                rows.append({"family": family, "quantized_by": by, **row})
                print(json.dumps(rows[-1]), flush=True)
    RESULTS.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
    wrong = [row for row in rows if row["equal"] not in (row["layers"], None) or not row["starts_equal"]]
    return 1 if wrong else 0


def _write(family: str, folder: Path) -> None:
    """The float model, and a trained one as GPTQ."""
    tokenizer = bytewise(next(iter(PRE_TOKENIZERS.values())))
    model = of_family(family, torch.float16, vocab_size=VOCAB)
    model.save_pretrained(folder / "float")
    tokenizer.save_pretrained(folder / "float")
    adapted = on_experts(model, group_size=32, exclude_modules=_FLOAT)
    export(adapted.merge_and_unload(), folder / "ours", "gptq", tokenizer=tokenizer, progress=False)


@torch.no_grad()
def _compare(folder: Path, read: dict[str, Any], ids: torch.Tensor) -> dict[str, Any]:
    """What gptqmodel has read beside what `load_quantized` reads, and where an adapter starts."""
    model = load_quantized(folder, dtype=torch.float16).eval()
    layers: dict[str, Any] = {n: module for n, module in model.named_modules() if hasattr(module, "weight_packed")}
    out = model(input_ids=ids).logits
    tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False)
    found: dict[str, Any] = {"layers": len(layers), "equal": None, "logit_difference": None, "largest_logit": None}
    found |= {"equal_tokens": None, "tokens": COUNT}
    if "error" in read:
        found["refused"] = read["error"].partition(" in checkpoint")[0]
    else:
        theirs = {name if name in layers else _as_mixtral(name): weight for name, weight in read["weights"].items()}
        found["equal"] = sum(torch.equal(layer.weight, theirs[name]) for name, layer in layers.items())
        found["logit_difference"] = (out.float() - read["logits"]).abs().max().item()
        found["largest_logit"] = out.abs().max().item()
        pairs = zip(tokens[0, ids.shape[1] :].tolist(), read["tokens"][0].tolist(), strict=True)
        found["equal_tokens"] = sum(one == other for one, other in pairs)
    config = LRQATConfig(r=2, target_modules="all-linear", exclude_modules=_FLOAT, task_type="CAUSAL_LM")
    found["starts_equal"] = torch.equal(get_peft_model(model, config).eval()(input_ids=ids).logits, out)
    return found


def _as_mixtral(name: str) -> str:
    place, _, part = name.rpartition(".")
    return f"{place}.{_MIXTRAL.get(part, part)}"


if __name__ == "__main__":
    sys.exit(main())

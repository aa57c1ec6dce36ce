"""gptqmodel and mixtures: reads what this package wrote, and quantizes float ones (see `gptq_mixtures.py`).

python in_gptqmodel_mixtures.py FOLDER family ...

FOLDER/<family>/ours is read, float is quantized into theirs, which is read again; read.pt gets of each what the engine
computes: {"ours" and "theirs": {"weights": name -> (out, in), "logits", "tokens"} or {"error"}}.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import job  # noqa: F401  # from here on, importing peft_lrqat fails
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig


@torch.no_grad()
def read(folder: Path, ids: torch.Tensor, count: int) -> dict[str, Any]:
    try:
        loaded = GPTQModel.load(str(folder), device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH)
    except ValueError as error:
        return {"error": str(error)}
    model = loaded.model.eval()
    packed = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    weights = {name: module.dequantize_weight().t().contiguous() for name, module in packed.items()}
    mask = torch.ones_like(ids)
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
    return {"weights": weights, "logits": model(input_ids=ids).logits.float(), "tokens": out[:, ids.shape[1] :]}


def quantize(floats: Path, folder: Path, calibration: torch.Tensor) -> None:
    config = QuantizeConfig(bits=4, group_size=32, desc_act=False)
    model = GPTQModel.load(str(floats), config, device="cpu", dtype=torch.float16)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in calibration]
    model.quantize(rows, batch_size=1, backend=BACKEND.GPTQ_TORCH)
    model.save(str(folder))


if __name__ == "__main__":
    root = Path(sys.argv[1])
    asked = torch.load(root / "job.pt")
    for family in sys.argv[2:]:
        here = root / family
        found = {"ours": read(here / "ours", asked["ids"], asked["count"])}
        quantize(here / "float", here / "theirs", asked["calibration"])
        found["theirs"] = read(here / "theirs", asked["ids"], asked["count"])
        torch.save(found, here / "read.pt")
        print(family, "done", flush=True)

"""transformers: any folder that it loads, GGUF included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import job
import torch
import transformers
from transformers import AutoModelForCausalLM, GPTQConfig


def open_engine(wanted: dict[str, Any]) -> job.Engine:
    transformers.logging.set_verbosity_error()
    folder = Path(wanted["folder"])
    gguf = [path.name for path in folder.glob("*.gguf")]
    extra: dict[str, Any] = {"gguf_file": gguf[0]} if gguf else {}
    described = json.loads((folder / "config.json").read_text()).get("quantization_config", {}) if not gguf else {}
    if described.get("quant_method") == "gptq":  # its other backends compile a kernel first, for more than a minute
        extra["quantization_config"] = GPTQConfig(bits=described["bits"], backend="gptq_torch")
    return job.Causal(AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, wanted["dtype"]), **extra))


if __name__ == "__main__":
    job.answer(open_engine, ["transformers", "torch"])

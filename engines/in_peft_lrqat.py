"""`load_quantized`: what was trained, where plain transformers rounds activations by another rule."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import job
import torch


def open_engine(wanted: dict[str, Any]) -> job.Engine:
    del sys.modules["peft_lrqat"]  # `job` keeps other engines from importing it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from peft_lrqat import load_quantized

    return job.Causal(load_quantized(wanted["folder"], dtype=getattr(torch, wanted["dtype"])))


if __name__ == "__main__":
    job.answer(open_engine, ["transformers", "torch"])

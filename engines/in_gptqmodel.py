"""gptqmodel, with its PyTorch backend: the others compile a kernel first, for more than a minute."""

from __future__ import annotations

from typing import Any

import job
import torch
from gptqmodel import BACKEND, GPTQModel


def open_engine(wanted: dict[str, Any]) -> job.Engine:
    dtype = getattr(torch, wanted["dtype"])
    return job.Causal(GPTQModel.load(wanted["folder"], device="cpu", dtype=dtype, backend=BACKEND.GPTQ_TORCH).model)


if __name__ == "__main__":
    job.answer(open_engine, ["gptqmodel", "torch"])

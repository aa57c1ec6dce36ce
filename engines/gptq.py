r"""gptqmodel, through transformers and optimum, on every grid that a GPTQ file holds: codes, scales, weights, logits.

    pip install --no-deps optimum==2.3.0 gptqmodel==7.7.0 defuser==0.0.28 \
        device-smi pypcre tokenicer logbar threadpoolctl dill
    TORCHDYNAMO_DISABLE=1 python engines/gptq.py

gptqmodel 7.7 declares a newer torch than 2.13, with which it works, so it is installed beside the project without its
dependencies, and is in no extra. Its kernels compute in fp16: logits are compared within 2 % of the largest, everything
else for equality. At the first 4-bit layer it may compile a CPU kernel (a minute).

Exit code 0: everything is equal.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from peft_lrqat import Grid, export
from peft_lrqat.checkpoint.verify import verify
from tests.grids import on_grid

GRIDS = [Grid(bits, group, sym) for bits in (2, 3, 4, 8) for group in (-1, 32) for sym in (True, False)]


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        for grid in [*GRIDS, Grid(1.58, 0), Grid(4, 64)]:
            sizes = {"hidden_size": 128, "intermediate_size": 256}
            model = on_grid(grid, family="qwen2", dtype=torch.float16, **sizes)
            report = export(model, Path(temporary, "out"), "gptq", overwrite=True, progress=False)
            start = time.perf_counter()
            found = verify(report.folder, model)
            if found.missing:
                sys.exit(f"not installed: {', '.join(found.missing)}; the head of this file has the command")
            failed += not found
            print(f"{'equal' if found else 'FAILED'}: {grid.describe()} as {report.container}", end="; ")
            print(f"{time.perf_counter() - start:.0f} s", flush=True)
            for finding in found.findings:
                print(f"    {'' if finding.equal else 'NOT EQUAL '}{finding.what}: {finding.detail}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

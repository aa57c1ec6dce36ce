"""Memory and step time of a mixture of experts on one GPU: LR-QAT on packed experts beside PEFT's LoRA on float ones.

    python benchmarks/moe.py --out benchmarks/results/moe.json     # the shapes of Qwen3-30B-A3B
    python benchmarks/moe.py --offload --out moe.json              # with the base in the CPU's memory, too
    python benchmarks/moe.py --smoke --out moe.json                # tiny ones, on a CPU too

Random weights, adapters in fp32 on all experts and on attention, AdamW (fused), block checkpointing, autocast to bf16,
random tokens. One method after the other in one process, each on an empty GPU; per batch shape `--warm` steps, then
`--steps` timed ones (host clock around a synchronised step, median); the peak is that of the timed steps, optimizer
included, as torch counts allocated bytes. Both methods name the experts in `target_parameters`. `--limit` gives torch
so much of the GPU and no more, as a smaller card would.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import provenance, write_json
from gpu import fill, held, peak, reset_peak
from torch import nn

BITS, GROUP = 4, 128
SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
SMOKE = SHAPE | {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "moe_intermediate_size": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
#: name -> `learn_scales` of LR-QAT; None: LoRA
METHODS: dict[str, bool | str | None] = {
    "LR-QAT int4, groups of 128, fixed scales": False,
    "LR-QAT int4, groups of 128, by channel": "channel",
    "LR-QAT int4, groups of 128": True,
    "LoRA bf16": None,
}
#: what `--offload` means: the values of `offload_base`
PLACES = {"no": [False], "yes": [True], "both": [False, True]}


def adapted(
    learn_scales: bool | str | None, rank: int, offload: bool, args: argparse.Namespace, device: str
) -> nn.Module:
    """The model to train. LR-QAT's layers are made of float weights that share their memory, so that those of one layer
    exist."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from peft_lrqat import LRQATConfig

    fewer = {"num_hidden_layers": args.layers, "num_experts": args.experts}
    shape = (SMOKE if args.smoke else SHAPE) | {name: number for name, number in fewer.items() if number}
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape)).to(torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fill(model, device, shared=learn_scales is not None)
    common = {"r": rank, "lora_alpha": rank, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"}
    if learn_scales is None:
        config: LoraConfig = LoraConfig(**common, target_parameters=EXPERTS)
    else:
        grid: dict[str, Any] = {"bits": BITS, "group_size": GROUP, "downcast": "int", "range_method": "minmax"}
        config = LRQATConfig(
            **common, target_parameters=EXPERTS, **grid, learn_scales=learn_scales, offload_base=offload
        )
    return get_peft_model(model, config).train()


def measure(name: str, rank: int, offload: bool, args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Static memory, and peak and seconds a step for every batch shape."""
    gc.collect()  # what a run that found no room has left
    if device == "cuda":
        torch.cuda.empty_cache()
    assert held(device) < 0.2, f"{held(device):.2f} GiB are still held before {name}"
    started = time.perf_counter()
    model = adapted(METHODS[name], rank, offload, args, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    row: dict[str, Any] = {
        "method": name,
        "rank": rank,
        "offload_base": offload,
        "lean": args.lean,
        "limit_gib": args.limit,
        "layers": model.config.num_hidden_layers,
        "set_up_s": time.perf_counter() - started,
        "static_gib": held(device),
        "trained": sum(p.numel() for p in trained),
        "steps": {},
    }
    if args.lean:
        import bitsandbytes as bnb

        optimizer: torch.optim.Optimizer = bnb.optim.AdamW8bit(trained, lr=1e-4, weight_decay=0.0)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=device == "cuda")
    generator = torch.Generator().manual_seed(1)
    for shape in args.batches:
        batch, length = (int(n) for n in shape.split("x"))
        rows = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator).to(device)
        seconds, loss = [], torch.zeros(())
        for step in range(args.warm + args.steps):
            if step == args.warm:
                reset_peak(device)
            synchronise(device)
            begin = time.perf_counter()
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = model(input_ids=rows, labels=rows, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            synchronise(device)
            seconds.append(time.perf_counter() - begin)
        row["steps"][shape] = {
            "seconds": statistics.median(seconds[args.warm :]),
            "peak_gib": peak(device),
            "loss": loss.item(),
        }
    if args.profile and device == "cuda":
        from gpu import profile

        profile(model, rows, torch.autocast(device, dtype=torch.bfloat16))
    return row


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def options() -> argparse.ArgumentParser:
    """What can be typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--only", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ranks", nargs="*", type=int, default=[8, 16])
    parser.add_argument("--batches", nargs="*", default=["1x1024", "4x1024"])
    parser.add_argument("--layers", type=int, help="only so many blocks")
    parser.add_argument("--experts", type=int, help="only so many in a block")
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--offload", nargs="?", const="both", default="no", choices=PLACES, help="offload_base")
    parser.add_argument("--limit", type=float, help="GiB of the GPU that torch may use")
    parser.add_argument("--lean", action="store_true", help="optim=adamw_bnb_8bit")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that it runs")
    return parser


def main() -> None:
    args = options().parse_args()
    if args.smoke:
        args.batches, args.ranks, args.warm, args.steps = ["1x16"], [2], 0, 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.limit and device == "cuda":
        torch.cuda.set_per_process_memory_fraction(
            args.limit * 2**30 / torch.cuda.get_device_properties(0).total_memory
        )
    result: dict[str, Any] = {"command": vars(args), **provenance(), "runs": []}
    for rank in args.ranks:
        for name, offload in itertools.product(args.only, PLACES[args.offload]):
            if offload and METHODS[name] is None:
                continue
            try:
                row = measure(name, rank, offload, args, device)
            except torch.OutOfMemoryError as error:
                row = {"method": name, "rank": rank, "offload_base": offload, "error": str(error)[:200], "steps": {}}
            result["runs"].append(row)
            write_json(Path(args.out), result)
            shown = "  ".join(f"{s}: {v['seconds']:.3f} s {v['peak_gib']:.2f} GiB" for s, v in row["steps"].items())
            static, set_up = row.get("static_gib", 0.0), row.get("set_up_s", 0.0)
            name += ", offloaded" if offload else ""
            print(f"{name:53} r={rank:<3} static {static:6.2f}  {shown}  set up {set_up:.0f} s", flush=True)


if __name__ == "__main__":
    main()

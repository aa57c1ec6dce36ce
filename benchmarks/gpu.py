"""Memory and step time on one GPU: LR-QAT beside PEFT's LoRA, QLoRA and LR-QAT's own eager path.

    python benchmarks/gpu.py run --out benchmarks/results/gpu.json            # all methods, 7B shapes
    python benchmarks/gpu.py run --full --out benchmarks/results/gpu_full.json   # full-parameter training (full.py)
    python benchmarks/gpu.py run --full --block-graphs --append --out benchmarks/results/gpu_full.json  # as cuda_graphs
    python benchmarks/gpu.py table benchmarks/results/gpu.json --plot docs/images/gpu.png

Random weights in the shapes of Llama 2, rank 32 on all linear layers, AdamW (fused), block checkpointing, bf16, random
tokens. One method after the other in one process, each on an empty GPU (asserted); per batch shape `--warm` steps, then
`--steps` timed ones (host clock around a synchronised step, median); the peak is that of the timed steps, optimizer
included, as torch counts allocated bytes. Peers come from their own packages: peft, bitsandbytes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import LLAMA, graph_pools, provenance, write_json
from full import KINDS, Stepper, full_model, full_optimizer, missing
from full import METHODS as FULL_METHODS
from torch import nn

GIB = 2**30
TINY = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES = {**LLAMA, "tiny": TINY}
# name -> (kind, LRQATConfig options)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "frozen bf16": ("frozen", {}),  # the model's own work: forward, and backward to its input
    "LoRA bf16": ("lora", {}),
    "QLoRA NF4": ("qlora", {}),
    "LR-QAT fx8, eager": ("eager", {"group_size": -1}),
    "LR-QAT fx8": ("lrqat", {"group_size": -1}),
    "LR-QAT int4": ("lrqat", {"group_size": -1, "downcast": "int"}),
    "LR-QAT int4, offload_base": ("lrqat", {"group_size": -1, "downcast": "int", "offload_base": True}),
    "LR-QAT fx8, groups of 128": ("lrqat", {"group_size": 128}),
    "LR-QAT int4, groups of 128": ("lrqat", {"group_size": 128, "downcast": "int"}),
    "LR-QAT fx8, groups of 128, by channel": ("lrqat", {"group_size": 128, "learn_scales": "channel"}),
    "LR-QAT int4, groups of 128, by channel": (
        "lrqat",
        {"group_size": 128, "learn_scales": "channel", "downcast": "int"},
    ),
    "LR-QAT int3": ("lrqat", {"bits": 3, "group_size": -1, "downcast": "int"}),
    "LR-QAT int2, groups of 128": ("lrqat", {"bits": 2, "group_size": 128, "symmetric": False, "downcast": "int"}),
}


def skeleton(size: str, layers: int | None, keep_rng_state: bool) -> nn.Module:
    """A Llama of this size on the meta device. (A CUDA graph cannot look at the random state; nothing here uses it.)"""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[size] | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(vocab_size=32000, tie_word_embeddings=False, **shape)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    options = {"use_reentrant": False, "preserve_rng_state": keep_rng_state}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


def fill(model: nn.Module, device: str, shared: bool = False) -> None:
    """Random weights on `device`. `shared`: layers share their storage; a 70B model then exists one layer at a time."""
    seen: dict[tuple, torch.Tensor] = {}
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            key = (type(module), name, tuple(parameter.shape))
            if shared and key in seen:
                values = seen[key]
            elif parameter.dim() == 1:
                values = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
            else:
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                values.normal_(std=0.02, generator=generator)
            seen[key] = values
            module.register_parameter(name, nn.Parameter(values))
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # rotary frequencies
            fresh = type(module)(config=model.config)
            for name, buffer in fresh.named_buffers(recurse=False):
                module.register_buffer(name, buffer.to(device), persistent=False)


def nf4(model: nn.Module) -> None:
    """Every linear layer but the head to bitsandbytes' NF4 with double quantization, as QLoRA does."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            layer = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            layer.weight = bnb.nn.Params4bit(
                module.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
            ).cuda()
            model.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2], layer)
            module.weight = None


def adapted(kind: str, options: dict[str, Any], args: argparse.Namespace, device: str) -> tuple[nn.Module, float]:
    """The model to train, and the peak of its conversion in GiB."""
    from peft import LoraConfig, get_peft_model

    from peft_lrqat import LRQATConfig

    model = skeleton(args.size, args.layers, keep_rng_state=not args.graph)
    fill(model, "cpu" if args.from_cpu else device, shared=args.size == "70B" or args.from_cpu)
    common = {"r": args.rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    as_fp32 = not args.bf16_adapters
    reset_peak(device)
    if kind in KINDS:
        model = full_model(kind, options, model, args.range_method)
    elif kind == "qlora":
        nf4(model)
    if kind == "frozen":
        model.requires_grad_(False)
        model.enable_input_require_grads()
    elif kind in ("lora", "qlora"):
        model = get_peft_model(model, LoraConfig(**common), autocast_adapter_dtype=as_fp32)
    elif kind not in KINDS:
        config = LRQATConfig(**common, range_method=args.range_method, **options)
        model = get_peft_model(model, config, autocast_adapter_dtype=as_fp32)
    model = model.to(device)
    gc.collect()
    model.train()
    return model, peak(device)


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> float:
    return torch.cuda.max_memory_allocated() / GIB if device == "cuda" else 0.0


def held(device: str) -> float:
    return torch.cuda.memory_allocated() / GIB if device == "cuda" else 0.0


def optimizer_for(model: nn.Module, kind: str, options: dict[str, Any], lean: bool) -> Stepper:
    trained = [p for p in model.parameters() if p.requires_grad] or [nn.Parameter(torch.zeros(1))]
    if kind in KINDS:
        return full_optimizer(kind, options, trained)
    if lean:
        import bitsandbytes as bnb

        return bnb.optim.AdamW8bit(trained, lr=1e-4, weight_decay=0.0)
    return torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)


def measure(name: str, args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Static memory, and peak and seconds a step for every batch shape."""
    from peft_lrqat.ops import use_kernels

    kind, options = {**METHODS, **FULL_METHODS}[name]
    assert held(device) < 0.2, f"{held(device):.2f} GiB are still held before {name}"
    started = time.perf_counter()
    model, conversion_peak = adapted(kind, options, args, device)
    row: dict[str, Any] = {
        "method": name,
        "size": args.size,
        "layers": args.layers,
        "lean": args.lean,
        "offload": args.offload,
        "bf16_adapters": args.bf16_adapters,
        "from_cpu": args.from_cpu,
        "graph": args.graph,
        "block_graphs": args.block_graphs,
        "autocast": args.autocast,
        "compile": args.compile,
        "set_up_s": time.perf_counter() - started,
        "set_up_peak_gib": conversion_peak,
        "static_gib": held(device),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": {},
    }
    optimizer = optimizer_for(model, kind, options, args.lean)
    if args.compile:
        torch._dynamo.reset()
        model.compile()
    eager = use_kernels(False) if kind == "eager" else contextlib.nullcontext()
    amp = torch.autocast(device, dtype=torch.bfloat16, enabled=args.autocast)
    keep: Any = contextlib.nullcontext()
    if args.offload:
        from trl.models.activation_offloading import get_act_offloading_ctx_manager

        keep = get_act_offloading_ctx_manager(model)
    blocks: Any = contextlib.nullcontext()
    if args.block_graphs:
        from peft_lrqat import cuda_graphs

        blocks = cuda_graphs(model)
    generator = torch.Generator().manual_seed(1)
    with eager, blocks:
        for shape in args.batches:
            batch, length = (int(n) for n in shape.split("x"))
            rows = torch.randint(0, 32000, (batch, length), generator=generator).to(device)
            seconds, losses = [], []
            reset_peak(device)
            half_step = forward_backward(model, rows, amp, keep, args.graph and device == "cuda")
            for step in range(args.warm + args.steps):
                if step == args.warm and not args.graph:  # a graph's memory is counted while it is captured only
                    reset_peak(device)
                if device == "cuda":
                    torch.cuda.synchronize()
                begin = time.perf_counter()
                loss = half_step()
                optimizer.step()
                if not args.graph:
                    optimizer.zero_grad(set_to_none=True)
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - begin)
                losses.append(loss)
            del half_step
            row["steps"][shape] = {
                "seconds": statistics.median(seconds[args.warm :]),
                "peak_gib": peak(device) + (graph_pools(device) if args.block_graphs else 0.0),
                "loss": losses[-1].item(),
            }
        if args.profile and device == "cuda":
            profile(model, rows, amp)
    del model, optimizer
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return row


def forward_backward(
    model: nn.Module, rows: torch.Tensor, amp: Any, keep: Any, graph: bool
) -> Callable[[], torch.Tensor]:
    """A function that leaves gradients and returns the loss; `graph`: as a CUDA graph, without Python's launches."""

    def run() -> torch.Tensor:
        with amp, keep:
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        return loss.detach()

    if not graph:
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # what makes `rows`
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        loss = run()

    def replay() -> torch.Tensor:
        captured.replay()  # writes the gradients anew
        return loss.clone()

    return replay


#: Kinds of kernels, and what their names hold; the first that fits. Ours build W^ ("weights"), round the factors of its
#: change, and sum up what scales and factors want.
KERNELS = {
    "weights": ("_weight_kernel",),
    "factors": ("_prepare_kernel", "_clipped_kernel"),
    "sums": ("_row_sums_kernel", "_dense_kernel", "_by_g_kernel"),
    "attention": ("sdpa", "flash", "fmha", "cudnn"),
    "products": ("gemm", "nvjet", "cutlass", "splitk"),
    "elementwise": ("elementwise", "reduce", "cat", "copy", "fill"),
}


def profile(model: nn.Module, rows: torch.Tensor, amp: Any) -> None:
    """Where a step's GPU time goes, by kind of kernel and by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        with amp:
            model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        torch.cuda.synchronize()
    model.zero_grad(set_to_none=True)
    kinds, found = kernel_times(record)
    shown = ", ".join(f"{kind} {spent:.1f}" for kind, spent in kinds.items() if spent)
    print(f"  GPU time {sum(kinds.values()):.0f} ms in {sum(count for _, count, _ in found)} kernels: {shown}")
    for spent, count, key in found[:20]:
        print(f"  {spent:8.1f} ms {count:6} x {key[:90]}")


def kernel_times(record: torch.profiler.profile) -> tuple[dict[str, float], list[tuple[float, int, str]]]:
    """Milliseconds of the GPU by kind of kernel; and (milliseconds, launches, name) of each kernel, longest first."""
    found = [(event.self_device_time_total / 1000, event.count, event.key) for event in record.key_averages()]
    found = sorted((row for row in found if row[0] > 0), reverse=True)
    kinds = dict.fromkeys([*KERNELS, "other"], 0.0)
    for spent, _, key in found:
        fits = (kind for kind, parts in KERNELS.items() if any(part in key.lower() for part in parts))
        kinds[next(fits, "other")] += spent
    return kinds, found


def run(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = Path(args.out)
    methods = {**METHODS, **FULL_METHODS}
    chosen = [name for name in methods if name in (args.only or (FULL_METHODS if args.full else METHODS))]
    result: dict[str, Any] = json.loads(out.read_text()) if args.append and out.exists() else {"runs": []}
    command = {k: v for k, v in vars(args).items() if k not in ("do", "out")}
    for name in chosen:
        if package := missing(*methods[name]):
            print(f"{name:28} left out: {package} is not installed")
            continue
        try:
            row = measure(name, args, device)
        except torch.OutOfMemoryError as error:
            row = {"method": name, "size": args.size, "error": str(error)[:200], "steps": {}}
        result["runs"].append({**row, "command": command, **provenance()})
        write_json(out, result)
        shown = "  ".join(f"{s}: {v['seconds']:.3f} s {v['peak_gib']:.2f} GiB" for s, v in row["steps"].items())
        print(
            f"{name:28} static {row.get('static_gib', 0):6.2f}  {shown}  set up {row.get('set_up_s', 0):.0f} s",
            flush=True,
        )


def shown(run: dict[str, Any]) -> str:
    marks = {
        "lean": "memory options",
        "offload": "offloading",
        "bf16_adapters": "bf16 adapters",
        "from_cpu": "converted on the CPU",
        "graph": "CUDA graph",
        "block_graphs": "blocks as CUDA graphs",
        "autocast": "autocast",
        "compile": "torch.compile",
    }
    blocks = [f"{run['layers']} blocks"] if run.get("layers") else []
    return ", ".join([run["method"], *blocks, *(words for key, words in marks.items() if run.get(key))])


def table(args: argparse.Namespace) -> None:
    """Markdown, and a plot of peak memory and tokens per second."""
    runs = [r for path in args.results for r in json.loads(Path(path).read_text())["runs"] if r["steps"]]
    shapes = sorted({shape for r in runs for shape in r["steps"]}, key=lambda s: [int(n) for n in s.split("x")])
    head = [f"peak {s}, GiB" for s in shapes] + [f"s/step {s}" for s in shapes]
    print("| | | static, GiB | " + " | ".join(head) + " |\n|" + "---|" * (3 + len(head)))
    for r in runs:
        steps = [r["steps"].get(s) for s in shapes]
        cells = [f"{s['peak_gib']:.2f}" if s and s["peak_gib"] else "" for s in steps] + [
            f"{s['seconds']:.3f}" if s else "" for s in steps
        ]
        name = shown(r)
        print(f"| {r['size']} | {name} | {r['static_gib']:.2f} | " + " | ".join(cells) + " |")
    if args.plot:
        plot([r for r in runs if r["size"] == args.size], shapes[-1], args.plot)


def plot(runs: list[dict[str, Any]], shape: str, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    batch, length = (int(n) for n in shape.split("x"))
    other = ("layers", "from_cpu", "graph", "block_graphs", "autocast", "compile")  # the table has them
    runs = [r for r in runs if shape in r["steps"] and r["steps"][shape]["peak_gib"] and not any(map(r.get, other))]
    runs = runs[::-1]
    names = [shown(r) for r in runs]
    colors = ["#4477aa" if name.startswith(("LR-QAT", "low-bit SR")) else "#999999" for name in names]
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 0.5 + 0.42 * len(runs)), sharey=True)
    left.barh(names, [r["steps"][shape]["peak_gib"] for r in runs], color=colors)
    left.set_xlabel("peak memory of a step, GiB")
    right.barh(names, [batch * length / r["steps"][shape]["seconds"] for r in runs], color=colors)
    right.set_xlabel("tokens per second")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.bar_label(axis.containers[0], fmt="%.1f" if axis is left else "%.0f", padding=3, fontsize=8)
        axis.margins(x=0.15)
    fig.suptitle(f"{runs[0]['size']} shapes, {shape} tokens a step, {runs[0]['device']}", fontsize=10)
    fig.tight_layout()
    fig.savefig(path, dpi=130)


def options() -> argparse.ArgumentParser:
    """What can be typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run")
    one.set_defaults(do=run)
    one.add_argument("--out", required=True)
    one.add_argument("--size", choices=SHAPES, default="7B")
    one.add_argument("--only", nargs="*", help=f"some of {[*METHODS, *FULL_METHODS]}")
    one.add_argument("--layers", type=int, help="only so many blocks")
    one.add_argument("--full", action="store_true", help="full-parameter training instead of adapters")
    one.add_argument("--batches", nargs="*", default=["1x1024", "4x1024"])
    one.add_argument("--rank", type=int, default=32)
    one.add_argument("--warm", type=int, default=3)
    one.add_argument("--steps", type=int, default=5)
    one.add_argument("--range-method", default="minmax", help="of the random weights; has no part in a step")
    one.add_argument("--autocast", action="store_true", help="to bf16, as Trainer(bf16=True) does")
    one.add_argument("--graph", action="store_true", help="forward and backward as a CUDA graph")
    one.add_argument("--block-graphs", action="store_true", help="the blocks as CUDA graphs (cuda_graphs)")
    one.add_argument("--compile", action="store_true", help="torch.compile, as Trainer(torch_compile=True) does")
    one.add_argument("--lean", action="store_true", help="use_liger_kernel, optim=adamw_bnb_8bit")
    one.add_argument("--offload", action="store_true", help="TRL's activation_offloading")
    one.add_argument("--bf16-adapters", action="store_true", help="get_peft_model(..., autocast_adapter_dtype=False)")
    one.add_argument("--from-cpu", action="store_true", help="convert on the CPU, then move")
    one.add_argument("--profile", action="store_true")
    one.add_argument("--append", action="store_true", help="to what --out holds already")
    printed = commands.add_parser("table")
    printed.set_defaults(do=table)
    printed.add_argument("results", nargs="+")
    printed.add_argument("--plot")
    printed.add_argument("--size", default="7B")
    return parser


def main() -> None:
    args = options().parse_args()
    if getattr(args, "lean", False):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()  # what TrainingArguments(use_liger_kernel=True) does
    do = args.do
    del args.do
    do(args)


if __name__ == "__main__":
    main()

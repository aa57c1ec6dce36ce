"""The same training on one GPU and on two: losses, parameters of the ranks, and the merged integers.

    python benchmarks/distributed.py --out distributed.json             # two GPUs, about two minutes
    python benchmarks/distributed.py --out distributed.json --cpu       # two processes on a CPU, a tiny model

SFTTrainer on a random Llama (no hub). Runs, each started as users start them: one process with two batches a step
("one"); two processes with a batch each under `torchrun` ("ddp") and under `accelerate launch` with FSDP2 as
`accelerate config` proposes it ("fsdp2"; for low-bit SR, and below torch 2.12, the refusal is what is looked for); and
one process that sees both GPUs ("dp": refused). The ranks' parameters must be identical, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import provenance, write_json

METHODS = ("lrqat", "lowbit_sr")
RUNS = ("one", "ddp", "fsdp2", "dp")
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
VOCAB = 4096
LAUNCH = {
    "one": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"],
    "ddp": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "fsdp2": [
        *("-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--use_fsdp", "--fsdp_version", "2", "--fsdp_state_dict_type", "FULL_STATE_DICT"),
        *("--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_cpu_ram_efficient_loading", "true"),
    ],
    "dp": [],
}


def base_model(folder: Path, cpu: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = SMALL if cpu else LARGE
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **shape))
    model.to(torch.float32 if cpu else torch.bfloat16).save_pretrained(folder)


def dataset(rows: int, length: int) -> Any:
    """Sequences that add a constant, modulo the vocabulary: they can be learned."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    start, step = torch.randint(3, VOCAB, (2, rows, 1), generator=generator)
    ids = 3 + (start + (step % 7 + 1) * torch.arange(length)) % (VOCAB - 3)
    return Dataset.from_dict({"input_ids": ids.tolist()})


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")


def worker(args: argparse.Namespace) -> None:
    """One process of a run."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from peft_lrqat import LowBitAdamW, LowBitSRConfig, LRQATConfig

    run, method = args.worker
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if args.cpu and run == "fsdp2":
        _shard_on_cpu()
    config = SFTConfig(
        output_dir=str(args.folder / f"{run}-{method}"),
        max_steps=args.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2 // world,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,  # the model is; under FSDP2, `bf16=True` would round the adapters too
        use_cpu=args.cpu and run != "fsdp2",
        gradient_checkpointing=not args.cpu,
        max_length=None,
    )
    model = AutoModelForCausalLM.from_pretrained(args.folder / "base", dtype="auto")
    common: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    peft_config: Any = LRQATConfig(bits=4, group_size=32, r=16, range_method="minmax", **common)
    if method == "lowbit_sr":
        peft_config = LowBitSRConfig(bits=8, group_size=-1, **common)
    data = dataset(args.steps * 8, 32 if args.cpu else 256)
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=data, processing_class=tokenizer(), peft_config=peft_config
    )
    if method == "lowbit_sr":
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        trainer.optimizer = LowBitAdamW(trained, lr=1e-4)
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    held = sum(_bytes(parameter) for parameter in trainer.model.parameters())
    hashes = {name: _digest(tensor) for name, tensor in _trained(trainer.accelerator.unwrap_model(trainer.model))}
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, hashes)
    trainer.save_model(str(args.folder / f"{run}-{method}" / "adapter"))
    if dist.get_rank() == 0:
        found = {
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "gradient norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
            "ranks identical": all(other == hashes for other in everyone),
            "parameters compared": len(hashes),
            "wrapped in": type(trainer.model_wrapped).__name__,
            "seconds": round(seconds, 1),
            "peak GiB, rank 0": peak,
            "bytes of parameters, rank 0": held,
        }
        (args.folder / f"{run}-{method}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _shard_on_cpu() -> None:
    """Lets accelerate shard on a CPU, which no launcher's answers make it do."""
    import accelerate.state
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    state: Any = accelerate.state.PartialState
    state._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def _trained(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Every trained parameter, whole; of a low-bit weight its codes, scales and random stream."""
    found = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "packed"):
            found += [(f"{name}.{part}", getattr(parameter, part)) for part in ("packed", "scale", "stream")]
        else:
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            found.append((name, whole.detach()))
    return found


def _bytes(parameter: torch.nn.Parameter) -> int:
    """Of this rank's share, as it is held."""
    if hasattr(parameter, "packed"):
        return parameter.packed.nbytes + parameter.scale.nbytes
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).nbytes


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def merged_codes(folder: Path, run: str, method: str) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import peft_lrqat  # noqa: F401  # registers the methods

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    merged = PeftModel.from_pretrained(base, folder / f"{run}-{method}" / "adapter").merge_and_unload()
    return {name: module.codes for name, module in merged.named_modules() if hasattr(module, "weight_packed")}


def start(run: str, method: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one; its figures, or the ValueError that it ended with."""
    visible = {"one": "0"}.get(run, "0,1")
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": visible, "OMP_NUM_THREADS": "4"}
    if args.cpu:
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        env |= {} if run == "fsdp2" else {"ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *LAUNCH[run], __file__, "--worker", run, method, "--folder", str(folder)]
    command += ["--steps", str(args.steps), *(["--cpu"] if args.cpu else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    result = folder / f"{run}-{method}.json"
    if done.returncode == 0 and result.exists():
        return json.loads(result.read_text())
    errors = [line for line in done.stderr.splitlines() if "ValueError: " in line]
    if not errors or run in ("one", "ddp"):
        sys.exit(f"{run}, {method} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return {"refused": errors[0].partition("ValueError: ")[2]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    if args.out is None:
        parser.error("--out is needed")
    found: dict[str, Any] = {**provenance(), "steps": args.steps, "runs": {}}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        base_model(folder / "base", args.cpu)
        for method in args.only:
            runs = {run: start(run, method, args, folder) for run in RUNS if not args.cpu or run != "dp"}
            found["runs"][method] = runs
            one = merged_codes(folder, "one", method)
            for run, result in runs.items():
                if "refused" in result:
                    print(f"{method:10} {run:6} refused: {result['refused'][:150]}", flush=True)
                    continue
                codes = merged_codes(folder, run, method)
                moved = sum((codes[name] != one[name]).sum().item() for name in one)
                moved /= sum(code.numel() for code in one.values())
                losses, alone = result["losses"], runs["one"]["losses"]
                off = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
                result |= {"merged codes unlike one process's": moved, "largest difference of a loss": off}
                print(
                    f"{method:10} {run:6} loss {losses[0]:.4f} to {losses[-1]:.4f} (off by {off:.1e}), "
                    f"codes unlike {moved:.1e}, ranks identical {result['ranks identical']}, {result['seconds']} s, "
                    f"{result['wrapped in']}",
                    flush=True,
                )
                assert result["ranks identical"], (method, run)
    write_json(args.out, found)


if __name__ == "__main__":
    main()

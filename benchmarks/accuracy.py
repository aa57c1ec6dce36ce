"""What quantization costs, and what training gives back: every method on one model and one text.

    python benchmarks/text.py --out text/
    python benchmarks/accuracy.py tokens --model MODEL --text text/ --out bench/tokens.npz
    python benchmarks/accuracy.py heal --model MODEL --tokens bench/tokens.npz --out bench/healed
    python benchmarks/accuracy.py run --model bench/healed --tokens bench/tokens.npz --jobs jobs.txt --out acc.json
    python benchmarks/accuracy.py table acc.json ...      # and: summary; activations; plot acc.json ... --out X.svg

The float model is first trained on the training text ("healed": all weights of the linear layers), so that a row
shows what quantization costs, and not what the text gives. Every row starts from it and sees the same batches (same
seed), with AdamW under bf16 autocast, linear warm-up over 10 % and cosine decay. Measured on held-out text, against the
healed model: perplexity, KL, greedy agreement, and HellaSwag where a job asks for it. Settings are chosen on `tune`;
`report` and `wikitext2` (WikiText-2's validation split) are told of.

`benchmarks/jobs/` has the rows of the documentation; what the files of `--done` hold is not run again. A line of a jobs
file is a method and its options (accuracy_methods.py has both); a comma makes a job of each value:

    round bits=4 group=64 p=2.4,4
    lrqat bits=4 group=64 kl=0,1 seed=0,1,2
    scales bits=3 group=64 start=blockwise            # EfficientQAT's two stages

    float   every weight in float               round         to nearest
    lrqat   LRQATConfig, adapters and scales    hqq           HQQ (its own package)
    scales  LRQATConfig, only the scales        autoround     AutoRound (its own package)
    lsq     full QAT, every weight and scale    llmcompressor GPTQ (llm-compressor)
    lowbit  LowBitSRConfig with LowBitAdamW     lora          LoRA in float, merged and rounded (both norms)

`start=gptq` and `start=blockwise` begin with what `preprocess_gptq` and `preprocess_blockwise` leave; with `steps=0`
that is the row. `lora then=gptq` (or blockwise, autoround, hqq, llmcompressor) rounds the merged LoRA in that way.
`rotate=true` begins with what `preprocess_rotation` makes of the float model, whose outputs, the teacher's, are the
same; `start=rotation` is that and nothing else. Runs share GPUs: the times are those of a busy GPU.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy_measure import against_float, eval_rows, hellaswag
from accuracy_methods import (
    Text,
    complete,
    float_model,
    make_start,
    prepare,
    read_job,
    round_by,
    round_model,
    start_key,
)
from common import provenance, visible_gpu, write_json
from torch import nn
from training import SEQ, Step, loss_of, schedule

HELLASWAG_ITEMS = 2000


# -- tokens


def make_tokens(args: argparse.Namespace) -> None:
    """All texts as token ids, in one file."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    kind = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    text, arrays, train = Path(args.text), {}, []
    with (text / "train.jsonl").open(encoding="utf-8") as file:
        documents = [json.loads(line)["text"] for line in file]
    for start in range(0, len(documents), 64):
        for document in ids(documents[start : start + 64]):
            train += [*document, tokenizer.eos_token_id]
    arrays["train"] = np.asarray(train, dtype=kind)
    for name in ("tune", "report", "wikitext2"):
        arrays[name] = np.asarray(ids((text / f"{name}.txt").read_text(encoding="utf-8")), dtype=kind)
    # what the tokenizer puts before a text, if anything: windows begin with it
    begins = tokenizer("")["input_ids"]
    arrays["bos"] = np.asarray(begins[0] if begins and begins[0] == tokenizer.bos_token_id else -1)
    items = json.loads((text / "hellaswag.json").read_text(encoding="utf-8"))
    chosen = np.random.default_rng(0).permutation(len(items))[:HELLASWAG_ITEMS]
    tasks = [
        {
            "context": ids(items[i]["context"]),
            "endings": [ids(" " + ending) for ending in items[i]["endings"]],
            "bytes": [len(ending.encode()) for ending in items[i]["endings"]],
            "label": items[i]["label"],
        }
        for i in chosen
    ]
    arrays["hellaswag"] = np.frombuffer(json.dumps(tasks).encode(), dtype=np.uint8)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, **arrays)
    print({name: array.shape for name, array in arrays.items()}, "bos", int(arrays["bos"]))


class Bench:
    """The float model and the texts, on one device."""

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM

        with np.load(args.tokens) as file:
            self.tokens = {name: file[name] for name in file.files}
        bos = int(self.tokens["bos"])
        self.bos = None if bos < 0 else bos
        self.seq, self.most = args.seq, args.windows
        self.text = Text(self.tokens["train"], args.seq, self.bos, Path(args.model))
        self.rows = eval_rows(self.tokens, args.seq, self.bos, args.windows)
        self.items = json.loads(self.tokens["hellaswag"].tobytes())[: args.items]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        gguf = getattr(args, "gguf_file", None)
        extra = {"gguf_file": gguf} if gguf else {}
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **extra)
        if gguf:  # it still calls itself quantized, so its weights get a fresh model
            del model.config.quantization_config
            weights, model = model.state_dict(), type(model)(model.config)
            model.load_state_dict(weights)
        self.model = model.to(self.device).eval().requires_grad_(False)
        # a large vocabulary takes its memory by the chunk
        self.chunk = max(256, min(2048, (1 << 27) // model.config.vocab_size))

    def measure(self, model: nn.Module, job: dict[str, Any]) -> dict[str, Any]:
        model.eval()
        found: dict[str, Any] = {
            name: against_float(model, self.model, rows, self.device, chunk=self.chunk)
            for name, rows in self.rows.items()
        }
        if job["hellaswag"]:
            found["hellaswag"] = hellaswag(model, self.items, self.device)
        return found


# -- one row


def run_job(bench: Bench, job: dict[str, Any], starts: Path) -> tuple[dict[str, Any], nn.Module]:
    """Train and measure one row: what goes into the JSON, and the model."""
    job, began = complete(job), time.perf_counter()
    torch.manual_seed(job["seed"])
    result: dict[str, Any] = {"job": job}
    key = start_key(job)
    if key is None:
        model = float_model(bench.model, job)
    else:
        path = starts / f"{key}.pt"
        if not path.exists():
            torch.save(make_start(float_model(bench.model, job), job, bench.text), starts / f"{key}.part")
            os.replace(starts / f"{key}.part", path)
            result["start_seconds"] = time.perf_counter() - began
        model = torch.load(path, map_location=bench.device, weights_only=False)
    model, groups = prepare(model, job, bench.text)
    if job["steps"]:
        result.update(train(bench, model, [g for g in groups if g["params"]], job))
    result["seconds"] = time.perf_counter() - began
    if job["method"] == "lora":
        result["float"] = bench.measure(model, {**job, "hellaswag": False})
        merged = model.merge_and_unload()
        if job["then"]:
            model = round_by(merged, job, bench.text)
            result.update(bench.measure(model, job))
            return result, model
        for p in (2.4, 4.0):
            rounded = copy.deepcopy(merged)
            round_model(rounded, {**job, "p": p})
            found = bench.measure(rounded, job)
            if "report" not in result or found["tune"]["ppl"] < result["tune"]["ppl"]:
                result.update(found, p=p)
        return result, model
    result.update(bench.measure(model, job))
    if job["method"] in ("lrqat", "scales", "lowbit"):
        rows = torch.from_numpy(bench.rows["tune"][:2]).to(bench.device)
        with torch.no_grad(), torch.autocast(bench.device.type, dtype=torch.bfloat16):
            before = model(input_ids=rows).logits
            merged = model.merge_and_unload()
            result["merged_equal"] = torch.equal(before, merged(input_ids=rows).logits)
    return result, model


def train(bench: Bench, model: nn.Module, groups: list[dict[str, Any]], job: dict[str, Any]) -> dict[str, Any]:
    """`steps` steps of AdamW; the last 20 losses' mean."""
    cuda = bench.device.type == "cuda"
    optimizer: torch.optim.Optimizer
    if job["method"] == "lowbit":
        from peft_lrqat import LowBitAdamW

        optimizer = LowBitAdamW(groups, betas=(0.9, 0.98), compile=cuda)
    else:
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, job["steps"]))
    trained = [p for g in groups for p in g["params"]]
    model.train()

    def loss(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        return loss_of(model, rows, bench.chunk, bench.model, job["kl"], job["temperature"])

    step = Step(model, trained, (job["batch"], bench.seq), graph=cuda, parts=job["parts"], loss=loss)
    losses, began = [], time.perf_counter()
    for rows in bench.text.batches(job["steps"], job["batch"], job["seed"]):
        losses.append(step(rows))
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rates.step()
    last = torch.stack(losses)[-20:].mean().item()
    return {"train_loss": last, "train_seconds": time.perf_counter() - began}


def heal(args: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    bench = Bench(args)
    job = complete({"method": "float", "steps": args.steps, "lr": args.lr})
    before = bench.measure(bench.model, {**job, "hellaswag": True})
    result, model = run_job(bench, job, Path(args.out))
    after = bench.measure(model, {**job, "hellaswag": True})
    model.save_pretrained(args.out)
    write_json(Path(args.out) / "healed.json", {"before": before, "after": after, "job": result["job"], **provenance()})
    inside = {"gguf_file": args.gguf_file} if args.gguf_file and not args.tokenizer else {}
    AutoTokenizer.from_pretrained(args.tokenizer or args.model, **inside).save_pretrained(args.out)
    print("before", before, "\nhealed", after)


# -- many rows


def run(args: argparse.Namespace) -> None:
    """Start workers on every GPU, and bundle what they write."""
    lines = [line.split("#")[0].strip() for file in args.jobs for line in Path(file).read_text().splitlines()]
    jobs = [job for line in lines if line for job in read_job(line)]
    done = [run["job"] for file in args.done for run in json.loads(Path(file).read_text()).get("runs", [])]
    jobs = [job for job in jobs if not any(_covers(old, job) for old in done)]
    for job in jobs:
        if args.smoke:
            job |= {"steps": min(3, job.get("steps", 3)), "batch": 2, "start_windows": 2, "iters": 2}
    print(f"{len(jobs)} jobs", flush=True)
    gpus = list(range(torch.cuda.device_count())) if args.gpus is None else list(range(args.gpus))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        starts = Path(args.starts or scratch)
        starts.mkdir(parents=True, exist_ok=True)
        for left in (*starts.glob("*.making"), *starts.glob("*.failed")):  # by a run that was ended
            left.unlink()
        end = time.time() + args.limit
        write_json(folder / "jobs.json", {"jobs": jobs, "end": end})
        shared = [
            "--model",
            args.model,
            "--tokens",
            args.tokens,
            "--seq",
            str(args.seq),
            "--windows",
            str(args.windows),
        ]
        command = [sys.executable, __file__, "work", *shared, "--items", str(args.items), "--folder", scratch]
        command += ["--starts", str(starts)]
        workers = []
        for place in range(args.per_gpu):  # one on every GPU first
            for gpu in gpus or [None]:
                chosen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": visible_gpu(gpu)}
                workers.append(subprocess.Popen(command, env={**os.environ, **chosen}))
                time.sleep(0 if place else 0.2)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a `timeout` around it: the workers go as well
        done = -1
        try:
            while any(worker.poll() is None for worker in workers):
                time.sleep(1)
                if (found := len(list(folder.glob("run-*.json")))) != done:
                    done = found
                    bundle(folder, args)
                if time.time() > end + 5:
                    break
        finally:
            for worker in workers:
                worker.kill()
        bundle(folder, args)
        taken = {int(path.stem.partition("-")[2]) for path in folder.glob("run-*.json")}
    left = [job for number, job in enumerate(jobs) if number not in taken]
    print(
        f"{len(taken)} of {len(jobs)} jobs done" + "".join(f"\n  not done: {json.dumps(job)}" for job in left),
        flush=True,
    )


def _covers(done: dict[str, Any], job: dict[str, Any]) -> bool:
    """Whether a run of `done` has all that `job` asks for."""
    old, new = complete(done), complete(job)
    tasks = old.pop("hellaswag"), new.pop("hellaswag")
    return old == new and tasks != (False, True)


def bundle(folder: Path, args: argparse.Namespace) -> None:
    """One file with the results of all runs that have ended."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("run-*.json"))]
    healed = Path(args.model) / "healed.json"
    write_json(
        Path(args.out),
        {
            "model": args.name or Path(args.model).resolve().name,
            "healed": json.loads(healed.read_text()) if healed.exists() else None,
            "windows": args.windows,
            "seq": args.seq,
            **provenance(),
            "runs": runs,
        },
    )


def work(args: argparse.Namespace) -> None:
    """A worker: takes the next job that nobody has, until there are none or time is up."""
    folder, starts = Path(args.folder), Path(args.starts)
    plan = json.loads((folder / "jobs.json").read_text())
    bench, longest = Bench(args), 0.0
    while (number := _next(folder, starts, plan, longest)) is not None:
        job, began = plan["jobs"][number], time.time()
        try:
            result, model = run_job(bench, job, starts)
            del model
            write_json(folder / f"run-{number:04}.json", result)
            shown = " ".join(f"{name} {result[name]['ppl']:.2f} kl {result[name]['kl']:.4f}" for name in bench.rows)
            print(f"{number:04} {shown} {result['seconds']:.0f} s {json.dumps(job)}", flush=True)
        except Exception:
            print(f"FAILED {json.dumps(job)}\n{traceback.format_exc()[-1800:]}", flush=True)
            if (key := start_key(complete(job))) and not (starts / f"{key}.pt").exists():
                (starts / f"{key}.failed").touch()
        if complete(job)["steps"]:
            longest = max(longest, time.time() - began)
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def _next(folder: Path, starts: Path, plan: dict[str, Any], longest: float) -> int | None:
    """Claim a job; one whose start another worker is making waits.

    Args:
        longest: seconds that a row with training took until now; none begins with less time left.
    """
    while (left := plan["end"] - time.time()) > 20:
        waiting = False
        for number, job in enumerate(plan["jobs"]):
            if (folder / f"{number:04}.lock").exists() or (complete(job)["steps"] and left < longest):
                continue
            key = start_key(complete(job))
            if key is not None and not (starts / f"{key}.pt").exists():
                if (starts / f"{key}.failed").exists():
                    continue
                if not _claim(starts / f"{key}.making"):
                    waiting = True
                    continue
            if _claim(folder / f"{number:04}.lock"):
                return number
        if not waiting:
            return None
        time.sleep(1)
    return None


def _claim(path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def main() -> None:
    from accuracy_report import activations, plot, summary, table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    tokens = commands.add_parser("tokens")
    tokens.set_defaults(do=make_tokens)
    for name in ("--model", "--text", "--out"):
        tokens.add_argument(name, required=True)
    measured = argparse.ArgumentParser(add_help=False)
    measured.add_argument("--model", required=True)
    measured.add_argument("--tokens", required=True)
    measured.add_argument("--seq", type=int, default=SEQ, help="tokens a window")
    measured.add_argument("--windows", type=int, default=240, help="so many of each held-out text at most")
    measured.add_argument("--items", type=int, default=HELLASWAG_ITEMS, help="of HellaSwag")
    healing = commands.add_parser("heal", parents=[measured])
    healing.set_defaults(do=heal)
    healing.add_argument("--gguf-file")
    healing.add_argument("--tokenizer", help="a folder, where the model's own has none")
    healing.add_argument("--steps", type=int, default=400)
    healing.add_argument("--lr", type=float, default=5e-5)
    healing.add_argument("--out", required=True)
    many = commands.add_parser("run", parents=[measured])
    many.set_defaults(do=run)
    many.add_argument("--jobs", nargs="+", required=True)
    many.add_argument("--done", nargs="+", default=[], help="results of this model: what they hold is not run again")
    many.add_argument("--name", help="the model's, for the table")
    many.add_argument("--gpus", type=int, help="default: all")
    many.add_argument("--per-gpu", type=int, default=1, help="workers on each")
    many.add_argument("--limit", type=float, default=1e9, help="seconds, after which what is running is dropped")
    many.add_argument("--starts", help="a folder that keeps what block-wise starts and GPTQ leave, for later runs")
    many.add_argument("--smoke", action="store_true", help="three steps of every job, to see that it runs")
    many.add_argument("--out", required=True)
    worker = commands.add_parser("work", parents=[measured])
    worker.set_defaults(do=work)
    worker.add_argument("--folder", required=True)
    worker.add_argument("--starts", required=True)
    for name, function in (("table", table), ("summary", summary), ("plot", plot), ("activations", activations)):
        shown = commands.add_parser(name)
        shown.set_defaults(do=function)
        shown.add_argument("files", nargs="+")
        shown.add_argument("--text", default="report", choices=("tune", "report", "wikitext2"))
        shown.add_argument("--out")
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()

"""Two processes on the CPU, as `torchrun` and `accelerate launch` start them, and a Trainer's run in one of them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM, Trainer

from tests.models import adapted, low_bit
from tests.processes import FORKED
from tests.trainer import arguments, ids_dataset, losses

WORLD = 2
#: What `accelerate launch` sets for the answers that `accelerate config` proposes for FSDP2.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
ZERO2 = {
    "zero_optimization": {"stage": 2},
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def _started(rank: int, work: Callable[[int, Path], Any], folder: str) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # as tests/conftest.py does
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)})
    os.environ.update({"LOCAL_WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        torch.save(work(rank, Path(folder)), Path(folder) / f"rank{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def in_two_processes(work: Callable[[int, Path], Any], folder: Path) -> list[Any]:
    """What `work(rank, folder)`, a function of a test module, returned in each of two processes."""
    start_processes(_started, args=(work, str(folder)), nprocs=WORLD, start_method=FORKED)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


def announce(environment: dict[str, str]) -> None:
    """Let accelerate believe that it was launched with `environment`, and shard on the CPU, which it would not do."""
    import accelerate.state
    from accelerate.utils import DistributedType

    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        del os.environ[name]
    os.environ.update({"ACCELERATE_TORCH_DEVICE": "cpu", **environment})
    state: Any = accelerate.state.PartialState
    state._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def trainer(kind: str, base: Path, out: Path, **options: Any) -> Trainer:
    """A Trainer for the adapted checkpoint in `base`: four steps of four rows, however many processes share them."""
    accumulation = 1 if dist.is_initialized() else WORLD
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "max_grad_norm": 0.1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    args = arguments(out, **{**settings, **options})
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)  # DDP and FSDP2 take what rank 0 has
    adapt = {"lrqat": adapted, "lowbit_sr": low_bit, "rank 0": partial(adapted, r=0)}[kind]
    data = ids_dataset()
    return Trainer(
        model=adapt(model, bits=4), args=args, train_dataset=data, eval_dataset=data.select(range(WORLD * 2))
    )


def found(run: Trainer) -> dict[str, Any]:
    """What a run logged, and the adapter that it has now; a collective call where the adapter is sharded."""
    logged = run.state.log_history
    return {
        "losses": losses(run),
        "norms": [entry["grad_norm"] for entry in logged if "grad_norm" in entry],
        "eval": [entry["eval_loss"] for entry in logged if "eval_loss" in entry],
        "adapter": whole_adapter(run.accelerator.unwrap_model(run.model)),
    }


def whole_adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    state = get_peft_model_state_dict(model)
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in state.items()}

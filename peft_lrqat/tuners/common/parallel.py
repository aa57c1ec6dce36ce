"""How training may be spread over processes, and where the other ways are refused.

Plain data parallelism (DDP) suits both methods: integers are small, and every process rounds alike. FSDP2 shards
LR-QAT's integers as it shards any parameter. What cannot work is refused at the first of two moments:

* when an adapter is added, if a launcher or a Trainer's arguments have announced it (`check_announced`);
* when a wrapper takes the parameters. Each has a name of its own by which it marks a parameter that it takes, or asks
  whether it has: parameters of this package have a `Mark` under it, which raises.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

_INSTEAD = (
    "Use data parallelism (`torchrun --nproc-per-node N script.py`, or `accelerate launch --multi_gpu script.py`), in "
    "which every process holds the packed model"
)
_OR_FSDP2 = ", or, for LR-QAT and with torch 2.12 or later, FSDP2 (`accelerate launch --use_fsdp --fsdp_version 2 ...`)"

FSDP1 = f"FSDP1 flattens parameters into one float tensor, and integers cannot be in it. {_INSTEAD}{_OR_FSDP2}."
FSDP2 = (
    "FSDP2 would shard a plain float copy of each weight that low-bit SR trains, and leave its integers as they are. "
    f"{_INSTEAD}; or train with LRQATConfig, whose integers FSDP2 shards."
)
FSDP2_TORCH = (
    f"FSDP2 shards integers from torch 2.12 on; this is torch {torch.__version__}, which fails on LR-QAT's. Install a "
    f"later one. {_INSTEAD}."
)
ZERO3 = (
    "DeepSpeed ZeRO-3 gathers the parameters of a layer when that layer is called, but a rounded weight is made from "
    f"the parameters of several layers together. {_INSTEAD}{_OR_FSDP2}; LR-QAT also works with ZeRO stages 1 and 2."
)
DEEPSPEED = (
    "DeepSpeed's optimizers train flat float copies of the weights, of which the integers of low-bit SR never hear: "
    f"nothing would be trained. {_INSTEAD}; or train with LRQATConfig, which works with ZeRO stages 1 and 2."
)
DATA_PARALLEL = (
    "nn.DataParallel (which Trainer uses where one process sees several GPUs) copies modules without the parameters "
    "that PEFT keeps in dictionaries: its copies would compute without the adapter. Start one process for each GPU "
    "(`torchrun --nproc-per-node N script.py`), or show the process a single one (`CUDA_VISIBLE_DEVICES=0`)."
)


class Mark:
    """The attribute by which a wrapper knows the parameters that it takes.

    Args:
        reason: what the error says.
        asking: whether to ask for it is to wrap already; otherwise it is absent, and only setting it is refused.
    """

    def __init__(self, reason: str, *, asking: bool = False) -> None:
        self.reason, self.asking = reason, asking

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, parameter: Any, owner: type | None = None) -> Any:
        if parameter is None:
            return self
        if self.asking:
            raise ValueError(self.reason)
        raise AttributeError(self.name)

    def __set__(self, parameter: Any, value: Any) -> NoReturn:
        raise ValueError(self.reason)


def refuse_data_parallel(module: nn.Module) -> NoReturn:
    """What nn.DataParallel calls to copy a module (`_replicate_for_data_parallel`). Raises ValueError, always."""
    raise ValueError(DATA_PARALLEL)


def check_announced(*, trains_integers: bool) -> None:
    """Raise ValueError if training was announced in a way in which it cannot work.

    Args:
        trains_integers: of low-bit SR, whose parameters are integers; False: LR-QAT, which freezes them.
    """
    fsdp, zero = announced_fsdp(), announced_zero()
    if zero is not None and trains_integers:
        raise ValueError(DEEPSPEED)
    if zero == 3:
        raise ValueError(ZERO3)
    if fsdp == 1:
        raise ValueError(FSDP1)
    if fsdp == 2 and trains_integers:
        raise ValueError(FSDP2)
    if fsdp == 2 and not shards_integers():
        raise ValueError(FSDP2_TORCH)


def shards_integers() -> bool:
    """Whether torch's FSDP2 can shard integer parameters."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)


def announced_fsdp() -> int | None:
    """1 or 2: the version of FSDP that accelerate will use; None: no FSDP, or not known yet."""
    state = _accelerate_state()
    if state is not None:
        plugin = getattr(state, "fsdp_plugin", None)
        return None if plugin is None else int(getattr(plugin, "fsdp_version", 1))
    version = os.environ.get("FSDP_VERSION", "")  # `accelerate launch` sets both
    return int(version) if _set("ACCELERATE_USE_FSDP") and version.isdigit() else None


def announced_zero() -> int | None:
    """0 to 3: the stage of DeepSpeed's ZeRO that will be used; None: no DeepSpeed, or not known yet."""
    from transformers.integrations.deepspeed import deepspeed_config

    config = deepspeed_config()  # that of TrainingArguments(deepspeed=...), as long as these are alive
    if config is not None:
        return _stage(config)
    state = _accelerate_state()
    if state is not None:
        plugin = getattr(state, "deepspeed_plugin", None)
        return None if plugin is None else int(plugin.zero_stage)
    if not _set("ACCELERATE_USE_DEEPSPEED"):  # `accelerate launch` sets it, and the stage or the name of a file
        return None
    file = Path(os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", ""))
    if file.is_file():
        return _stage(json.loads(file.read_text()))
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


def _stage(config: dict[str, Any]) -> int:
    stage = config.get("zero_optimization", {}).get("stage", 0)
    return stage if isinstance(stage, int) else 0


def _accelerate_state() -> Any:
    """accelerate's AcceleratorState, if an Accelerator was made."""
    from accelerate.state import AcceleratorState, is_initialized

    return AcceleratorState() if is_initialized() else None


def _set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")

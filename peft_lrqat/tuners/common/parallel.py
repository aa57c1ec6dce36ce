"""How training may be spread over processes, and where the other ways are refused.

Plain data parallelism (DDP) suits both methods: integers are small, and every process rounds alike. FSDP2 shards
LR-QAT's integers as it shards any parameter. What cannot work is refused at the first of these moments:

* when an adapter is added, if a launcher or a Trainer's arguments have announced it (`check_announced`);
* when a wrapper takes the parameters. Each has a name of its own by which it marks a parameter that it takes, or asks
  whether it has: parameters of this package have a `Mark` under it, which raises;
* when training starts (`check_sharded`).
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
FSDP2_CAST = (
    "FSDP2's mixed-precision policy rounds adapters to {dtype} for each forward, but keeps and saves them in {kept}: "
    "the integers that the model is trained with would not be those that are merged. Load the model in {dtype}, in "
    "which it then computes all the same, and train without mixed precision: `bf16=False` in TrainingArguments or "
    "SFTConfig, `--mixed_precision no`, no `param_dtype` in `MixedPrecisionPolicy`."
)
ZERO3 = (
    "DeepSpeed ZeRO-3 gathers the parameters of a layer when that layer is called, but a rounded weight is made from "
    f"the parameters of several layers together. {_INSTEAD}{_OR_FSDP2}; LR-QAT also works with ZeRO stages 1 and 2."
)
DEEPSPEED = (
    "DeepSpeed's optimizers train flat float copies of the weights, of which the integers of low-bit SR never hear: "
    f"nothing would be trained. {_INSTEAD}; or train with LRQATConfig, which works with ZeRO stages 1 and 2."
)
LOADED = (
    "The model was spread over {ranks} processes when it was loaded (`tp_plan`, or `distributed_config` with more than "
    "one process for tp, pp, ep or fsdp), so this process has only a part of it to quantize. Load it whole. "
    f"{_INSTEAD}{_OR_FSDP2}."
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
        asking: whether a wrapper that only asks for it is about to wrap. If not, the attribute looks absent, and
            setting it is refused.
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
    """Raise ValueError if the announced way of training cannot work.

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


def check_loaded(model: Any) -> None:
    """Raise ValueError if transformers has spread the model over processes: a part of it would be quantized."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is not None and mesh.size() > 1:
        raise ValueError(LOADED.format(ranks=mesh.size()))


def has_peers() -> bool:
    """Whether this process is one of a group, without which nothing is sharded."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def check_sharded(model: nn.Module, prefix: str) -> None:
    """Raise ValueError if FSDP2 shards the model in a way that trains other integers than will be merged.

    Args:
        prefix: in the names of the parameters that are rounded with the weight.
    """
    if not has_peers():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        policy = getattr(module._get_fsdp_state(), "_mp_policy", None)  # private: guarded, for the lack of another way
        dtype = getattr(policy, "param_dtype", None)
        for name, parameter in module.named_parameters() if dtype is not None else ():
            if prefix in name and parameter.requires_grad and parameter.dtype != dtype:
                raise ValueError(FSDP2_CAST.format(dtype=dtype, kept=parameter.dtype))


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

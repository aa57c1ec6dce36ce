"""Two processes with FSDP2: each holds half of the packed bytes, and together they compute what one computes."""

from __future__ import annotations

import types
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes
from trl.generation.vllm_generation import VLLMGeneration

from peft_lrqat import calibrate_activations
from peft_lrqat.modules.packed import QuantizedLinear
from peft_lrqat.tuners.common.frozen import FrozenWeight
from tests.models import adapted, tiny, tokens
from tests.processes import FORKED

pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 12), reason="FSDP2 shards no integer parameters before torch 2.12"
)

WORLD = 2
CASES = {
    "channel": {"bits": 4},
    "group-asymmetric": {"bits": 3, "group_size": 8, "symmetric": False, "downcast": "int", "container_bits": 4},
    "tensor": {"bits": 4, "group_size": 0},
    "scales by channel": {"bits": 4, "group_size": 8, "learn_scales": "channel"},
    "rank 0": {"bits": 4, "group_size": 8, "r": 0},
    "fixed scales of inputs": {"bits": 4, "act_bits": 8, "act_scale": "static"},
}


def _build(config: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    # qwen2 has biases; init_lora_weights=False starts with codes that have moved
    model = adapted(tiny("qwen2"), init_lora_weights=False, range_method="minmax", **config)
    for name, parameter in model.named_parameters():
        if "lora_scale_shift" in name:
            parameter.data.uniform_(-0.1, 0.1)
    if "act_scale" in config:
        calibrate_activations(model, [tokens(batch=WORLD)])
    return model


def _step(model: torch.nn.Module, ids: torch.Tensor) -> float:
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item()


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _update(model: torch.nn.Module) -> None:
    """A step of equal length for every entry: codes and scales change, whatever the last bits of a gradient."""
    with torch.no_grad():
        for parameter in _trained(model).values():
            parameter.sub_(parameter.grad.sign() * 0.02)
            parameter.grad = None


def _sent(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What TRL sends to vLLM, by its own code for FSDP2."""
    syncing = VLLMGeneration.__new__(VLLMGeneration)
    syncing.model, syncing.accelerator = model, types.SimpleNamespace(device=torch.device("cpu"))
    syncing._dist = types.SimpleNamespace(is_fsdp=True, fsdp_version=2, gather_params=lambda p: nullcontext())
    return {name: weight.clone() for name, weight in syncing._iter_named_params()}


def _single(config: dict, folder: Path) -> dict:
    """What one process gets from both halves of the batch."""
    model, ids = _build(config), tokens(batch=WORLD)
    loss = _step(model, ids)
    grads = {name: p.grad.clone() for name, p in _trained(model).items()}
    packed = {n: p.numel() * p.element_size() for n, p in model.named_parameters() if not p.is_floating_point()}
    _update(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(folder)
    served = {name: p.detach() for name, p in merged.named_parameters()}
    if "act_bits" in config:
        served = {}
    for name, layer in merged.named_modules():
        if isinstance(layer, QuantizedLinear):
            served[name + ".weight"] = layer.weight.as_subclass(torch.Tensor)
    return {"loss": loss, "grads": grads, "packed": packed, "served": served}


def _sharded(rank: int, config: dict, folder: Path) -> dict:
    """What one of two processes gets from its half of the batch."""
    model = _build(config)
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)
    assert isinstance(model, FSDPModule)
    local_bytes = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        if not parameter.is_floating_point():
            local_bytes[name] = parameter.to_local().nbytes
    frozen = [m for m in model.modules() if isinstance(m, FrozenWeight)]

    loss = torch.tensor(_step(model, tokens(batch=WORLD)[rank : rank + 1]))
    dist.all_reduce(loss)
    grads = {name: p.grad.full_tensor().clone() for name, p in _trained(model).items()}
    resharded = all(isinstance(m.base, DTensor) for m in frozen)
    _update(model)
    sent = {} if "act_bits" in config else _sent(model)  # which is refused: vLLM would not round inputs

    merged = model.merge_and_unload()
    state = get_model_state_dict(merged, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        merged.save_pretrained(folder / "merged", state_dict=state)
    return {"loss": loss.item() / WORLD, "grads": grads, "bytes": local_bytes, "resharded": resharded, "sent": sent}


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        results = {name: _sharded(rank, config, Path(folder) / name) for name, config in CASES.items()}
        torch.save(results, Path(folder) / f"rank{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _read(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[list[dict], Path]:
    """What both ranks found, for every case, and the folder with their checkpoints."""
    folder = tmp_path_factory.mktemp("fsdp")
    start_processes(_worker, args=(str(folder),), nprocs=WORLD, start_method=FORKED)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)], folder


@pytest.fixture(scope="module", params=CASES)
def run(request, ranks):
    """One process's results, both ranks' results, and the folder with both checkpoints."""
    results, folder = ranks
    folder = folder / request.param
    return _single(CASES[request.param], folder / "single"), [found[request.param] for found in results], folder


def test_each_rank_holds_half_of_the_packed_bytes(run):
    single, ranks, _ = run
    for name, whole in single["packed"].items():
        held = [rank["bytes"][name] for rank in ranks]
        assert sum(held) == whole
        if whole > 8:  # a per-tensor scale cannot be split
            assert held == [whole // 2, whole // 2]
    assert sum(name.endswith(".base") for name in single["packed"]) == 14
    assert all(rank["resharded"] for rank in ranks)


def test_loss_and_gradients_are_those_of_one_process(run):
    single, ranks, _ = run
    for rank in ranks:
        assert rank["loss"] == pytest.approx(single["loss"], rel=1e-6)
        assert rank["grads"].keys() == single["grads"].keys()
        assert any("lora_scale_shift" in name for name in rank["grads"])
        for name, gradient in single["grads"].items():
            assert gradient.abs().max() > 0
            scale = gradient.abs().max().item()
            torch.testing.assert_close(rank["grads"][name], gradient, rtol=0, atol=2e-5 * scale, msg=name)


def test_the_gathered_checkpoint_is_that_of_one_process(run):
    _, _, folder = run
    single, gathered = _read(folder / "single"), _read(folder / "merged")
    assert gathered.keys() == single.keys()
    assert sum(name.endswith(("weight_packed", "input_scale")) for name in single) == 14
    for name in single:
        assert gathered[name].dtype == single[name].dtype
        assert torch.equal(gathered[name], single[name]), name
    assert (folder / "merged/config.json").read_text() == (folder / "single/config.json").read_text()


def test_each_rank_syncs_to_vllm_what_one_process_serves(run):
    single, ranks, _ = run
    for rank in ranks:
        assert rank["sent"].keys() == single["served"].keys()
        assert all(torch.equal(weight, single["served"][name]) for name, weight in rank["sent"].items())

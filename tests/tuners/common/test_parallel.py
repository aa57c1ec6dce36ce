"""Training spread over processes by Trainer and accelerate: the same run as in one process, or refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer

from peft_lrqat import LowBitAdamW
from peft_lrqat.tuners.common import parallel
from peft_lrqat.tuners.common.packed_parameter import PackedParameter
from peft_lrqat.tuners.lowbit_sr import LowBitTensor
from tests import lowbit_sr, lrqat
from tests.models import low_bit, tiny, tokens
from tests.parallel import FSDP2, WORLD, ZERO2, announce, found, in_two_processes, trainer, whole_adapter
from tests.refusals import refused

OPTIMIZERS = {
    "LowBitAdamW": lambda params: LowBitAdamW(params, lr=1e-2, error_feedback=True),
    "fused AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
}
KINDS = ("lrqat", "lowbit_sr", "rank 0")
# Below torch 2.12, FSDP2 shards no integers
RUNS = [*KINDS, *(["fsdp2 full", "fsdp2 sharded"] if torch.__version__ >= (2, 12) else [])]


def _merge_gathered(run: Trainer, rank: int, folder: Path) -> None:
    """As docs/guides/multi-gpu.md has it."""
    merged = run.model.merge_and_unload()
    state = {}
    for name, tensor in merged.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if rank == 0:
            state[name] = whole.cpu()
    if rank == 0:
        merged.save_pretrained(folder, state_dict=state)


def _steps(optimizer: str, model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Codes of low-bit SR after four steps of a loop of one's own."""
    rule = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    model.train()
    for _ in range(4):
        model(input_ids=ids, labels=ids).loss.backward()
        rule.step()
        rule.zero_grad()
    return _codes(model)


def _codes(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    return {name: p.codes() for name, p in named.items() if isinstance(p, LowBitTensor)}


def _by_hand(optimizer: str, rank: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(rank)  # torch's generators differ, as they may
    model = low_bit(tiny(), bits=4, learn_scales=True)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    return _steps(optimizer, wrapped, tokens(batch=WORLD)[rank : rank + 1])


def _ddp(kind: str, rank: int, folder: Path) -> dict[str, Any]:
    out = folder / kind
    run = trainer(kind, folder / "base", out, ddp_backend="gloo", ddp_find_unused_parameters=False)
    run.train()
    run.save_model(str(out / "adapter"))
    return found(run)


def _fsdp2(state_dict: str, rank: int, folder: Path) -> dict[str, Any]:
    announce({**FSDP2, "FSDP_STATE_DICT_TYPE": state_dict})
    out = folder / state_dict
    run = trainer("lrqat", folder / "base", out, use_cpu=False)
    run.train()
    results = found(run)
    results["sharded"] = all(hasattr(p, "full_tensor") for p in run.model.parameters())
    run.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    run.save_model(str(out / "adapter"))
    _merge_gathered(run, rank, out / "merged")
    if rank == 0:  # nobody waits for the others
        AutoModelForCausalLM.from_pretrained(folder / "base").load_adapter(str(out / "adapter"))

    announce({**FSDP2, "FSDP_STATE_DICT_TYPE": state_dict})
    again = trainer("lrqat", folder / "base", out, use_cpu=False)
    again.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    results["resumed"] = found(again)
    return results


def _work(rank: int, folder: Path) -> dict[str, Any]:
    if rank == 0:
        tiny("qwen2").save_pretrained(folder / "base")
    dist.barrier()
    results = {kind: _ddp(kind, rank, folder) for kind in KINDS} | {name: _by_hand(name, rank) for name in OPTIMIZERS}
    for run in RUNS[len(KINDS) :]:
        results[run] = _fsdp2(f"{run.split()[1].upper()}_STATE_DICT", rank, folder)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("parallel")
    return in_two_processes(_work, folder), folder


@pytest.fixture(scope="module")
def single(ranks: tuple[list, Path]) -> dict[str, dict[str, Any]]:
    """What one process finds with the same batches."""
    folder = ranks[1]
    results = {}
    for kind in KINDS:
        run = trainer(kind, folder / "base", folder / "single" / kind)
        run.train()
        results[kind] = found(run)
        run.model.merge_and_unload().save_pretrained(folder / "single" / kind / "merged")
    return results


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def _close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=name)


def _read(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_do_what_one_does(ranks, single, name: str):
    """To the last bit in DDP; FSDP2 sums the squares for the gradient's norm in another order."""
    sharded = name.startswith("fsdp2")
    expected = single["lrqat" if sharded else name]
    for rank in ranks[0]:
        here = rank[name]
        assert here["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        assert len(here["losses"]) == 4
        assert here["norms"] == pytest.approx(expected["norms"], rel=1e-6)
        assert min(here["norms"]) > 0.1  # gradients were clipped
        assert here["eval"] == pytest.approx(expected["eval"], rel=1e-6)
        assert here["eval"][0] != here["eval"][1]
        (_close if sharded else _equal)(here["adapter"], expected["adapter"])
        _equal(here["adapter"], ranks[0][0][name]["adapter"])
        assert here.get("sharded", True)


@pytest.mark.parametrize("name", RUNS)
def test_the_saved_adapter_merges_in_one_process(ranks, single, name: str):
    results, folder = ranks
    out = folder / {"fsdp2 full": "FULL_STATE_DICT", "fsdp2 sharded": "SHARDED_STATE_DICT"}.get(name, name)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, out / "adapter")
    _equal(whole_adapter(model), results[0][name]["adapter"])
    model.merge_and_unload().save_pretrained(out / "merged-alone")
    merged = _read(out / "merged-alone")
    assert sum(key.endswith("weight_packed") for key in merged) == 14
    # FSDP2's was merged and gathered in the training processes
    _equal(merged, _read(out / "merged" if name.startswith("fsdp2") else folder / "single" / name / "merged"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ranks_round_alike(ranks, optimizer: str):
    first, second = (rank[optimizer] for rank in ranks[0])
    start = _codes(low_bit(tiny(), bits=4))
    alone = _steps(optimizer, low_bit(tiny(), bits=4, learn_scales=True), tokens(batch=WORLD))
    assert first.keys() == start.keys()
    for name in start:
        assert torch.equal(first[name], second[name]), name
        assert not torch.equal(first[name], start[name]), name
        # one batch instead of two: gradients are summed in another order, and a code on the edge may fall otherwise
        assert (first[name] != alone[name]).float().mean() < 0.02, name


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("fsdp2")])
def test_a_sharded_run_resumes_where_it_was(ranks, name: str):
    for rank in ranks[0]:
        straight, resumed = rank[name], rank[name]["resumed"]
        assert resumed["losses"] == straight["losses"]
        _equal(resumed["adapter"], straight["adapter"])


# -- refused, when adapters are added


def _json(folder: Path, stage: int) -> dict[str, str]:
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(folder / "ds.json")}


LAUNCHED = {
    "fsdp1": lambda folder: {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
    "fsdp2": lambda folder: FSDP2,
    "zero2": lambda folder: {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": lambda folder: {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "zero2 file": lambda folder: _json(folder, 2),
    "zero3 file": lambda folder: _json(folder, 3),
}
REFUSED = {
    "lrqat": {"fsdp1": "FSDP1 flattens", "zero3": "ZeRO-3 gathers", "zero3 file": "ZeRO-3 gathers"},
    "lowbit_sr": {
        **dict.fromkeys(("zero2", "zero3", "zero2 file", "zero3 file"), "nothing would be trained"),
        "fsdp1": "FSDP1 flattens",
        "fsdp2": "FSDP2 would shard a plain float copy",
    },
}


@pytest.mark.parametrize("launched", LAUNCHED)
def test_what_was_announced_is_looked_at_before_anything_changes(
    method: ModuleType, launched: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    for name, value in LAUNCHED[launched](tmp_path).items():
        monkeypatch.setenv(name, value)
    message = REFUSED[method.__name__.rpartition(".")[2]].get(launched)
    if message is None and launched == "fsdp2" and not parallel.shards_integers():
        message = "FSDP2 shards integers from torch 2.12 on"
    model = tiny()
    if message is None:
        get_peft_model(model, method.config())
        return
    with refused(model, message):
        get_peft_model(model, method.config())


@pytest.mark.parametrize("stage", [2, 3])
def test_the_arguments_of_a_trainer_announce_deepspeed(method: ModuleType, stage: int, monkeypatch: pytest.MonkeyPatch):
    config = {"zero_optimization": {"stage": stage}}  # what transformers remembers of TrainingArguments(deepspeed=...)
    monkeypatch.setattr(transformers.integrations.deepspeed, "deepspeed_config", lambda: config)
    assert parallel.announced_zero() == stage
    if method is lrqat and stage == 2:
        get_peft_model(tiny(), method.config())
        return
    with refused(model := tiny(), "ZeRO-3 gathers" if method is lrqat else "nothing would be trained"):
        get_peft_model(model, method.config())


def test_a_torch_that_shards_no_integers_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    monkeypatch.setattr(parallel, "shards_integers", lambda: False)
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"from torch 2.12 on; this is torch"):
        get_peft_model(tiny(), lrqat.config())


def test_an_accelerator_that_exists_knows_better_than_the_environment(method: ModuleType, monkeypatch):
    for name, value in LAUNCHED["fsdp1"](Path()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    assert parallel.announced_fsdp() == 1
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    Accelerator(cpu=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert parallel.announced_fsdp() is None
    assert parallel.announced_zero() is None
    get_peft_model(tiny(), method.config())


def test_a_model_that_was_loaded_in_parts_is_refused(method: ModuleType):
    """With `pp_size` the parts are plain tensors: each process would train, and save, its own layers."""
    model = tiny()
    model._device_mesh = SimpleNamespace(size=lambda: 2)
    with refused(model, r"spread over 2 processes .*`distributed_config`.* Load it whole"):
        get_peft_model(model, method.config())
    model._device_mesh = SimpleNamespace(size=lambda: 1)
    get_peft_model(model, method.config())


# -- refused, when a wrapper takes the parameters


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp1_is_refused(method: ModuleType, one_process: None):
    model = method.random_adapter(tiny())
    with pytest.raises(ValueError, match=r"FSDP1 flattens parameters .*--fsdp_version 2"):
        FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


@pytest.mark.skipif(not parallel.shards_integers(), reason="FSDP2 shards no integer parameters before torch 2.12")
def test_adapters_that_fsdp2_would_round_are_refused(one_process: None):
    """Mixed precision by FSDP2's policy, as accelerate sets it for `bf16=True`, rounds a copy of what is merged."""
    model = lrqat.adapt(tiny(dtype=torch.bfloat16))
    mesh = init_device_mesh("cpu", (1,))
    first, second = model.get_base_model().model.layers
    fully_shard(first, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    model.train()
    fully_shard(second, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"rounds adapters to torch.bfloat16 .* in torch.float32: .*`bf16=False`"):
        model.train()
    model.eval()


@pytest.mark.skipif(
    not parallel.shards_integers(), reason="the frozen integers are refused by torch itself before 2.12"
)
@pytest.mark.filterwarnings("ignore")
def test_fsdp2_is_refused_for_low_bit_weights(one_process: None):
    with pytest.raises(ValueError, match=r"FSDP2 would shard a plain float copy .*LRQATConfig"):
        fully_shard(lowbit_sr.random_adapter(tiny()), mesh=init_device_mesh("cpu", (1,)))


def test_data_parallel_is_refused(method: ModuleType):
    def replicate() -> None:  # as torch.nn.parallel.replicate does it, on GPUs only
        for module in model.modules():
            module._replicate_for_data_parallel()

    model = method.random_adapter(tiny())
    with pytest.raises(ValueError, match=r"nn.DataParallel .*would compute without the adapter.*torchrun"):
        replicate()
    model = model.merge_and_unload()
    replicate()


def test_zero3_is_refused(method: ModuleType):
    """`deepspeed.zero.Init` begins with this for every parameter."""
    frozen = next(p for p in method.random_adapter(tiny()).parameters() if isinstance(p, PackedParameter))
    assert not hasattr(frozen, "ds_param_type")  # as others ask
    with pytest.raises(ValueError, match=r"ZeRO-3 gathers .*ZeRO stages 1 and 2"):
        frozen.ds_param_type = "partitioned"


def test_deepspeed_is_refused_for_low_bit_weights():
    """Its engine asks every parameter for its status, in every stage."""
    model = lowbit_sr.random_adapter(tiny())
    with pytest.raises(ValueError, match="nothing would be trained"):
        [hasattr(parameter, "ds_status") for parameter in model.parameters()]


# -- DeepSpeed ZeRO-2: needs deepspeed, which has no wheel


def _zero2(rank: int, folder: Path) -> dict[str, Any]:
    pytest.importorskip("deepspeed")
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # minutes of compiling
    announce({})
    if rank == 0:
        tiny("qwen2").save_pretrained(folder / "base")
    dist.barrier()
    out = folder / "zero2"
    run = trainer("lrqat", folder / "base", out, use_cpu=False, deepspeed=ZERO2)
    run.train()
    run.save_model(str(out / "adapter"))
    results = found(run)
    again = trainer("lrqat", folder / "base", out, use_cpu=False, deepspeed=ZERO2)
    again.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    results["resumed"] = found(again)
    return results


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_zero2_does_what_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    results = in_two_processes(_zero2, tmp_path)
    run = trainer("lrqat", tmp_path / "base", tmp_path / "single")
    run.train()
    expected = found(run)
    for here in results:
        assert here["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        assert here["eval"] == pytest.approx(expected["eval"], rel=1e-6)
        _close(here["adapter"], expected["adapter"])
        assert here["resumed"]["losses"] == here["losses"]
        _equal(here["resumed"]["adapter"], here["adapter"])
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "zero2/adapter"
    )
    _equal(whole_adapter(model), results[0]["adapter"])

"""What benchmarks/counted.py counts is what a model and its optimizer hold."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from peft_lrqat import LowBitAdamW, LowBitSRConfig, LRQATConfig

ROOT = Path(__file__).resolve().parents[1]
_COMMON = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
_INT4 = {"r": 4, "bits": 4, "downcast": "int", "range_method": "minmax"}
#: the method as it is counted, and its configuration
METHODS = {
    "lora": ((16, None, 4, None), LoraConfig(r=4, **_COMMON)),
    "fx8, by group": ((8, 64, 4, "group"), LRQATConfig(r=4, group_size=64, range_method="minmax", **_COMMON)),
    "int4, per channel": ((4, -1, 4, "group"), LRQATConfig(group_size=-1, **_INT4, **_COMMON)),
    "int4, by channel": ((4, 64, 4, "channel"), LRQATConfig(group_size=64, learn_scales="channel", **_INT4, **_COMMON)),
    "int4, fixed": ((4, 64, 4, None), LRQATConfig(group_size=64, learn_scales=False, **_INT4, **_COMMON)),
    "low-bit SR": ((4, -1, 0, None), LowBitSRConfig(bits=4, group_size=-1, keep_base=False, **_COMMON)),
}


def _model() -> LlamaForCausalLM:
    shape = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).to(torch.bfloat16)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_counted_is_what_is_held(name: str, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    counted = importlib.import_module("counted")
    model = _model()
    method, config = METHODS[name]
    found = counted.parts(model, counted.Method(*method, measured=""), tokens=16)
    assert found.pop("inputs of blocks, kept by checkpointing") == 2 * 16 * 128 * 2
    state = found.pop("the optimizer's state")
    model = get_peft_model(model, config)
    held = 0
    for parameter in model.parameters():
        packed = getattr(parameter, "packed", None)  # a low-bit weight is as large as its codes and scales
        held += parameter.nbytes if packed is None else packed.nbytes + parameter.scale.nbytes
    assert held == sum(found.values())

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "low-bit SR":
        optimizer: torch.optim.Optimizer = LowBitAdamW(trained, lr=1e-4, state="factored")
    else:
        optimizer = torch.optim.AdamW(trained)
    model(input_ids=torch.zeros(1, 2, dtype=torch.long), labels=torch.zeros(1, 2, dtype=torch.long)).loss.backward()
    optimizer.step()
    kept = [value for values in optimizer.state.values() for key, value in values.items() if key != "step"]
    assert state == sum(value.nbytes for value in kept if isinstance(value, torch.Tensor))


class _Sent(TorchDispatchMode):
    """Bytes of the whole tensors that are gathered and scattered."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.scattered = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if op is torch.ops.c10d._allgather_base_.default:
            self.gathered += args[0].nbytes
        elif op is torch.ops.c10d._reduce_scatter_base_.default:
            self.scattered += args[1].nbytes
        return op(*args, **(kwargs or {}))


@pytest.fixture
def four_ranks():
    """A process group of four, of which there is the first; what the others would send is not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


def _backward(model: torch.nn.Module) -> None:
    ids = torch.zeros(1, 2, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("name", METHODS)
def test_what_is_counted_is_what_ddp_reduces(name: str, four_ranks, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    counted = importlib.import_module("counted")
    method, config = METHODS[name]
    ranks = counted.ranks_of(_model(), counted.Method(*method, measured=""), tokens=2)
    model = DistributedDataParallel(get_peft_model(_model(), config))
    reduced: list[int] = []

    def reduce(state, bucket):  # DDP reads annotations, and knows none that are strings
        reduced.append(bucket.buffer().nbytes)
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model.register_comm_hook(None, reduce)
    _backward(model)
    assert sum(reduced) == ranks.gradients
    assert ranks.ddp_sent(2) == ranks.gradients


@pytest.mark.skipif(torch.__version__ < (2, 12), reason="FSDP2 shards no integer parameters before torch 2.12")
@pytest.mark.parametrize("name", ["lora", "fx8, by group", "int4, by channel"])
def test_what_is_counted_is_what_fsdp2_gathers_and_holds(name: str, four_ranks, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    counted = importlib.import_module("counted")
    method, config = METHODS[name]
    ranks = counted.ranks_of(_model(), counted.Method(*method, measured=""), tokens=2)
    model = get_peft_model(_model(), config)
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)
    held = sum(parameter.to_local().nbytes for parameter in model.parameters())
    assert held * 4 == ranks.blocks + ranks.root
    with _Sent() as sent:
        _backward(model)
    assert (sent.gathered, sent.scattered) == (2 * ranks.blocks + ranks.root, ranks.gradients)
    assert (sent.gathered + sent.scattered) * 3 / 4 == ranks.fsdp_sent(4)


def test_a_base_in_the_cpus_memory_leaves_two_layers_and_what_is_trained(monkeypatch: pytest.MonkeyPatch):
    """What is counted lies below what was measured, by what lives for a part of a step, the same at each rank."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    counted = importlib.import_module("counted")
    rows = {}
    for line in counted.held_offloaded().splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells and cells[0].replace(".", "").isdigit():
            rows[name] = [float(cell) if cell else None for cell in cells]
    together, measured = rows["together"], rows["measured at the peak"]
    assert 0.5 < measured[0] - together[0] < 1.5
    assert measured[0] - together[0] == pytest.approx(measured[1] - together[1], abs=0.15)
    parts = [cells for name, cells in rows.items() if name not in ("together", "measured at the peak")]
    assert [sum(cells) for cells in zip(*parts, strict=True)] == pytest.approx(together, abs=0.2)

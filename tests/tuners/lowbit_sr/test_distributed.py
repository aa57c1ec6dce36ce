"""Two data-parallel processes: every rank rounds with the same random numbers, so codes stay identical."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from peft_lrqat import LowBitAdamW
from peft_lrqat.tuners.lowbit_sr import LowBitTensor
from tests.models import low_bit, tiny, tokens

WORLD = 2
OPTIMIZERS = {
    "LowBitAdamW": lambda params: LowBitAdamW(params, lr=1e-2, error_feedback=True),
    "fused AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
}


def _run(optimizer: str, model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    rule = OPTIMIZERS[optimizer](trained)
    model.train()
    for _ in range(4):
        model(input_ids=ids, labels=ids).loss.backward()
        rule.step()
        rule.zero_grad()
    named = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    return {name: p.codes() for name, p in named.items() if isinstance(p, LowBitTensor)}


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        found = {}
        for name in OPTIMIZERS:
            torch.manual_seed(rank)  # torch's generators differ, as they may
            model = low_bit(tiny(), bits=4, learn_scales=True)
            wrapped = DistributedDataParallel(model, broadcast_buffers=False)
            found[name] = _run(name, wrapped, tokens(batch=WORLD)[rank : rank + 1])
        torch.save(found, Path(folder) / f"rank{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(_worker, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ranks_hold_the_same_codes(ranks: list[dict], optimizer: str):
    first, second = (rank[optimizer] for rank in ranks)
    start = {n: p.codes() for n, p in low_bit(tiny(), bits=4).named_parameters() if isinstance(p, LowBitTensor)}
    assert first.keys() == start.keys()
    for name in start:
        assert torch.equal(first[name], second[name]), name
        assert not torch.equal(first[name], start[name]), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ranks_do_what_one_process_does_with_the_whole_batch(ranks: list[dict], optimizer: str):
    single = _run(optimizer, low_bit(tiny(), bits=4, learn_scales=True), tokens(batch=WORLD))
    for name, expected in single.items():
        # gradients are summed in another order, so a code on the edge may fall to the other side
        assert (ranks[0][optimizer][name] != expected).float().mean() < 0.02, name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(torch.__version__ < (2, 12), reason="FSDP2 shards no integer parameters before torch 2.12")
def test_sharding_is_refused(tmp_path: Path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = low_bit(tiny(), bits=4)
        with pytest.raises(ValueError, match=r"FSDP2 would shard a plain float copy .*LRQATConfig"):
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()

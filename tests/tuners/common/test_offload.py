"""`offload_base`: the base lies in the CPU's memory, and nothing else is different."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from peft_lrqat import LowBitSRConfig, LRQATConfig
from peft_lrqat.checkpoint.export import export
from peft_lrqat.ops import staging
from peft_lrqat.tuners.common import offload
from peft_lrqat.tuners.common.frozen import FrozenWeight
from tests.mixtures import mixture, on_experts
from tests.models import adapted, logits, low_bit, tiny, tokens, train

IDS = tokens(2, 6)
WEIGHTS = "model.safetensors"
MODELS: dict[str, Any] = {
    "mixture": lambda **options: on_experts(mixture(num_hidden_layers=3), **options),
    "mixture, eager": lambda **options: on_experts(mixture(how="eager", num_hidden_layers=3), **options),
    "mixture, one change a row": lambda **options: on_experts(
        mixture(torch.bfloat16, num_hidden_layers=3), learn_scales="channel", downcast="int", **options
    ),
    "mixture, rank 0": lambda **options: on_experts(mixture(num_hidden_layers=3), r=0, **options),
    "linear layers": lambda **options: adapted(
        tiny("qwen2", num_hidden_layers=3), init_lora_weights=False, symmetric=False, bits=3, **options
    ),
}


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[PeftModel, PeftModel]]:
    """Name -> a model with its base in place, and the same with its base offloaded."""
    return {name: (seeded(make), seeded(make, offload_base=True)) for name, make in MODELS.items()}


def seeded(make: Any, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    return make(**options)


def bases(model: nn.Module) -> list[FrozenWeight]:
    return [module for module in model.modules() if isinstance(module, FrozenWeight)]


def step(model: PeftModel, reentrant: bool | None = None, autocast: bool = False) -> list[Tensor]:
    """Logits and all gradients."""
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    found = [out.logits.detach(), *[p.grad for p in trained]]
    model.zero_grad(set_to_none=True)
    return found


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.fixture
def fills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that are copied."""
    found: list[int] = []
    fill = staging._Buffers.fill

    def noted(self: Any, block: int, *args: Any) -> Any:
        found.append(block)
        return fill(self, block, *args)

    monkeypatch.setattr(staging._Buffers, "fill", noted)
    return found


@pytest.mark.parametrize(
    ("name", "reentrant"),
    [
        ("mixture", False),
        ("mixture, eager", None),
        ("mixture, one change a row", True),
        ("linear layers", None),
        ("linear layers", False),
        ("linear layers", True),
    ],
)
def test_no_number_changes_and_each_block_is_copied_once_each_way(
    name: str, reentrant: bool | None, made: dict, fills: list[int]
):
    here, there = map(copy.deepcopy, made[name])
    assert same(step(there, reentrant), step(here, reentrant))
    fills.clear()
    step(there, reentrant)
    assert fills == [2, 0]


@pytest.mark.parametrize("name", ["mixture", "linear layers"])
def test_under_autocast_in_eval_and_while_it_generates(name: str, made: dict):
    here, there = map(copy.deepcopy, made[name])
    assert same(step(there, autocast=True), step(here, autocast=True))
    here.eval(), there.eval()
    with torch.inference_mode():
        assert torch.equal(there(input_ids=IDS).logits, here(input_ids=IDS).logits)
    assert torch.equal(logits(there, IDS), logits(here, IDS))
    kept = [model.generate(input_ids=IDS[:1], max_new_tokens=3, do_sample=False) for model in (here, there)]
    assert torch.equal(*kept)
    with here.disable_adapter(), there.disable_adapter():
        assert torch.equal(logits(there, IDS), logits(here, IDS))
    assert same(step(there), step(here))


@pytest.mark.parametrize("name", ["mixture", "linear layers"])
def test_training_merging_and_files_are_the_same(name: str, made: dict, tmp_path: Path):
    here, there = map(copy.deepcopy, made[name])
    assert train(there, IDS, steps=2) == train(here, IDS, steps=2)
    expected = logits(here, IDS)
    there.merge_adapter()
    assert torch.equal(logits(there, IDS), expected)
    there.unmerge_adapter()
    assert all(base.offloaded for base in bases(there))
    assert torch.equal(logits(there, IDS), expected)
    there.save_pretrained(tmp_path / "adapter")
    assert "offload_base" not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    export(there, tmp_path / "exported", progress=False)
    there.merge_and_unload().save_pretrained(tmp_path / "merged")
    here.merge_and_unload().save_pretrained(tmp_path / "expected")
    merged, exported, wanted = (load_file(tmp_path / f / WEIGHTS) for f in ("merged", "exported", "expected"))
    for found in (merged, exported):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_saved_adapter_is_loaded_offloaded(made: dict, tmp_path: Path):
    here = made["linear layers"][0]
    here.save_pretrained(tmp_path)
    float_model = tiny("qwen2", num_hidden_layers=3)
    loaded = PeftModel.from_pretrained(float_model, tmp_path, offload_base=True)
    assert all(base.offloaded for base in bases(loaded))
    assert torch.equal(logits(loaded, IDS), logits(here, IDS))


def test_several_adapters(made: dict, fills: list[int]):
    here, there = map(copy.deepcopy, made["mixture"])
    for model in (here, there):
        torch.manual_seed(1)
        model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
        model.base_model.set_adapter(["default", "second"])
    assert same(step(there), step(here))
    fills.clear()
    step(there)
    assert fills == [2, 0]


def test_a_second_adapter_offloads_a_base_in_place(made: dict):
    here, _ = map(copy.deepcopy, made["linear layers"])
    expected = logits(here, IDS)
    config = copy.deepcopy(here.peft_config["default"])
    config.offload_base = True
    here.add_adapter("second", config)
    assert all(base.offloaded for base in bases(here))
    assert torch.equal(logits(here, IDS), expected)


def test_copies_of_a_model_are_right(made: dict, fills: list[int]):
    here, there = made["mixture"]
    expected = logits(here, IDS)
    buffer = io.BytesIO()
    torch.save(there.state_dict(), buffer)
    changed = copy.deepcopy(there)
    with torch.no_grad():
        for base in bases(changed):
            base.base.fill_(1)
    assert not torch.equal(logits(changed, IDS), expected)
    assert torch.equal(logits(there, IDS), expected)
    buffer.seek(0)
    changed.load_state_dict(torch.load(buffer))
    assert torch.equal(logits(changed, IDS), expected)
    fills.clear()
    logits(changed, IDS)
    assert len(fills) == 3  # no block twice


def test_tensors_that_somebody_has_replaced_are_found(made: dict):
    here, there = made["linear layers"][0], copy.deepcopy(made["linear layers"][1])
    expected = logits(here, IDS)
    assert torch.equal(logits(there, IDS), expected)
    for base in bases(there):
        base.base = type(base.base)(base.base.data.clone())
    assert torch.equal(logits(there, IDS), expected)
    for base in bases(there):
        base.base = type(base.base)(torch.zeros_like(base.base))
    assert not torch.equal(logits(there, IDS), expected)


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_copy_that_is_interrupted_is_made_again(nth: int, made: dict, monkeypatch: pytest.MonkeyPatch):
    here, there = map(copy.deepcopy, made["linear layers"])
    whole, calls = staging.AtOnce.copy, []

    def interrupted(self: Any, pairs: list, after: list) -> Any:
        calls.append(len(pairs))
        if len(calls) == nth:
            whole(self, pairs[: len(pairs) // 2], after)
            raise KeyboardInterrupt
        return whole(self, pairs, after)

    with monkeypatch.context() as patch:
        patch.setattr(staging.AtOnce, "copy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step(there)
    there.zero_grad(set_to_none=True)
    assert same(step(there), step(here))


def test_float_weights_that_are_loaded_reach_the_layers(made: dict):
    there = copy.deepcopy(made["linear layers"][1])
    other = tiny("qwen2", num_hidden_layers=3, seed=3)
    expected = adapted(copy.deepcopy(other), symmetric=False, bits=3)
    logits(there, IDS)
    renamed = {key.replace("_proj.", "_proj.base_layer."): value for key, value in other.state_dict().items()}
    missing, unexpected = there.base_model.model.load_state_dict(renamed, strict=False)
    assert not unexpected
    assert all("lora" in name for name in missing)
    with there.disable_adapter():
        assert torch.equal(logits(there, IDS), logits(expected, IDS))


def test_the_base_stays_where_it_is_and_the_layer_moves(made: dict):
    there = copy.deepcopy(made["mixture"][1]).to("meta")
    for base in bases(there):
        assert base.device.type == "meta"
        assert {base.base.device.type, base.scale0_bits.device.type} == {"cpu"}
        assert base.checksum().is_meta
    assert all(p.is_meta for name, p in there.named_parameters() if "lora" in name)
    half = copy.deepcopy(made["mixture"][1]).to(torch.bfloat16)
    assert all(base.compute_dtype == torch.bfloat16 for base in bases(half))


def test_layers_are_blocks_as_they_are_computed_again(made: dict):
    for name in ("mixture", "linear layers"):
        model = made[name][1]
        for layer, module in model.named_modules():
            if isinstance(module, FrozenWeight):
                assert f".layers.{module.block}." in layer


def test_quantized_while_it_is_loaded(tmp_path: Path):
    tiny("qwen2", num_hidden_layers=3).save_pretrained(tmp_path)
    options = {"group_size": -1, "offload_base": True, "task_type": "CAUSAL_LM"}
    config = LRQATConfig(**options)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config.for_loading())
    assert all(base.offloaded for base in bases(loaded))
    expected = adapted(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(logits(loaded, IDS), logits(expected, IDS))
    model = get_peft_model(loaded, config)
    assert torch.equal(logits(model, IDS), logits(expected, IDS))
    assert {base.block for base in bases(model)} == {0, 1, 2}


@pytest.mark.slow  # torch.compile
def test_compiled(made: dict):
    """One layer; in a graph there is nothing to be seen of where its base lies."""
    x, found = torch.randn(3, 32), []
    for model in made["linear layers"]:
        layer = model.base_model.model.model.layers[1].self_attn.q_proj
        y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [p for p in layer.parameters() if p.requires_grad])])
    assert same(*found)


def test_embeddings_stay(made: dict):
    model = adapted(tiny(), target_modules=["embed_tokens", "q_proj"], offload_base=True)
    assert [base.offloaded for base in bases(model)] == [False, True, True]
    train(model, IDS, steps=1)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_leaves_the_base_alone(alone: None, made: dict):
    here, there = map(copy.deepcopy, made["mixture"])
    expected = step(here)
    parallel = DistributedDataParallel(there)
    names = {name for name, _ in there.named_parameters()}
    assert parallel.parameters_to_ignore <= names
    left = {name.rpartition(".")[2] for name in names if "base_layer" in name} - {"bias"}
    assert left == {name.rpartition(".")[2] for name in parallel.parameters_to_ignore}
    parallel(input_ids=IDS, labels=IDS).loss.backward()
    assert same([p.grad for p in there.parameters() if p.requires_grad], expected[1:])


@pytest.mark.skipif(torch.__version__ < (2, 12), reason="FSDP2 shards no integer parameters before torch 2.12")
def test_fsdp2_is_refused_when_training_starts(alone: None, made: dict):
    model = copy.deepcopy(made["linear layers"][1])
    fully_shard(model)
    with pytest.raises(ValueError, match="FSDP shards the base"):
        model.train()


@pytest.mark.parametrize(
    ("announced", "who"), [("announced_fsdp", "FSDP shards"), ("announced_zero", "DeepSpeed sends")]
)
def test_what_takes_the_base_away_is_refused_when_it_is_announced(
    announced: str, who: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(offload, announced, lambda: 2)
    with pytest.raises(ValueError, match=rf"`offload_base=True` keeps .*{who}"):
        MODELS["linear layers"](offload_base=True)
    MODELS["linear layers"]()


def test_low_bit_sr_has_no_base_to_offload():
    with pytest.raises(TypeError, match="offload_base"):
        LowBitSRConfig(offload_base=True)
    for keep_base in (True, False):
        model = low_bit(tiny(), bits=4, keep_base=keep_base)
        assert not model.base_model._ddp_params_and_buffers_to_ignore
        model.train()

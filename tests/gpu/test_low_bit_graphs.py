"""Low-bit SR in blocks that are CUDA graphs: the integers of training without them."""

import copy
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from peft_lrqat import CudaGraphCallback, LowBitAdamW, calibrate_activations, cuda_graphs
from peft_lrqat.ops.narrow_gradient import NarrowGradient
from tests.graphs import attached, checkpointed
from tests.low_bit_graphs import loss_of, low_bit_weights, optimizer_of, run, several_forwards
from tests.lowbit_sr import integers
from tests.models import low_bit, tiny, tokens
from tests.trainer import arguments, counting_text, losses, word_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GRAPHED: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4},
    "8 bits, growing": {"bits": 8, "grow_scales": True},
    "ternary": {"bits": 1.58},
    "learned scales": {"bits": 4, "group_size": 32, "learn_scales": True},
    "BitNet": {"bits": 1.58, "group_size": 0, "act_bits": 8, "export_format": "bitnet"},
    "ternary forward": {"bits": 8, "forward_bits": 1.58, "learn_scales": True},
    "rounded inputs": {"bits": 8, "act_bits": 8},
    "fixed scales of inputs": {"bits": 8, "act_bits": 8, "act_scale": "static"},
    "rounded cache": {"bits": 4, "kv_bits": 8, "kv_rule": "vllm"},
}


def make(kind: str = "4 bits", layers: int = 3, **shape: int) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, **shape}
    base: Any = tiny(dtype=torch.bfloat16, num_hidden_layers=layers, **sizes)
    base = base.cuda()
    base.set_attn_implementation("eager")  # the gradients of the default one differ from run to run
    model = low_bit(base, **{"range_method": "minmax", **GRAPHED[kind]})
    if kind == "fixed scales of inputs":
        calibrate_activations(model, [tokens().cuda()])
    return model


def same(train: Callable[[bool], list[torch.Tensor]]) -> None:
    """Check that training is the same with graphs and without, as far as it is without in two runs."""
    expected, again, found = train(False), train(False), train(True)
    differ = [i for i, (one, other) in enumerate(zip(expected, again, strict=True)) if not torch.equal(one, other)]
    print(f"{len(differ)} of {len(expected)} differ from run to run")
    assert len(differ) < len(expected) / 2
    for i, (mine, one) in enumerate(zip(found, expected, strict=True)):
        assert i in differ or torch.equal(mine, one), (i, mine.dtype, mine.shape, (mine != one).float().mean())


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "no autocast"])
@pytest.mark.parametrize("fused", [True, False], ids=["in backward", "in step"])
@pytest.mark.parametrize("kind", GRAPHED)
def test_integers_are_those_without(kind: str, fused: bool, autocast: bool):
    def train(graphs: bool) -> list[torch.Tensor]:
        model = checkpointed(make(kind))
        blocks = attached(model) if graphs else None
        found = run(model, optimizer_of(model, fused_backward=fused), autocast=autocast)
        if blocks is not None:
            assert blocks.counts == {"recorded": 6, "replayed": 12, "ordinary": 6}
            blocks.detach()
        return found

    same(train)


@pytest.mark.parametrize(
    "options", [{"state": "factored"}, {"error_feedback": True}, {"latent_weights": True}], ids=str
)
def test_gradients_that_accumulate(options: dict[str, Any]):
    def train(graphs: bool) -> list[torch.Tensor]:
        model = checkpointed(make())
        optimizer = optimizer_of(model, fused_backward=True, gradient_accumulation_steps=2, **options)
        blocks = attached(model) if graphs else None
        found = run(model, optimizer, accumulate=2)
        assert blocks is None or blocks.counts["replayed"] == 30
        return found

    same(train)


def prepared(graphs: bool, model: Any = None, **options: Any) -> Any:
    model = checkpointed(make() if model is None else model)
    blocks: Any = attached(model) if graphs else None
    model.blocks, model.optimizer = blocks, optimizer_of(model, **{"fused_backward": True, **options})
    for seed in range(2):
        loss_of(model, seed).backward()
        model.optimizer.step()
        model.optimizer.zero_grad()
    assert blocks is None or blocks.counts["recorded"] == 3
    return model


@pytest.mark.parametrize(("backwards", "told"), [(1, None), (3, 3)])
def test_several_forwards_before_their_backwards(backwards: int, told: int | None):
    def train(graphs: bool) -> list[torch.Tensor]:
        model = prepared(graphs, gradient_accumulation_steps=told)
        return [*several_forwards(model, backwards), *integers(model)]

    same(train)


def test_weights_that_blocks_share():
    def train(graphs: bool) -> list[torch.Tensor]:
        model = make()
        layers = model.get_base_model().model.layers
        layers[1].mlp.up_proj = layers[0].mlp.up_proj
        layers[1].mlp.gate_proj = layers[1].mlp.up_proj
        layers[2].mlp.down_proj = layers[0].mlp.down_proj
        model = prepared(graphs, model)
        return [*run(model, model.optimizer, steps=3), *integers(model)]

    same(train)


def test_gradients_that_somebody_keeps_do_not_change():
    def train(graphs: bool) -> list[torch.Tensor]:
        model = prepared(graphs)
        kept: dict[int, torch.Tensor] = {}
        weights = low_bit_weights(model)
        for i, p in enumerate(weights):
            p.register_hook(partial(kept.setdefault, i))
        loss_of(model, 5).backward()
        model.optimizer.step()
        model.optimizer.zero_grad()
        asked = torch.autograd.grad(loss_of(model, 6), weights)
        loss_of(model, 7).backward()
        return [grad + 0 for grad in (*(kept[i] for i in range(len(weights))), *asked)]

    same(train)


def test_another_optimizer_takes_over_before_backward():
    def train(graphs: bool) -> list[torch.Tensor]:
        model = prepared(graphs)
        loss = loss_of(model, 5)
        model.optimizer = optimizer_of(model)
        loss.backward()
        grads = [p.grad for p in low_bit_weights(model)]
        assert {type(grad) for grad in grads} == {NarrowGradient}
        model.zero_grad(set_to_none=True)
        loss_of(model, 6).backward()
        return [*(grad + 0 for grad in grads), *run(model, model.optimizer)]

    same(train)


def test_blocks_on_a_stream_of_their_own():
    """Where gradients arrive on the stream on which the weights were used first, steps are made there."""

    def train(graphs: bool) -> list[torch.Tensor]:
        model = prepared(False)
        nodes = [torch.autograd.graph.get_gradient_edge(p) for p in low_bit_weights(model)]  # belong to this stream
        blocks = attached(model) if graphs else None
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            found = run(model, model.optimizer)
        torch.cuda.current_stream().wait_stream(side)
        assert blocks is None or blocks.counts["replayed"] == 12
        assert len(nodes) == 21
        return found

    same(train)


def test_loaded_integers_and_copies():
    def train(graphs: bool) -> list[torch.Tensor]:
        model = prepared(graphs)
        saved = {name: t.clone() for name, t in model.state_dict().items()}
        found = run(model, model.optimizer, steps=2)
        model.load_state_dict(saved)
        blocks, model.blocks = model.blocks, None
        other = copy.deepcopy(model)
        found += [*run(model, model.optimizer, steps=2), *run(other, other.optimizer, steps=2)]
        assert blocks is None or blocks.counts["recorded"] == 6
        return found

    same(train)


def test_a_pool_does_not_hold_the_gradients_of_a_block():
    """The shared results do, once."""
    held = []
    for layers in (2, 4):
        model = checkpointed(make(layers=layers, hidden_size=2048, intermediate_size=8192))
        optimizer = optimizer_of(model, fused_backward=True)
        with cuda_graphs(model):
            for seed in range(3):
                loss_of(model, seed).backward()
                optimizer.step()
                optimizer.zero_grad()
            torch.cuda.synchronize()
            pools = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0)]
            held.append(sum(s["total_size"] - s["allocated_size"] for s in pools))
        del model, optimizer
        gc.collect()
        torch.cuda.empty_cache()
    gradients = 2 * (4 * 2048 * 2048 + 3 * 2048 * 8192)
    print(f"pools {[one / 2**20 for one in held]} MiB, gradients of a block {gradients / 2**20} MiB")
    assert 0 < held[1] <= 1.1 * held[0]
    assert held[1] < gradients


@pytest.mark.parametrize("optimizer", [None, LowBitAdamW.for_trainer], ids=["AdamW", "in backward"])
def test_through_a_trainer(optimizer: Any, tmp_path):
    sft = pytest.importorskip("trl")

    def train(graphs: bool) -> list[torch.Tensor]:
        args = arguments(
            tmp_path, sft.SFTConfig, max_length=32, use_cpu=False, bf16=True, gradient_accumulation_steps=2
        )
        trainer = sft.SFTTrainer(
            make("learned scales"),
            args,
            train_dataset=counting_text(),
            processing_class=word_tokenizer(),
            optimizer_cls_and_kwargs=None if optimizer is None else optimizer(args),
            callbacks=[CudaGraphCallback()] if graphs else [],
        )
        trainer.train()
        return [torch.tensor(losses(trainer)), *integers(trainer.model)]

    same(train)

"""Blocks as CUDA graphs: the numbers of training without them."""

import gc
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_lrqat import CudaGraphCallback, cuda_graphs
from tests.graphs import trained
from tests.mixtures import mixture, on_experts
from tests.models import adapted, tiny, tokens
from tests.trainer import arguments, counting_text, losses, word_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GRAPHED = {
    "fx8": {},
    "int4 in groups": {"downcast": "int", "group_size": 32},
    "channel scales": {"downcast": "int", "group_size": 32, "learn_scales": "channel"},
    "rank 0": {"r": 0, "group_size": 32},
    "rounded inputs": {"act_bits": 8},
    "rounded cache": {"kv_bits": 8, "kv_rule": "vllm"},
}


class TestCudaGraphs:
    @staticmethod
    def make(kind: str, layers: int = 3) -> Any:
        torch.manual_seed(0)
        if kind == "mixture":
            return on_experts(mixture(torch.bfloat16, hidden_size=256, moe_intermediate_size=128), group_size=32).cuda()
        base = tiny(
            dtype=torch.bfloat16,
            num_hidden_layers=layers,
            hidden_size=256,
            intermediate_size=512,
            num_attention_heads=4,
        )
        if kind == "LoRA":
            return get_peft_model(base.cuda(), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        return adapted(base.cuda(), **GRAPHED[kind])

    @staticmethod
    def check(found: list[torch.Tensor], expected: list[torch.Tensor], again: list[torch.Tensor]) -> None:
        for i, (mine, one, other) in enumerate(zip(found, expected, again, strict=True)):
            if torch.equal(one, other):  # atomic sums differ from run to run
                assert torch.equal(mine, one), (i, (mine - one).abs().max(), one.abs().max())
            else:
                print(f"{i} differs from run to run by {(one - other).abs().max():.2g}")
                torch.testing.assert_close(mine, one, rtol=2e-2, atol=1e-2 * one.abs().max().item())

    @pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "no autocast"])
    @pytest.mark.parametrize("kind", ["LoRA", *GRAPHED, "mixture"])
    def test_losses_and_gradients_are_those_without(self, kind: str, autocast: bool):
        shapes = ((2, 64), (2, 64), (2, 64), (1, 96), (2, 64), (1, 96), (1, 96))
        runs = [trained(self.make(kind), graphs, shapes, autocast) for graphs in (False, False, True)]
        (expected, _), (again, _), (found, counts) = runs
        print(kind, counts)
        self.check(found, expected, again)
        if kind != "mixture":
            assert counts == {"recorded": 6, "replayed": 36, "ordinary": 6}

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_either_kind_of_checkpointing(self, reentrant: bool):
        how = {"use_reentrant": reentrant}
        runs = [trained(self.make("fx8"), graphs, checkpointing=how) for graphs in (False, False, True)]
        self.check(runs[2][0], runs[0][0], runs[1][0])

    def test_all_blocks_share_memory(self):
        held = []
        for layers in (2, 6):
            model = self.make("int4 in groups", layers).train()
            model.gradient_checkpointing_enable()
            ids = tokens(2, 64).cuda()
            with cuda_graphs(model):
                for _ in range(3):
                    model(input_ids=ids, labels=ids).loss.backward()
                torch.cuda.synchronize()
                pools = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0)]
                held.append(sum(s["total_size"] - s["allocated_size"] for s in pools))  # without cuBLAS' workspaces
            del model
            gc.collect()
            torch.cuda.empty_cache()
        assert 0 < held[1] <= 1.1 * held[0]

    def test_a_block_that_waits_runs_without(self):
        def waiting(model: Any) -> Any:
            mlp = model.base_model.model.model.layers[1].mlp
            before = mlp.forward
            mlp.forward = lambda x: before(x) * (1.0 if x.sum().item() < 1e9 else 2.0)
            return model

        runs = [trained(waiting(self.make("fx8")), graphs) for graphs in (False, False, True)]
        self.check(runs[2][0], runs[0][0], runs[1][0])
        assert runs[2][1] == {"recorded": 2, "replayed": 14, "ordinary": 2 + 8}

    def test_a_saved_adapter_goes_on(self, tmp_path):
        def goes_on(graphs: bool) -> list[torch.Tensor]:
            model = self.make("int4 in groups")
            first, _ = trained(model, graphs)
            model.save_pretrained(tmp_path / str(graphs))
            base = tiny(
                dtype=torch.bfloat16,
                num_hidden_layers=3,
                hidden_size=256,
                intermediate_size=512,
                num_attention_heads=4,
            )
            model = PeftModel.from_pretrained(base.cuda(), tmp_path / str(graphs), is_trainable=True)
            return [*first, *trained(model, graphs)[0]]

        expected, again, found = goes_on(False), goes_on(False), goes_on(True)
        self.check(found, expected, again)

    @pytest.mark.parametrize("packing", [True, False])
    def test_through_a_trainer(self, packing: bool, tmp_path):
        sft = pytest.importorskip("trl")

        def run(callbacks: list) -> list[float]:
            model = self.make("int4 in groups")
            options = {
                "max_length": 32,
                "packing": packing,
                "packing_strategy": "wrapped",
                "use_cpu": False,
                "bf16": True,
            }
            args = arguments(tmp_path, sft.SFTConfig, **options, gradient_accumulation_steps=2)
            trainer = sft.SFTTrainer(
                model, args, train_dataset=counting_text(), processing_class=word_tokenizer(), callbacks=callbacks
            )
            trainer.train()
            return losses(trainer)

        assert run([]) == run([CudaGraphCallback()])

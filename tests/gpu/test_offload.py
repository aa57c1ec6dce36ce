"""A base in pinned memory of the CPU: no number changes, and two blocks of it are on the GPU."""

import copy
import functools
import gc
from typing import Any

import pytest
import torch
from peft import PeftModel

from peft_lrqat.ops import staging
from peft_lrqat.tuners.common.frozen import FrozenWeight
from tests.mixtures import mixture, on_experts
from tests.models import adapted, logits, tiny, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class TestOffload:
    """`offload_base`: bases come from pinned memory, on a stream of their own."""

    @staticmethod
    def pair(kind: str, **options: Any) -> list[PeftModel]:
        found = []
        for offload in (False, True):
            torch.manual_seed(0)
            if kind == "mixture":
                base = mixture(torch.bfloat16, num_hidden_layers=4, hidden_size=256, moe_intermediate_size=128)
                model = on_experts(base, group_size=32, r=8, offload_base=offload, **options)
            else:
                base = tiny("llama", dtype=torch.bfloat16, num_hidden_layers=4, hidden_size=256, intermediate_size=512)
                model = adapted(base, group_size=32, init_lora_weights=False, offload_base=offload, **options)
            found.append(model.cuda())
        return found

    @staticmethod
    def step(model: PeftModel, ids: torch.Tensor, lag: Any = None) -> list[torch.Tensor]:
        """Logits and gradients; `lag` is called before attention and experts."""
        blocks = [m for name, m in model.named_modules() if name.endswith(("self_attn", "mlp"))] if lag else []
        handles = [block.register_forward_pre_hook(lambda *_: lag()) for block in blocks]
        model.train()
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        found = [out.logits.detach(), *[p.grad for p in model.parameters() if p.requires_grad]]
        model.zero_grad(set_to_none=True)
        for handle in handles:
            handle.remove()
        return found

    @pytest.mark.parametrize("late", ["neither", "copies", "products"])
    @pytest.mark.parametrize("reentrant", [None, False, True], ids=str)
    @pytest.mark.parametrize("kind", ["mixture", "linear layers"])
    def test_no_number_changes_whoever_is_late(self, kind: str, reentrant: bool | None, late: str, monkeypatch):
        here, there = self.pair(kind)
        ids = tokens(2, 24).cuda()
        for base in (m for m in there.modules() if isinstance(m, FrozenWeight)):
            assert base.device.type == "cuda"
            assert base.base.is_pinned()
            assert base.scale0_bits.is_pinned()
        if reentrant is not None:
            for model in (here, there):
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
                model.enable_input_require_grads()
        lag = None
        if late == "copies":
            at_once = staging.BesideStream.copy

            def slow(self, pairs, after):
                with torch.cuda.stream(self._side):
                    for moment in after:
                        self._side.wait_event(moment)
                    for there, _ in pairs:
                        there.fill_(77)  # what is read too early is wrong
                    torch.cuda._sleep(2_000_000)
                return at_once(self, pairs, after)

            monkeypatch.setattr(staging.BesideStream, "copy", slow)
        if late == "products":
            lag = functools.partial(torch.cuda._sleep, 200_000)
        expected, again = self.step(here, ids), self.step(here, ids)
        for _ in range(2):
            found = self.step(there, ids, lag)
            assert torch.equal(found[0], expected[0])
            for mine, one, other in zip(found, expected, again, strict=True):
                if torch.equal(one, other):  # atomic sums differ from run to run
                    assert torch.equal(mine, one)
                else:
                    torch.testing.assert_close(mine, one, rtol=2e-2, atol=1e-3 * one.abs().max().item())

    def test_two_blocks_of_the_base_are_on_the_gpu(self):
        here, there = self.pair("mixture", downcast="int")
        ids = tokens(2, 24).cuda()
        sizes = [0, 0, 0, 0]
        for base in (m for m in there.modules() if isinstance(m, FrozenWeight)):
            sizes[base.block] += base.base.nbytes + base.scale0_bits.nbytes
        del there
        held = []
        for model in (here, self.pair("mixture", downcast="int")[1]):
            gc.collect()
            self.step(model, ids)
            self.step(model, ids)
            held.append(sum(base.nbytes for base in model.parameters() if base.is_cuda))
        assert held[0] - held[1] == sum(sizes)
        (buffers,) = next(m for m in model.modules() if isinstance(m, FrozenWeight)).schedule._buffers.values()
        assert 2 * max(sizes) <= sum(b.memory.nbytes for b in (buffers._last, buffers._other)) < 2.1 * max(sizes)

    def test_it_moves_merges_and_generates(self):
        here, there = self.pair("mixture")
        ids = tokens(2, 24).cuda()
        expected = logits(here, ids)
        with torch.inference_mode():
            assert torch.equal(there(input_ids=ids).logits, expected)
        kept = [model.generate(input_ids=ids[:1], max_new_tokens=4, do_sample=False) for model in (here, there)]
        assert torch.equal(*kept)
        copied = copy.deepcopy(there)
        assert torch.equal(logits(copied, ids), expected)
        assert all(m.base.is_pinned() for m in copied.modules() if isinstance(m, FrozenWeight))
        del copied
        there.cpu()
        logits(there, ids.cpu())
        there.cuda()
        assert torch.equal(logits(there, ids), expected)
        mine, others = (model.merge_and_unload().state_dict() for model in (there, here))
        assert mine.keys() == others.keys()
        assert all(torch.equal(mine[name], others[name]) for name in mine)

    def test_a_cuda_graph_is_refused(self):
        _, there = self.pair("linear layers")
        layer = there.base_model.model.model.layers[0].self_attn.q_proj
        x = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            layer(x)
            with pytest.raises(RuntimeError, match="offload_base"), torch.cuda.graph(torch.cuda.CUDAGraph()):
                layer(x)

"""Generating on a GPU."""

import pytest
import torch

from peft_lrqat import kept_weights, limit_kept_weights
from tests.models import adapted, low_bit, tiny, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("make", [adapted, low_bit], ids=["lrqat", "lowbit_sr"])
def test_generating_keeps_dense_weights_and_frees_them(make):
    model = make(tiny(dtype=torch.bfloat16).cuda(), bits=4, group_size=16).eval()
    ids, stream = tokens(2, 8).cuda(), torch.cuda.Stream()
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "output_logits": True}
    for generating in (model, model.merge_and_unload()):

        def generate(limit, generating=generating):
            limit_kept_weights(limit)
            return torch.stack(generating.generate(input_ids=ids, return_dict_in_generate=True, **settings).logits)

        expected = generate(0)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        assert torch.equal(generate(None), expected)
        assert torch.cuda.memory_allocated() == before
        with torch.cuda.stream(stream):
            assert torch.equal(generate(None), expected)
        limit_kept_weights(None)

        graph, x = torch.cuda.CUDAGraph(), torch.randn(1, 1, 32, device="cuda", dtype=torch.bfloat16)
        layer = generating.get_submodule(
            next(name for name, _ in generating.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
        )
        with torch.no_grad(), kept_weights(generating):
            expected = layer(x)
            with torch.cuda.graph(graph):
                captured = layer(x)
        torch.empty(2**24, device="cuda").fill_(float("nan"))  # where the kept weight was
        graph.replay()
        assert torch.equal(captured, expected)

import copy

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from peft_lrqat.tuners.common import loss
from peft_lrqat.tuners.common.loss import causal_lm_loss
from tests.models import adapted, tiny, tokens


@pytest.mark.parametrize("chunk", [1, 200, 1 << 23])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_loss_of_transformers(monkeypatch, chunk, items, shifted, dtype):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    labels = torch.randint(0, 50, (2, 9))
    labels[0, 3:5] = -100
    extra = {"num_items_in_batch": items, "shift_labels": labels if shifted else None}
    logits = (torch.randn(2, 9, 50) * 5).to(dtype).requires_grad_()
    found = causal_lm_loss(logits, labels, 50, **extra)
    expected = ForCausalLMLoss(logits, labels, 50, **extra)
    torch.testing.assert_close(found, expected)
    got, wanted = (torch.autograd.grad(3 * value, logits)[0] for value in (found, expected))
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)


def test_an_adapted_model_uses_it_and_a_merged_one_does_not():
    base, ids = tiny(), tokens()
    expected = base(input_ids=ids, labels=ids).loss
    model = adapted(copy.deepcopy(base), bits=8)
    assert model.base_model.model.loss_function is causal_lm_loss
    found = model(input_ids=ids, labels=ids).loss
    assert abs(found - expected) < 0.02
    found.backward()
    merged = model.merge_and_unload()
    assert merged.loss_function is ForCausalLMLoss
    torch.testing.assert_close(merged(input_ids=ids, labels=ids).loss, found)


def test_a_loss_of_the_users_own_stays():
    def own(logits, labels, vocab_size, **kwargs):
        return logits.sum() * 0 + 42.0

    base = tiny()
    base.loss_function = own
    model = adapted(base)
    assert model(input_ids=tokens(), labels=tokens()).loss == 42.0
    assert model.merge_and_unload().loss_function is own

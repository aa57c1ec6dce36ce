import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput

from peft_lrqat.distillation.loss import TokenLosses
from peft_lrqat.distillation.sft import fused_output
from peft_lrqat.tuners.common import loss as lean


@pytest.mark.parametrize("chunk", [1, 1 << 23])
def test_fields_are_those_that_trl_makes(monkeypatch, chunk):
    pytest.importorskip("trl.trainer.utils").FusedCausalLMOutput  # noqa: B018  # versions of TRL that have it
    monkeypatch.setattr(lean, "CHUNK", chunk)
    logits = torch.randn(2, 5, 11)
    targets = torch.randint(0, 11, (10,))
    targets[3] = -100
    losses = TokenLosses(torch.rand(10, requires_grad=True), torch.rand(10))
    found = fused_output(CausalLMOutput(loss=losses.loss.sum(), logits=logits), losses, targets)
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    entropy[0, 3] = 0
    torch.testing.assert_close(found.entropy, entropy)
    counted = (targets != -100).view(2, 5)
    assert torch.equal(found.is_top1, (logits.argmax(-1) == targets.view(2, 5)) & counted)
    assert torch.equal(found.label_mask, counted)
    assert torch.equal(found.log_probs.flatten(), -losses.loss)

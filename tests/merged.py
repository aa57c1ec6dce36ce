"""What is asked of a model that was trained on a GPU, whatever the method."""

import torch
from transformers import AutoModelForCausalLM

from tests.models import logits


def check_merged(model, ids, folder):
    """Trained == merged on the GPU; saved, the CPU has the same integers, scales and floats."""
    seen = logits(model, ids)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, ids), seen)
    merged.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    there = loaded.state_dict()
    opened = any("zero_point" in name for name in merged.state_dict())  # by transformers, while it loads
    for name, value in merged.state_dict().items():
        assert opened or torch.equal(there[name], value.cpu()), name
    assert torch.equal(logits(loaded, ids.cpu()), logits(merged.cpu(), ids.cpu()))

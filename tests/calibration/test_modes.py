"""A model in evaluation mode for a while."""

from __future__ import annotations

from peft_lrqat.calibration.modes import in_eval
from tests.models import tiny


def test_every_module_gets_its_own_mode_back():
    model = tiny(num_hidden_layers=1).train()
    model.model.layers[0].mlp.eval()  # as users freeze a part
    before = [module.training for module in model.modules()]
    with in_eval(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    assert len(set(before)) == 2

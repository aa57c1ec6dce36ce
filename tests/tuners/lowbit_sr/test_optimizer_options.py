"""Options of `LowBitAdamW` that are refused, and those of a group that it does not read."""

from __future__ import annotations

import warnings

import pytest

from peft_lrqat import LowBitAdamW
from tests.lowbit_sr import trainable
from tests.models import low_bit, tiny


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -1.0}, "`lr` is -1.0"),
        ({"lr": "1e-3"}, "`lr` is '1e-3'; it must be a number"),
        ({"lr": float("nan")}, "`lr` is nan"),
        ({"lr": float("inf")}, "`lr` is inf; it must be a number of 0 or more, and finite"),
        ({"lr": True}, "`lr` is True"),
        ({"betas": (0.9, 1.0)}, r"`betas` is \(0.9, 1.0\); it must be two numbers"),
        ({"betas": 0.9}, "`betas` is 0.9; it must be two numbers"),
        ({"betas": ("0.9", 0.98)}, "`betas` is .*; it must be two numbers"),
        ({"eps": -1.0}, "`eps` is -1.0; it must be a number of 0 or more"),
        ({"eps": "1e-8"}, "`eps` is '1e-8'"),
        ({"weight_decay": -0.1}, "`weight_decay` is -0.1; it must be a number of 0 or more"),
        ({"weight_decay": None}, "`weight_decay` is None"),
        ({"betas": (0.0, 0.9), "error_feedback": True}, r"`betas` is .* keeps the rounding remainder in the momentum"),
        ({"state": "4bit"}, "`state` is '4bit'; allowed are"),
        ({"lr_unit": "step"}, "`lr_unit` is 'step'; allowed are"),
        ({"latent_weights": "8bit"}, "`latent_weights` is '8bit'; allowed are True, False, or None"),
        ({"error_feedback": "no"}, "`error_feedback` is 'no'; allowed are True, False, or None"),
        ({"latent_weights": True}, r"`latent_weights` is True, but there are low-bit weights of 8 bits"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` is 0"),
        ({"gradient_accumulation_steps": 2}, r"`gradient_accumulation_steps` is 2, which matters with"),
    ],
)
def test_arguments_out_of_range(options: dict, match: str):
    held = trainable(low_bit(tiny(num_hidden_layers=1)))
    with pytest.raises(ValueError, match=match):
        LowBitAdamW(held, **options)
    if "gradient_accumulation_steps" not in options:
        with pytest.raises(ValueError, match=match):
            LowBitAdamW([{"params": held, **options}])


def test_what_are_no_parameters_and_no_options():
    model = low_bit(tiny(num_hidden_layers=1))
    for what in (model, model.parameters):
        with pytest.raises(ValueError, match=r"`params` is a (PeftModel.*|method); .*`\[p for p in model\.parameters"):
            LowBitAdamW(what)
    with pytest.raises(ValueError, match="`fused_backward` is 'no'; allowed are True, False"):
        LowBitAdamW(trainable(model), fused_backward="no")
    with pytest.warns(
        UserWarning, match="`weight_dekay`, which LowBitAdamW does not read. Did you mean `weight_decay`"
    ):
        LowBitAdamW([{"params": trainable(model), "weight_dekay": 0.1}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LowBitAdamW([{"params": trainable(model), "initial_lr": 0.1, "name": "all"}])  # schedulers' and one's own

"""What a trained weight costs: bytes at rest, bytes in the file, and float copies that do not exist."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from peft_lrqat import LowBitAdamW
from peft_lrqat.tuners.lowbit_sr import LowBitTensor
from tests.memory import LiveBytes
from tests.models import low_bit, tiny, tokens

# the table of docs/guides/low-bit-sr.md: bytes a weight of the codes that are trained
BYTES = {1.58: 0.25, 2: 0.25, 3: 0.375, 4: 0.5, 8: 1.0}
# scales per channel (4 bytes in 256 columns or more) and the random stream's position, which a layer has once
SCALES = 4 / 256 + 16 / (256 * 256)
IDS = tokens()


def wide(layers: int = 1, hidden_size: int = 256, intermediate_size: int = 512, **options):
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": layers}
    return low_bit(tiny(vocab_size=96, **sizes), **options)


def tensors(model: nn.Module):
    """Everything with a storage that a model's linear layers hold: codes, scales, stream, base."""
    for name, p in model.named_parameters():
        if "embed" in name or "norm" in name or "lm_head" in name:
            continue
        inner = (p.packed, p.scale, p.stream, p.places) if isinstance(p, LowBitTensor) else (p,)
        yield from (t for t in inner if t is not None)


def weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if isinstance(p, LowBitTensor))


@pytest.mark.parametrize("keep_base", [False, True])
@pytest.mark.parametrize("bits", BYTES)
def test_bytes_at_rest(bits: float, keep_base: bool):
    model = wide(bits=bits, keep_base=keep_base)
    held = sum(t.nbytes for t in tensors(model)) / weights(model)
    copies = 2 if keep_base else 1
    assert copies * BYTES[bits] <= held <= copies * (BYTES[bits] + SCALES)
    run_step(model, fused_backward=True)
    assert held == sum(t.nbytes for t in tensors(model)) / weights(model)


# the other table: bytes a weight in all, while gradients exist; `fused_backward` keeps none of them
@pytest.mark.parametrize(
    ("options", "optimizer", "total"),
    [
        ({"bits": 8}, {}, 8),
        ({"bits": 8}, {"fused_backward": True}, 4),
        ({"bits": 8, "keep_base": False}, {"fused_backward": True}, 3),
        ({"bits": 4, "keep_base": False}, {"fused_backward": True, "state": "factored"}, 1.5),
        ({"bits": 1.58}, {}, 7.5),
        ({"bits": 1.58, "keep_base": False}, {"fused_backward": True, "state": "factored"}, 2.25),
        (
            {"bits": 1.58, "keep_base": False},
            {"fused_backward": True, "state": "factored", "latent_weights": False},
            1.25,
        ),
        ({"bits": 1.58, "keep_base": False}, {"fused_backward": True, "state": "factored", "betas": (0.0, 0.98)}, 1.25),
    ],
    ids=[
        "defaults",
        "fused",
        "fused, no base",
        "4 bits, factored",
        "ternary, defaults",
        "ternary, factored",
        "ternary, no latent weights",
        "ternary, no momentum",
    ],
)
def test_bytes_of_codes_state_and_gradients(options: dict, optimizer: dict, total: float):
    model = wide(**options)
    made = run_step(model, **optimizer)
    model(input_ids=IDS, labels=IDS).loss.backward()
    held = [*tensors(model), *(p.grad for p in model.parameters() if type(p.grad) is torch.Tensor)]
    held += [t for p in made.state if isinstance(p, LowBitTensor) for t in made.state[p].values()]
    size = sum(t.nbytes for t in held if isinstance(t, torch.Tensor)) / weights(model)
    assert total <= size <= total + 0.1


def run_step(model: nn.Module, **options) -> LowBitAdamW:
    optimizer = LowBitAdamW([p for p in model.parameters() if p.requires_grad], **options)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("bits", BYTES)
def test_saved_adapters_are_packed(bits: float, tmp_path: Path):
    model = wide(bits=bits)
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    header = 7 * 3 * 140  # names, shapes and offsets of three tensors for each of seven layers
    assert size <= weights(model) * (BYTES[bits] + SCALES) + header


def test_a_fused_step_holds_one_dense_gradient_at_a_time():
    narrow = {"layers": 2, "hidden_size": 96, "intermediate_size": 192}
    whole = 4 * weights(wide(**narrow))

    def peak(fused: bool) -> int:
        fresh = wide(**narrow).train()
        optimizer = LowBitAdamW([p for p in fresh.parameters() if p.requires_grad], fused_backward=fused)
        for _ in range(2):  # the second time, state exists
            state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
            with LiveBytes([*tensors(fresh), *state]) as live:
                fresh(input_ids=IDS, labels=IDS).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return live.peak - live.start

    fused, ordinary = peak(True), peak(False)
    # the same work space for the rows at hand; but not all the gradients
    assert ordinary > whole
    assert fused < ordinary - 0.6 * whole


def test_forward_and_backward_build_one_weight_at_a_time():
    model = wide(layers=2, bits=4, keep_base=False).train()
    for p in model.parameters():
        p.requires_grad_(False)
    with LiveBytes(tensors(model)) as live, torch.no_grad():
        model(input_ids=IDS)
    largest = 4 * 256 * 512
    activations = 4 * IDS.numel() * (96 + 20 * 512)
    assert live.peak - live.start < 6 * largest + activations < 4 * 14 * 256 * 256 * 1.5

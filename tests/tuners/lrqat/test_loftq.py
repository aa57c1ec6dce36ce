import pytest
import torch
from peft import LoftQConfig, PeftModel
from torch import nn

from peft_lrqat import LRQATConfig
from peft_lrqat.grid import Grid, grouped
from peft_lrqat.ops.reference import adapter_units, codes
from peft_lrqat.ops.stored_base import decode_base
from peft_lrqat.tuners.common.frozen import FrozenWeight
from peft_lrqat.tuners.lrqat import LRQATLinear
from peft_lrqat.tuners.lrqat.loftq import residual_factors
from tests.models import adapted, logits, tiny, tokens, train

OUT, IN = 20, 32


def lost_fractions(weight: torch.Tensor, frozen: FrozenWeight) -> torch.Tensor:
    """What the stored base lost of each weight, in grid steps; what is beyond the grid's ends is clipped, not lost."""
    levels = grouped(weight, frozen.scale0) / frozen.scale0.unsqueeze(-1)
    if frozen.zero_point is not None:
        levels = levels + frozen.zero_point.unsqueeze(-1)
    levels = levels.view_as(weight).clamp(frozen.grid.qmin, frozen.grid.qmax)
    return levels - decode_base(frozen.base, frozen.fmt)


def frozen_layer(bits: int, group_size: int, symmetric: bool) -> tuple[torch.Tensor, FrozenWeight]:
    layer = nn.Linear(IN, OUT)
    return layer.weight.detach(), FrozenWeight.of_floats(layer, Grid(bits, group_size, symmetric), "int")


def test_by_channel_the_factors_fit_what_was_lost_of_the_weight():
    weight, frozen = frozen_layer(4, 8, True)
    lost = grouped(lost_fractions(weight, frozen), frozen.scale0) * frozen.scale0.unsqueeze(-1)  # weight units
    t = frozen.scale0.abs().amax(1, keepdim=True)
    A, B = residual_factors(weight, frozen, 5, adapter_units(frozen.scale0, t))
    best = torch.linalg.svdvals(lost.view(OUT, IN) / t)[5:].square().sum().sqrt()
    assert (lost.view(OUT, IN) / t - B @ A).norm() <= best * (1 + 1e-4) + 1e-4


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [8, -1, 0])
@pytest.mark.parametrize("bits", [2, 4])
class TestFactors:
    def test_no_factors_of_that_rank_fit_better(self, bits, group_size, symmetric):
        weight, frozen = frozen_layer(bits, group_size, symmetric)
        lost = lost_fractions(weight, frozen)
        singular = torch.linalg.svdvals(lost)
        for rank in (1, 5, OUT):
            A, B = residual_factors(weight, frozen, rank)
            assert A.shape == (rank, IN)
            assert B.shape == (OUT, rank)
            assert A.dtype == B.dtype == torch.float32
            # Eckart and Young: the error of the best fit is what the other singular values hold
            best = singular[rank:].square().sum().sqrt()
            assert (lost - B @ A).norm() <= best * (1 + 1e-4) + 1e-4

    def test_both_factors_have_the_same_size(self, bits, group_size, symmetric):
        weight, frozen = frozen_layer(bits, group_size, symmetric)
        A, B = residual_factors(weight, frozen, 6)
        torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))

    def test_more_rank_than_the_weight_has(self, bits, group_size, symmetric):
        weight, frozen = frozen_layer(bits, group_size, symmetric)
        A, B = residual_factors(weight, frozen, OUT + 7)
        assert not A[OUT:].any()
        assert not B[:, OUT:].any()
        torch.testing.assert_close(B @ A, lost_fractions(weight, frozen), atol=1e-4, rtol=0)


def layers(model: nn.Module) -> list[LRQATLinear]:
    return [m for m in model.modules() if isinstance(m, LRQATLinear)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_adapter_starts_nearer_to_the_float_model(family):
    config = {"bits": 3, "downcast": "int", "r": 8, "lora_alpha": 4}
    floats = {name: m for name, m in tiny(family).named_modules() if hasattr(m, "weight")}
    model = adapted(tiny(family), init_lora_weights="loftq", **config)
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LRQATLinear):
            continue
        weight = floats[name].weight.detach()
        weight = weight.t().contiguous() if family == "gpt2" else weight
        lost = lost_fractions(weight, layer.base_layer)
        product = layer.get_delta_weight("default")
        product = product.t() if family == "gpt2" else product
        assert (lost - product).norm() < 0.8 * lost.norm()


def test_with_full_rank_the_float_weight_is_restored_before_the_rounding():
    weight = dict(tiny().named_parameters())["model.layers.0.mlp.up_proj.weight"].detach()
    model = adapted(
        tiny(), init_lora_weights="loftq", bits=2, downcast="int", r=32, lora_alpha=8, range_method="minmax"
    )
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    frozen = layer.base_layer
    levels = decode_base(frozen.base, frozen.fmt) + layer.get_delta_weight("default")
    torch.testing.assert_close(levels, (weight / frozen.scale0).clamp(-2, 1), atol=1e-4, rtol=0)


def test_the_base_is_the_plain_rounding():
    """So that loading the adapter can recompute it, without the SVD."""
    config = {"bits": 3, "downcast": "int"}
    plain, loftq = adapted(tiny(), **config), adapted(tiny(), init_lora_weights="loftq", **config)
    for a, b in zip(layers(plain), layers(loftq), strict=True):
        assert a.base_layer.checksum() == b.base_layer.checksum()
        fmt = a.base_layer.fmt
        assert torch.equal(codes(a.base_layer.base, None, None, fmt), codes(b.base_layer.base, None, None, fmt))


def test_trains_saves_and_loads(tmp_path):
    torch.manual_seed(0)
    model = adapted(tiny(dtype=torch.bfloat16), init_lora_weights="loftq", bits=3, downcast="int")
    losses = train(model, tokens(), steps=5)
    assert losses[-1] < losses[0] - 0.2
    trained = logits(model, tokens())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(dtype=torch.bfloat16), tmp_path).eval()
    assert torch.equal(logits(again, tokens()), trained)
    assert torch.equal(logits(model.merge_and_unload(), tokens()), trained)


def test_a_second_adapter_has_no_float_weight_to_start_from():
    model = adapted(tiny(), bits=3, downcast="int")
    config = LRQATConfig(
        bits=3, downcast="int", group_size=-1, r=4, target_modules="all-linear", init_lora_weights="loftq"
    )
    with pytest.raises(ValueError, match="float weight, which is gone"):
        model.add_adapter("second", config)


def test_more_than_one_iteration_is_refused():
    with pytest.raises(ValueError, match="loftq_iter"):
        LRQATConfig(init_lora_weights="loftq", loftq_config={"loftq_iter": 2})


@pytest.mark.parametrize("form", [dict, LoftQConfig])
def test_bits_of_another_grid_are_refused(form: type):
    """They were ignored: the grid's are `bits`. LoftQConfig's default of 4 says nothing."""
    with pytest.raises(ValueError, match=r"loftq_bits=8, but the grid has `bits=3`.*Set `bits=8`"):
        LRQATConfig(bits=3, init_lora_weights="loftq", loftq_config=form(loftq_bits=8))
    LRQATConfig(bits=3, init_lora_weights="loftq", loftq_config=LoftQConfig())
    LRQATConfig(bits=8, init_lora_weights="loftq", loftq_config=form(loftq_bits=8))


def test_a_configuration_of_loftq_without_it_is_said_to_do_nothing():
    with pytest.warns(UserWarning, match="`loftq_config` does nothing without `init_lora_weights='loftq'`"):
        LRQATConfig(loftq_config=LoftQConfig())


def test_a_saved_adapter_loads_beside_another(tmp_path):
    model = adapted(tiny(), group_size=8, downcast="int", init_lora_weights="loftq")
    train(model, tokens())
    model.save_pretrained(tmp_path)
    expected = logits(model, tokens())
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert torch.equal(logits(model.eval(), tokens()), expected)

import pytest
import torch
from torch import nn

from peft_lrqat.modules.block_state import BlockState, why_unfit
from peft_lrqat.modules.kv_cache import _give_stand_in
from tests.models import adapted, low_bit, tiny


def block(model: nn.Module) -> nn.Module:
    return model.get_base_model().model.layers[1]


@pytest.fixture(scope="module")
def lrqat():
    return adapted(tiny(), kv_bits=8).train()


class Plain(nn.Module):
    """Attributes of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(4))
        self.register_parameter("bias", None)
        self.kept = torch.ones(4)
        self.scaling, self.active, self.options = {"default": 2.0}, ["default"], {"odd": object()}
        self.handle = self.inner.register_forward_pre_hook(_give_stand_in)
        self.nothing, self.act, self.dtype = None, nn.functional.relu, torch.bfloat16


def test_adapters_and_a_rounded_cache_fit(lrqat):
    assert why_unfit(block(lrqat)) is None


def dropping(found: Plain) -> None:
    found.drop = nn.Dropout(0.1)


def dropping_attention(found: Plain) -> None:
    found.inner.attention_dropout = 0.1


def hooked(found: Plain) -> None:
    found.inner.register_forward_hook(print)


def hooked_backward(found: Plain) -> None:
    found.inner.register_full_backward_pre_hook(print)


def of_accelerate(found: Plain) -> None:
    found.inner._hf_hook = object()


def kept_elsewhere(found: Plain) -> None:
    found.kept = found.kept.to("meta")


def elsewhere(found: Plain) -> None:
    found.table = found.table.to("meta")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dropping, "'drop' (Dropout) drops out with p=0.1"),
        (dropping_attention, "'inner' (Linear) has `attention_dropout=0.1`"),
        (hooked, "'inner' (Linear) has a hook, print"),
        (hooked_backward, "'inner' (Linear) has a hook, print"),
        (of_accelerate, "'inner' (Linear) has a hook of accelerate"),
        (kept_elsewhere, "'kept' on meta"),
        (elsewhere, "on several devices: 'table' on meta"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_replay_would_not_repeat_is_named(change, words):
    found = Plain()
    assert why_unfit(found) is None
    change(found)
    assert words in why_unfit(found)


def test_hooks_of_the_block_itself_count_if_they_would_be_recorded():
    found = Plain()
    found.register_forward_pre_hook(print)
    assert why_unfit(found, hooks_of_itself=False) is None
    assert "'Plain' (Plain) has a hook, print" in why_unfit(found)


class Elsewhere(torch.Tensor):
    """A tensor of somebody else's, that may have its values anywhere."""


def test_integers_that_are_trained_fit_and_tensors_of_unknown_kinds_do_not():
    assert why_unfit(block(low_bit(tiny()))) is None
    found = Plain()
    found.inner.weight = nn.Parameter(torch.ones(4, 4).as_subclass(Elsewhere))
    assert "'inner.weight', which is trained, is a Elsewhere" in why_unfit(found)
    found.inner.weight.requires_grad_(False)
    assert why_unfit(found) is None


def test_nothing_has_changed(lrqat):
    for found in (Plain(), block(lrqat)):
        state = BlockState(found)
        assert state.changed() is None
        with torch.no_grad():
            for parameter in found.parameters():
                if parameter.is_floating_point():
                    parameter.mul_(2)  # values may change: a graph reads them anew
        assert state.changed() is None


def other_data(found: Plain) -> None:
    found.inner.weight.data = torch.ones(4, 4)


def frozen(found: Plain) -> None:
    found.inner.weight.requires_grad_(False)


def swapped(found: Plain) -> None:
    found.inner = nn.Linear(4, 4)


def filled(found: Plain) -> None:
    found.bias = nn.Parameter(torch.ones(4))


def added(found: Plain) -> None:
    found.something = 1


def evaluating(found: Plain) -> None:
    found.inner.eval()


def scaled(found: Plain) -> None:
    found.scaling["default"] = 3.0


def activated(found: Plain) -> None:
    found.active[0] = "other"


def given(found: Plain) -> None:
    found.nothing = object()


def another_object(found: Plain) -> None:
    found.act = nn.functional.gelu


def another_dtype(found: Plain) -> None:
    found.dtype = torch.float16


def hooked_anew(found: Plain) -> None:
    found.handle.remove()
    found.inner.register_forward_pre_hook(print)


def of_tensors(found: Plain) -> None:
    found.scaling["default"] = torch.ones(2)


def a_tensor(found: Plain) -> None:
    found.nothing = torch.ones(2)


def other_buffer(found: Plain) -> None:
    found.table = torch.ones(4)


def other_tensor(found: Plain) -> None:
    found.kept = torch.ones(4)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (other_data, "inner.weight"),
        (frozen, "inner.weight"),
        (swapped, "inner"),
        (filled, "bias"),
        (added, "attributes of the block"),
        (evaluating, "inner.training"),
        (scaled, "scaling"),
        (activated, "active"),
        (given, "nothing"),
        (another_object, "act"),
        (another_dtype, "dtype"),
        (other_buffer, "table"),
        (other_tensor, "kept"),
        (hooked, "hooks of inner"),
        (hooked_anew, "hooks of inner"),
        (of_tensors, "scaling"),
        (a_tensor, "nothing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_has_changed_is_named(change, name):
    found = Plain()
    state = BlockState(found)
    change(found)
    assert state.changed() == name


def test_an_equal_value_is_no_change():
    found = Plain()
    found.number, found.text = 1234.5, "some text"
    state = BlockState(found)
    found.number, found.text = float("1234.5"), "".join(["some ", "text"])
    found.scaling = {"default": 2.0}
    assert state.changed() is None
    found.number = 0
    assert state.changed() == "number"


def test_a_switched_adapter_is_a_change(lrqat):
    found = block(lrqat)
    state = BlockState(found)
    with lrqat.disable_adapter():
        assert state.changed() is not None
    assert state.changed() is None


def test_another_implementation_of_attention_is_a_change():
    model = tiny()
    state = BlockState(model.model.layers[0])
    model.set_attn_implementation("eager")
    assert state.changed() == "the implementation of attention"


def test_parameters_are_stood_in_for_in_all_their_places():
    found = Plain()
    found.twin = nn.Linear(4, 4)
    found.twin.weight = found.inner.weight
    state = BlockState(found)
    assert [id(p) for p in state.parameters] == [id(p) for p in found.parameters()]
    before = [found.inner.weight, found.inner.bias, found.twin.bias]
    others = [nn.Parameter(p.detach() + 1) for p in state.parameters]
    with state.with_parameters(others):
        assert found.inner.weight is found.twin.weight is others[0]
    assert all(a is b for a, b in zip([found.inner.weight, found.inner.bias, found.twin.bias], before, strict=True))
    assert state.changed() is None


def test_versions_count_changes_in_place():
    found = Plain()
    state = BlockState(found)
    before = state.versions()
    assert state.versions() == before
    with torch.no_grad():
        found.inner.weight.add_(1)
    assert state.versions() != before

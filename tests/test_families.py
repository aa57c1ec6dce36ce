"""Every family goes the whole way: convert, train, merge, save, reload in a process that has no plugin."""

import re
from pathlib import Path

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from peft_lrqat.modules.packed import QuantizedLinear
from peft_lrqat.tuners.lrqat import LRQATLinear
from tests.models import FAMILIES, adapted, logits, reload_clean, tiny, tokens, train

CONFIG = {"bits": 3, "group_size": 8, "range_method": "minmax", "container_bits": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    """Per family: losses, logits after training, merging and reloading, and the merged model."""
    work = tmp_path_factory.mktemp("families")
    found = {}
    for family in FAMILIES:
        torch.manual_seed(0)
        model = adapted(tiny(family, dtype=torch.bfloat16, tie=family in ("gemma", "gpt2")), **CONFIG)
        adapted_layers = sum(isinstance(m, LRQATLinear) for m in model.modules())
        losses = train(model, tokens(), steps=5)
        trained = logits(model, tokens())
        if family == "gpt2":
            with pytest.warns(UserWarning, match="Conv1D"):
                merged = model.merge_and_unload()
        else:
            merged = model.merge_and_unload()
        merged_logits = logits(merged, tokens())
        merged.save_pretrained(work / family)
        found[family] = {
            "layers": adapted_layers,
            "losses": losses,
            "trained": trained,
            "merged": merged_logits,
            "model": merged,
            "folder": work / family,
        }
    reloaded = reload_clean([work / family for family in FAMILIES], tokens(), work)
    for run, again in zip(found.values(), reloaded, strict=True):
        run["reloaded"] = again
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_loss(runs, family):
    losses = runs[family]["losses"]
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_the_blocks_is_quantized(runs, family):
    expected = {"gpt2": 8, "opt": 12}.get(family, 14)
    assert runs[family]["layers"] == expected
    if family != "gpt2":
        assert sum(isinstance(m, QuantizedLinear) for m in runs[family]["model"].modules()) == expected
    assert not isinstance(runs[family]["model"].get_output_embeddings(), QuantizedLinear)


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_merged_and_reloaded_are_equal(runs, family):
    run = runs[family]
    assert torch.isfinite(run["trained"]).all()
    assert torch.equal(run["reloaded"], run["merged"])
    if (
        family == "gpt2"
    ):  # a dense Conv1D multiplies by a weight that lies transposed: same weight, other summation order
        torch.testing.assert_close(run["merged"], run["trained"], rtol=0.05, atol=0.02)
    else:
        assert torch.equal(run["merged"], run["trained"])


@pytest.mark.parametrize("family", FAMILIES)
def test_size_on_disk(runs, family):
    folder: Path = runs[family]["folder"]
    config = (folder / "config.json").read_text()
    assert bool(re.search(r'"quant_method": "compressed-tensors"', config)) == (family != "gpt2")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    floats = sum(p.numel() * 2 for p in tiny(family).parameters())
    assert (size < 0.8 * floats) == (family != "gpt2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpt2_merges_to_dense_weights_that_are_exactly_the_trained_ones(dtype):
    torch.manual_seed(0)
    model = adapted(tiny("gpt2", dtype=dtype), **CONFIG)
    train(model, tokens())
    layers = {name: m for name, m in model.base_model.model.named_modules() if isinstance(m, LRQATLinear)}
    weights = {}
    for name, layer in layers.items():
        layer.base_layer.bias.data.zero_()
        weights[name] = layer(torch.eye(layer.in_features, dtype=dtype)).detach()  # so the forward returns the weight
    with pytest.warns(UserWarning, match="dense floats"):
        merged = model.merge_and_unload()
    for name, weight in weights.items():
        layer = merged.get_submodule(name)
        assert isinstance(layer, Conv1D)
        assert torch.equal(layer.weight, weight)
        assert layer.weight.unique().numel() > 100
    assert getattr(merged.config, "quantization_config", None) is None

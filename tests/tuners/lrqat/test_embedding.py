"""Embeddings that `target_modules` names: the formula, its gradients, merging, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_lrqat import LRQATConfig
from peft_lrqat.grid import grouped
from peft_lrqat.ops.factors import round_factors
from peft_lrqat.ops.stored_base import decode_base
from peft_lrqat.tuners.lrqat.embedding import LRQATEmbedding
from tests.models import adapted, logits, tiny, tokens, train

IDS = tokens()


def layer_of(rows: int = 23, width: int = 12, **config) -> LRQATEmbedding:
    settings = {"group_size": 4, "bits": 3, "r": 3, "lora_alpha": 3, "target_modules": ["emb"], **config}
    model = get_peft_model(nn.ModuleDict({"emb": nn.Embedding(rows, width)}), LRQATConfig(**settings))
    return model.base_model.model.emb


def formula(layer: LRQATEmbedding, ids: torch.Tensor) -> torch.Tensor:
    """The design's formula in plain autograd, straight through the rounding (of the factors too), in fp32."""
    frozen = layer.base_layer
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    near = round_factors(A.detach(), B.detach())
    added = (B + (near.B - B).detach()) @ (A + (near.A - A).detach())
    if layer.lora_scale_shift["default"].weight.shape != frozen.scale0.shape:
        units = frozen.scale0.abs().amax(1, keepdim=True) / frozen.scale0
        added = (grouped(added, units) * units.unsqueeze(-1)).view_as(added)
    Z = decode_base(frozen.base, frozen.fmt) + added
    qmin, qmax = frozen.grid.qmin, frozen.grid.qmax
    Q = (Z + (Z.round() - Z).detach()).clamp(qmin, qmax)
    s = frozen.scale0 * (1 + layer.lora_scale_shift["default"].weight)
    levels = grouped(Q, s) if frozen.zero_point is None else grouped(Q, s) - frozen.zero_point.unsqueeze(-1)
    return (levels * s.unsqueeze(-1)).view(frozen.out_features, -1)[ids]


@pytest.mark.parametrize(
    "options", [{}, {"symmetric": False}, {"learn_scales": "channel"}, {"group_size": -1}, {"group_size": 0}]
)
def test_output_and_gradients(options: dict):
    layer = layer_of(**options)
    with torch.no_grad():  # some entries clip; rounding in the plain formula must not meet a tie
        layer.lora_A["default"].weight.normal_()
        layer.lora_B["default"].weight.normal_()
    ids = torch.tensor([[3, 3, 0], [22, 7, 3]])
    dy = torch.randn(2, 3, 12)
    trained = dict(layer.named_parameters())
    trained = {name: p for name, p in trained.items() if p.requires_grad}
    expected = formula(layer, ids)
    wanted = torch.autograd.grad((expected * dy).sum(), trained.values())
    found = layer(ids)
    got = torch.autograd.grad((found * dy).sum(), trained.values())
    torch.testing.assert_close(found, expected)
    for name, a, b in zip(trained, got, wanted, strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_merged_and_unmerged_are_equal(dtype: torch.dtype, tmp_path):
    base = tiny(dtype=dtype)
    model = adapted(copy.deepcopy(base), target_modules=["embed_tokens", "q_proj"], group_size=8)
    start = logits(model, IDS)
    losses = train(model, IDS)
    assert losses[-1] < losses[0]
    trained = logits(model, IDS)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(again, IDS), trained)
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), start)
    model.merge_adapter()
    assert torch.equal(logits(model, IDS), trained)
    model.unmerge_adapter()
    assert torch.equal(logits(model, IDS), trained)
    unloaded = copy.deepcopy(model).unload()
    assert type(unloaded.model.embed_tokens) is nn.Embedding
    assert torch.equal(logits(unloaded, IDS), start)
    merged = model.merge_and_unload()
    table = merged.model.embed_tokens.weight
    assert type(merged.model.embed_tokens) is nn.Embedding
    assert table.dtype == dtype
    assert all(len(row.unique()) <= 16 for row in table.view(-1, 8))
    assert torch.equal(logits(merged, IDS), trained)


def test_mixed_batches_look_up_each_samples_table():
    model = adapted(tiny(), target_modules=["embed_tokens"], init_lora_weights=False).eval()
    model.add_adapter(
        "other", LRQATConfig(group_size=-1, r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    )
    model.eval()
    ids = IDS[:1].expand(3, -1)
    with torch.no_grad():
        mixed = model(ids, adapter_names=["other", "__base__", "default"]).logits
    torch.testing.assert_close(mixed[2], logits(model, ids)[2])
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], logits(model, ids)[1])
    model.set_adapter("other")
    torch.testing.assert_close(mixed[0], logits(model, ids)[0])


def test_a_models_own_embedding_class_is_kept():
    class MyScaledWordEmbedding(nn.Embedding):
        def __init__(self, rows: int, width: int) -> None:
            super().__init__(rows, width)
            self.register_buffer("embed_scale", torch.tensor(6.5), persistent=False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * self.embed_scale

    ids = torch.arange(9)
    config = LRQATConfig(group_size=-1, r=2, target_modules=["emb"], init_lora_weights=False)
    model = get_peft_model(nn.ModuleDict({"emb": MyScaledWordEmbedding(9, 8)}), config)
    found = model.base_model.model.emb(ids)
    merged = model.merge_and_unload().emb
    assert type(merged) is MyScaledWordEmbedding
    assert torch.equal(merged(ids), found)


def test_no_graph_break():
    layer = layer_of(init_lora_weights=False)
    torch._dynamo.reset()
    ids = torch.arange(20)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(ids), layer(ids))


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"sparse": True}])
def test_tables_that_must_be_float_are_refused(option: dict):
    with pytest.raises(ValueError, match="needs a float table"):
        get_peft_model(
            nn.ModuleDict({"emb": nn.Embedding(9, 8, **option)}), LRQATConfig(group_size=-1, target_modules=["emb"])
        )

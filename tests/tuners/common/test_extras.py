"""Heads of tasks: float, trained, saved with the adapter, and no part of what tells one base from another."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from peft_lrqat import LRQATConfig, load_quantized
from peft_lrqat.checkpoint.model_source import load_adapter
from tests.models import adapted, logits, tiny, tokens, train

_IDS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {**_IDS, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS: dict[str, dict] = {
    "Bert": _BERT,
    "Llama": {**_BERT, "num_key_value_heads": 2},
    "T5": {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0,
           "decoder_start_token_id": 0, "eos_token_id": 2},
    "GPT2": {**_IDS, "n_embd": 32, "n_layer": 1, "n_head": 4},
    "DistilBert": {**_IDS, "dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4},
}  # fmt: skip
CLASSES = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification", "QUESTION_ANS": "QuestionAnswering"}
HEADS = [
    ("Bert", "TOKEN_CLS", {"classifier"}),
    ("Bert", "QUESTION_ANS", {"qa_outputs"}),
    ("Llama", "QUESTION_ANS", {"qa_outputs"}),
    ("T5", "SEQ_CLS", {"classification_head"}),
    ("T5", "QUESTION_ANS", {"qa_outputs"}),
    ("GPT2", "TOKEN_CLS", {"classifier"}),
    ("DistilBert", "SEQ_CLS", {"classifier", "pre_classifier"}),
]


def make(family: str, task: str, seed: int) -> Any:
    labels = 2 if task == "QUESTION_ANS" else 3
    config = getattr(transformers, family + "Config")(**copy.deepcopy(CONFIGS[family]), num_labels=labels)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, f"{family}For{CLASSES[task]}")(config)


def outputs(model: nn.Module) -> torch.Tensor:
    ids = tokens()
    ids[:, -1] = 2
    with torch.no_grad():
        return model.eval()(input_ids=ids)[0]


@pytest.mark.parametrize(("family", "task", "heads"), HEADS)
@pytest.mark.filterwarnings("ignore:.*Conv1D.*")
def test_a_head_whose_task_is_not_given_is_warned_of(method: ModuleType, family: str, task: str, heads: set):
    """It is quantized as any layer."""
    says = r"`task_type` is None, so that the head of .*quantized as any layer.*`task_type='SEQ_CLS'`"
    with pytest.warns(UserWarning, match=says):
        get_peft_model(make(family, task, 0), method.config(group_size=-1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=says)
        for options in ({"task_type": task}, {"modules_to_save": sorted(heads)}):
            get_peft_model(make(family, task, 0), method.config(group_size=-1, **options))


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_a_task_that_the_model_does_not_have_is_refused_before_it_is_converted(method: ModuleType, task: str):
    """PEFT misses a method of the model, after all layers were converted."""
    base = make("Bert", "TOKEN_CLS", 0)
    expected = outputs(base)
    with pytest.raises(ValueError, match=rf"`task_type` is '{task}', but BertForTokenClassification generates no text"):
        get_peft_model(base, method.config(group_size=-1, task_type=task))
    assert torch.equal(outputs(base), expected)


@pytest.mark.parametrize(("family", "task", "heads"), HEADS)
@pytest.mark.filterwarnings("ignore:.*Conv1D.*")
def test_a_tasks_head_is_trained_in_float(method: ModuleType, family: str, task: str, heads: set, tmp_path: Path):
    base = make(family, task, 0)
    weights = {key: value.clone() for key, value in base.state_dict().items()}
    model = get_peft_model(base, method.config(group_size=-1, task_type=task, **method.MOVED))
    wrapped = [name for name, module in model.named_modules() if type(module).__name__ == "ModulesToSaveWrapper"]
    assert {name.removeprefix("base_model.model.") for name in wrapped} == heads
    for parameter in (p for name, p in model.named_parameters() if "modules_to_save" in name):
        assert parameter.requires_grad
        parameter.data += 0.05
    model.save_pretrained(tmp_path)

    other = make(family, task, 1)  # as from_pretrained gives it: the backbone's weights, and a head of its own
    own = {key: value for key, value in weights.items() if not any(head in key.split(".") for head in heads)}
    other.load_state_dict(own, strict=False)
    again = PeftModel.from_pretrained(other, tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    merged = model.merge_and_unload()
    assert torch.equal(outputs(merged), outputs(again))
    assert not any(type(merged.get_submodule(head)).__name__ == "QuantizedLinear" for head in heads)


NAMES = ["cold", "mild", "warm", "hot"]


def classifier(folder: Path, loader: Any = AutoModelForSequenceClassification, **options: Any) -> Any:
    """A classifier with four named classes, over the backbone in `folder`."""
    return loader.from_pretrained(folder, num_labels=4, id2label=dict(enumerate(NAMES)), **options)


@pytest.mark.parametrize(("family", "task", "packed"), [
    ("Llama", "SEQ_CLS", False),
    ("Roberta", "SEQ_CLS", False),
    ("Bert", "TOKEN_CLS", False),
    ("Llama", "SEQ_CLS", True),
])  # fmt: skip
def test_a_classifier_is_opened_with_its_classes(family: str, task: str, packed: bool, tmp_path: Path):
    """Where the base's file knows of none: also an adapter of before they were noted."""
    config = getattr(transformers, family + "Config")(**CONFIGS.get(family, _BERT))
    base = transformers.AutoModel.from_config(config)
    if packed:
        base = get_peft_model(base, LRQATConfig(group_size=-1, range_method="minmax")).merge_and_unload()
    base.save_pretrained(tmp_path / "base")
    kind = getattr(transformers, f"AutoModelFor{CLASSES[task]}")
    if packed:
        base = load_quantized(tmp_path / "base", model_class=kind, config=classifier(tmp_path / "base", AutoConfig))
    else:
        base = classifier(tmp_path / "base", kind)
    model = get_peft_model(base, LRQATConfig(group_size=-1, range_method="minmax", task_type=task))
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path / "adapter")
    again = load_adapter(tmp_path / "adapter")[0]
    assert torch.equal(outputs(again), outputs(model))
    assert again.config.id2label == dict(enumerate(NAMES))
    assert again.config.label2id == {name: i for i, name in enumerate(NAMES)}
    assert again.config.problem_type == "multi_label_classification"
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_head": None}))
    older = load_adapter(tmp_path / "adapter")[0]
    assert torch.equal(outputs(older), outputs(model))


@pytest.mark.parametrize("labels", [["", "x", "x"], [0, 1, 2]], ids=str)
def test_what_transformers_takes_as_names_of_classes_is_read_again(labels: list, tmp_path: Path):
    base = make("Llama", "SEQ_CLS", 0)
    base.config.id2label = dict(enumerate(labels))
    get_peft_model(base, LRQATConfig(group_size=-1, task_type="SEQ_CLS")).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("Llama", "SEQ_CLS", 0), tmp_path)
    assert loaded.config.id2label == dict(enumerate(labels))


@pytest.mark.parametrize(
    "head", [{"labels": ["a"], "problem_type": "choice"}, {"labels": [["a"]]}, {"labels": "ab"}], ids=str
)
def test_what_names_no_classes_is_refused(head: dict, tmp_path: Path):
    with pytest.raises(ValueError, match=r"`base_head` is .*list of names `labels`, and a `problem_type`"):
        LRQATConfig(base_head=head)


def test_classes_that_do_not_fit_the_head_are_refused(tmp_path: Path):
    make("Llama", "SEQ_CLS", 0).model.save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    get_peft_model(base, LRQATConfig(group_size=-1, task_type="SEQ_CLS")).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_head": {"labels": ["a", "b"]}}))
    with pytest.raises(ValueError, match=r"`base_head` in adapter_config\.json .* names 2 classes"):
        load_adapter(tmp_path / "adapter")


def test_a_model_with_another_number_of_classes_is_warned_of(tmp_path: Path):
    model = get_peft_model(make("Llama", "SEQ_CLS", 0), LRQATConfig(group_size=-1, task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    other = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**CONFIGS["Llama"]))
    other.model.load_state_dict(make("Llama", "SEQ_CLS", 0).model.state_dict())
    with pytest.warns(UserWarning, match="tells 3 classes apart.*`num_labels=3`"), pytest.raises(RuntimeError):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("save", [None, ["lm_head"]])
def test_models_without_classes_have_none(save: list[str] | None, tmp_path: Path):
    adapted(tiny(), modules_to_save=save).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_head"] is None


def test_weights_that_no_file_holds_are_warned_of(method: ModuleType, tmp_path: Path):
    model = method.random_adapter(tiny(num_hidden_layers=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "quiet")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    said = (
        r"3 weights outside of the adapter.*modules_to_save=\['input_layernorm', 'norm', 'post_attention_layernorm'\]"
    )
    with pytest.warns(UserWarning, match=said):
        model.save_pretrained(tmp_path / "lost")

    named = method.random_adapter(tiny(num_hidden_layers=1), modules_to_save=["norm", "embed_tokens", "lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named.save_pretrained(tmp_path / "named")


@pytest.mark.parametrize("of_default", [["lm_head"], None])
def test_what_one_adapter_trains_in_float_is_not_merged_with_the_integers_of_another(
    method: ModuleType, of_default: list[str] | None
):
    """PEFT takes the modules of the active adapter, whichever is merged."""
    model = method.random_adapter(tiny(num_hidden_layers=1), modules_to_save=of_default)
    model.add_adapter("other", method.other(modules_to_save=["lm_head"]))
    model.set_adapter("other")
    train(model, tokens())
    expected = logits(model, tokens())
    model.set_adapter("default")
    active = logits(model, tokens())
    said = (
        rf"\['other'\] are to be merged, but .*lm_head'.* that of '{'default' if of_default else 'the base'}', which is"
    )
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=said):
            merge(adapter_names=["other"])
    assert torch.equal(logits(model, tokens()), active)
    model.set_adapter("other")
    assert torch.equal(logits(model.merge_and_unload(adapter_names=["other"]), tokens()), expected)


def test_layers_that_others_have_put_on_the_grid_are_warned_of(method: ModuleType, tmp_path: Path):
    model = method.two_adapters(tiny())
    model.set_adapter("other")
    expected = logits(model, tokens())
    with pytest.warns(UserWarning, match=r"Adapter 'other' has 4 layers; 10 more are rounded in this model") as said:
        model.save_pretrained(tmp_path)
    assert not any("Adapter 'default' has" in str(one.message) for one in said)
    alone = PeftModel.from_pretrained(tiny(), tmp_path / "other").eval()
    assert not torch.equal(logits(alone, tokens()), expected)
    beside = PeftModel.from_pretrained(tiny(), tmp_path)
    beside.load_adapter(tmp_path / "other", "other")
    beside.set_adapter("other")
    assert torch.equal(logits(beside.eval(), tokens()), expected)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Adapter 'default'")
        alone.save_pretrained(tmp_path / "again")


def test_a_model_that_is_saved_with_adapters_inside_is_warned_of(method: ModuleType, tmp_path: Path):
    """transformers would read random weights back."""
    model = method.random_adapter(tiny(num_hidden_layers=1))
    said = r"LlamaForCausalLM has adapters inside.*\('model\.layers\.0\.self_attn\.q_proj\.base_layer\.\.\.'\)"
    with pytest.warns(UserWarning, match=said):
        model.get_base_model().save_pretrained(tmp_path / "inside")
    with pytest.warns(UserWarning, match=said):  # as a Trainer hands it over
        model.get_base_model().save_pretrained(tmp_path / "inside", state_dict=model.get_base_model().state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "This Llama")
        model.save_pretrained(tmp_path / "adapter")
        plain = tiny(num_hidden_layers=1)
        model.get_base_model().save_pretrained(tmp_path / "plain", state_dict=plain.state_dict())
        managed = tiny(num_hidden_layers=1)
        managed.add_adapter(method.config())
        managed.save_pretrained(tmp_path / "managed")  # transformers saves the adapter
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert (tmp_path / "managed" / "adapter_config.json").exists()


def test_what_stays_behind_of_tied_embeddings_is_warned_of(method: ModuleType):
    with pytest.warns(
        UserWarning, match=r"names 'model\.embed_tokens', to which 'lm_head' is tied.*keeps its weight, frozen"
    ):
        model = method.random_adapter(tiny(num_hidden_layers=1, tie=True), modules_to_save=["embed_tokens"])
    assert not model.get_output_embeddings().weight.requires_grad
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is tied")
        model = method.random_adapter(tiny(num_hidden_layers=1), modules_to_save=["embed_tokens", "lm_head"])
        method.random_adapter(tiny(num_hidden_layers=1, tie=True), modules_to_save=["norm"])
    assert model.get_output_embeddings().weight.requires_grad


def test_embeddings_that_stay_tied_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is tied")
        model = adapted(tiny(num_hidden_layers=1, tie=True), modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

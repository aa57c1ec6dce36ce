"""An adapter's README.md as PEFT's `save_pretrained` leaves it: it loads the adapter, and keeps what others wrote."""

import re

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from peft_lrqat import LRQATConfig, load_quantized
from peft_lrqat.checkpoint.adapter_card import AdapterFacts, adapter_card
from tests.models import adapted, logits, low_bit, tiny, tokens, train

MAKE = {"lrqat": adapted, "lowbit_sr": low_bit}
FACTS = AdapterFacts("LR-QAT", "LRQAT", 4, "4 bits", "someone/tiny", "CAUSAL_LM", False, "a recipe")


def card(folder) -> ModelCard:
    return ModelCard((folder / "README.md").read_text(encoding="utf-8"))


def loaded(text: str, **places: str):
    """What the first piece of code of a card, or of a part of it, makes."""
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    for said, place in places.items():
        code = code.replace(f'"{said}"', f'"{place}"')
    names: dict = {}
    exec(code.replace("merged = ", "# "), names)
    return names["model"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny-base"
    tiny().save_pretrained(folder)
    return folder


def from_folder(base):
    model = tiny()
    model.name_or_path = str(base)
    return model


@pytest.mark.parametrize("method", MAKE)
def test_the_card_begins_with_what_loads_the_adapter(method, base, tmp_path):
    model = MAKE[method](from_folder(base), bits=4)
    train(model, tokens())
    model.save_pretrained(tmp_path)
    found = card(tmp_path)
    tags = {"lrqat": "lr-qat", "lowbit_sr": "low-bit-sr"}
    assert {tags[method], "qat", "4-bit"} <= set(found.data.tags)
    assert re.search(r"\[arXiv (\d{4}\.\d{5})\]\(https://arxiv\.org/abs/\1\)", found.text)
    assert (found.data.library_name, found.data.pipeline_tag) == ("peft", "text-generation")
    again = loaded(found.text, **{"path/or/repo": str(tmp_path)})
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    # PEFT's template, and folders of this machine
    assert "More Information Needed" not in found.content
    assert str(base.parent) not in found.content
    assert "tiny-base: a 4-bit" in found.text


def test_the_card_of_a_classifier_names_its_number_of_classes(base, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=4, dtype="bfloat16")
    model = adapted(model, task_type="SEQ_CLS")
    model.save_pretrained(tmp_path)
    found = card(tmp_path)
    assert found.data.pipeline_tag == "text-classification"
    again = loaded(found.text, **{"path/or/repo": str(tmp_path)})
    assert again.dtype is torch.bfloat16
    assert torch.equal(logits(again, tokens(batch=1)), logits(model, tokens(batch=1)))


def test_an_adapter_of_the_hub_names_its_base(tmp_path):
    model = tiny()
    model.name_or_path = model.config._name_or_path = "someone/tiny-model"
    adapted(model, bits=3).save_pretrained(tmp_path)
    found = card(tmp_path)
    assert (found.data.base_model, found.data.base_model_relation) == ("someone/tiny-model", "adapter")
    assert "base_model:adapter:someone/tiny-model" in found.data.tags
    assert "3-bit" in found.data.tags


def test_the_card_of_a_quantized_base_loads_it(tmp_path):
    adapted(tiny(), group_size=8).merge_and_unload().save_pretrained(tmp_path / "packed")
    model = adapted(load_quantized(tmp_path / "packed"), group_size=8)
    train(model, tokens())
    model.save_pretrained(tmp_path / "adapter")
    places = {"path/or/repo": tmp_path / "adapter", "packed": tmp_path / "packed"}
    again = loaded(card(tmp_path / "adapter").text, **{said: str(place) for said, place in places.items()})
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_other_adapters_are_said_in_the_same_card(base, tmp_path):
    model = adapted(from_folder(base))
    model.add_adapter("sql", LRQATConfig(r=2, group_size=-1, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    text = card(tmp_path).text
    first, further = text.split("The folder `sql` holds another adapter")
    assert not (tmp_path / "sql" / "README.md").exists()
    again = loaded(further, **{"path/or/repo": str(tmp_path), "tiny-base": str(base)})
    assert again.peft_config["default"].r == 2
    assert isinstance(loaded(first, **{"path/or/repo": str(tmp_path)}), PeftModel)


def test_the_only_adapter_in_a_folder_of_its_own_has_the_whole_card(base, tmp_path):
    config = LRQATConfig(r=2, group_size=-1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    PeftModel(from_folder(base), config, adapter_name="sql").save_pretrained(tmp_path)
    text = card(tmp_path).text
    assert "| grid | 4 bits" in text
    again = loaded(text, **{"path/or/repo": str(tmp_path), "tiny-base": str(base)})
    assert again.peft_config["default"].r == 2


def test_the_readme_above_an_adapters_folder_is_nobodys_business(tmp_path):
    (tmp_path / "README.md").write_text("# My repository")
    model = tiny()
    model.add_adapter(LRQATConfig(r=2, group_size=-1, target_modules=["q_proj"]), adapter_name="sql")
    model.save_pretrained(tmp_path / "sql")  # transformers', which writes no card
    assert (tmp_path / "README.md").read_text() == "# My repository"
    assert "import peft_lrqat" in card(tmp_path / "sql").text


def test_a_users_own_words_stay(tmp_path):
    own = "---\nlicense: mit\n---\n\n# My adapter\n\nIt writes poems.\n\n## Limits\n\nNone known.\n"
    (tmp_path / "README.md").write_text(own)
    model = adapted(tiny())
    model.save_pretrained(tmp_path)
    once = (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == once
    title, code, words = (once.index(part) for part in ("# My adapter", "import peft_lrqat", "It writes poems."))
    assert title < code < words
    assert "None known." in once
    assert card(tmp_path).data.license == "mit"


def test_a_template_that_somebody_has_filled_in_is_theirs():
    template = ModelCard.from_template(ModelCardData()).content
    assert "Developed by" not in adapter_card(template, FACTS)
    assert "me, myself" in adapter_card(template.replace("[More Information Needed]", "me, myself", 1), FACTS)


def test_a_comment_in_code_is_no_title():
    text = adapter_card("Some words.\n\n```python\n# a comment\n```\n", FACTS)
    assert text.index("# tiny: a 4-bit LR-QAT adapter") < text.index("import peft_lrqat") < text.index("# a comment")

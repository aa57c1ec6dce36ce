"""push_to_hub of a merged model: everything but the connection is transformers' own code."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers.utils.hub as hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import LlamaForSequenceClassification

from tests.models import adapted, tiny


@pytest.fixture
def uploads(monkeypatch):
    """What would be uploaded: file name -> bytes."""
    sent: dict[str, bytes] = {}

    def upload(self, working_dir, repo_id, *args, **kwargs):
        sent.update({path.name: path.read_bytes() for path in Path(working_dir).iterdir()})

    def missing(*args, **kwargs):
        raise EntryNotFoundError("no card yet")

    api = SimpleNamespace(create_repo=lambda repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hub, "hf_api", lambda: api)
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    monkeypatch.setattr(ModelCard, "load", missing)
    return sent


def test_what_is_pushed_is_quantized_and_described(uploads):
    merged = adapted(tiny("llama"), bits=4, group_size=16).merge_and_unload()
    merged.push_to_hub("me/model-w4", tags=["mine"])
    assert json.loads(uploads["config.json"])["quantization_config"]["quant_method"] == "compressed-tensors"
    assert b"weight_packed" in uploads["model.safetensors"]
    card = uploads["README.md"].decode()
    assert "4 bits, symmetric, groups of 16" in card
    assert "LR-QAT ([arXiv 2406.06385](https://arxiv.org/abs/2406.06385)): rank" in card
    assert {"mine", "lr-qat", "compressed-tensors"} <= set(ModelCard(card).data.tags)


def test_a_card_that_the_repository_has_is_kept(uploads, monkeypatch):
    own = ModelCard("---\ntags:\n- mine\n---\n# My own words")
    monkeypatch.setattr(ModelCard, "load", lambda *args, **kwargs: own)
    adapted(tiny("llama"), bits=4, group_size=16).merge_and_unload().push_to_hub("me/model-w4")
    assert "# My own words" in uploads["README.md"].decode()


def test_a_card_of_a_model_that_was_there_is_replaced_and_a_users_is_not(tmp_path: Path):
    card = tmp_path / "README.md"
    adapted(tiny("llama"), bits=4, group_size=16).merge_and_unload().save_pretrained(tmp_path)
    adapted(tiny("llama"), bits=3, group_size=8).merge_and_unload().save_pretrained(tmp_path)
    assert "3 bits, symmetric, groups of 8" in card.read_text()
    card.write_text("My own words")
    adapted(tiny("llama"), bits=4, group_size=16).merge_and_unload().save_pretrained(tmp_path)
    assert card.read_text() == "My own words"


def test_a_classifier_is_loaded_by_its_own_class(tmp_path: Path):
    model = LlamaForSequenceClassification(tiny("llama").config)
    adapted(model, bits=4, group_size=16, task_type="SEQ_CLS").merge_and_unload().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    found: dict = {}
    exec(snippet.replace("path/or/repo", str(tmp_path)), found)
    assert isinstance(found["model"], LlamaForSequenceClassification)
    assert "pipeline_tag: text-classification" in card
    assert "compressed-tensors>=0.18" in snippet
    assert "vllm" not in card

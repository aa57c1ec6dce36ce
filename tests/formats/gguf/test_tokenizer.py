"""llama.cpp splits text into the tokens that transformers does."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_lrqat import export
from peft_lrqat.formats.gguf.reader import GGUFFile
from peft_lrqat.formats.gguf.tokenizer import PRE_TOKENIZERS, UnsupportedTokenizer
from tests.ggml import Llama
from tests.models import adapted, tiny
from tests.tokenizers import CHAT_TEMPLATE, HARD, TEXT, VOCAB, bytewise, sentencepiece

KINDS = {name: lambda name=name: bytewise(name) for name in PRE_TOKENIZERS.values()} | {
    "sentencepiece": lambda: sentencepiece(prefix=False),
    "sentencepiece with a first space": lambda: sentencepiece(prefix=True),
}


def written(tokenizer, folder, vocab_size=VOCAB, **options):
    model = adapted(
        tiny("llama", vocab_size=vocab_size, num_hidden_layers=1), bits=4, group_size=-1, target_modules=["q_proj"]
    )
    export(model, folder, format="gguf", tokenizer=tokenizer, progress=False, **options)
    return next(folder.glob("*.gguf"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_becomes_the_same_tokens(kind, tmp_path):
    tokenizer = KINDS[kind]()
    with Llama(written(tokenizer, tmp_path / "out")) as llama:
        for text in HARD + TEXT[:60]:
            assert llama.tokenize(text) == tokenizer(text)["input_ids"], text
        ids = tokenizer("Hello naïve 日本 world")["input_ids"]
        assert llama.pieces(ids).strip() == "Hello naïve 日本 world"


def test_special_tokens_and_chat_template_are_in_the_file(tmp_path):
    tokenizer = bytewise("qwen2")
    metadata = GGUFFile(written(tokenizer, tmp_path / "out")).metadata
    assert metadata["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert metadata["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert metadata["tokenizer.ggml.unknown_token_id"] == tokenizer.unk_token_id
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert len(metadata["tokenizer.ggml.tokens"]) == VOCAB  # rows without a token are filled up


def test_a_pre_tokenizer_that_is_not_known_is_refused_or_named_by_the_user(tmp_path):
    tokenizer = bytewise("qwen2")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+|\S+"
    changed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), bos_token="<s>", eos_token="</s>"
    )
    with pytest.raises(UnsupportedTokenizer, match="tokenizer_pre"):
        written(changed, tmp_path / "out")
    assert not any(tmp_path.iterdir())
    path = written(changed, tmp_path / "out", tokenizer_pre="gpt-2")
    assert GGUFFile(path).metadata["tokenizer.ggml.pre"] == "gpt-2"


def test_other_kinds_of_tokenizers_are_refused(tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UnsupportedTokenizer, match="WordLevel"):
        written(PreTrainedTokenizerFast(tokenizer_object=backend), tmp_path / "out")


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    with pytest.raises(UnsupportedTokenizer, match="resize_token_embeddings"):
        written(bytewise("gpt-2"), tmp_path / "out", vocab_size=64)

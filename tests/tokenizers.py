"""Small tokenizers of the kinds that the supported architectures have, trained on a little text."""

from __future__ import annotations

import json
from pydoc_data.topics import topics

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from peft_lrqat.formats.gguf.tokenizer import PRE_TOKENIZERS

SPECIAL = ["<unk>", "<s>", "</s>"]
VOCAB = 640
TEXT = [text for name in ("strings", "numbers", "lists", "compound") for text in topics[name].splitlines()]
CHAT_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"

#: Text that tells tokenizers apart.
HARD = [
    "Hello world", "", " two  spaces   and\ttabs\n\n\nlines \n  indented", "1 22 333 4444 55555.6 7,8",
    "I've we'LL don't 'tis", "naïve café déjà-vu Ångström", "日本語 текст עברית 🙂🙃", "camelCase HTTPServer xY Zz",
    "a</s>b <s>c", "a<tool>b", "x=[1,2];y(){}//..!!??", "\u00a0nbsp\u2009thin",
]  # fmt: skip


def bytewise(name: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE that cuts text as llama.cpp's pre-tokenizer `name` does."""
    ((cut, whole_words),) = (key for key, value in PRE_TOKENIZERS.items() if value == name)
    steps: list = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.endswith("ByteLevel"))]
    if cut.startswith("Digits"):
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif cut != "ByteLevel":
        steps.insert(0, pre_tokenizers.Split(Regex(cut), "isolated"))
    backend = Tokenizer(models.BPE(ignore_merges=whole_words))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    return _finish(backend, adds_bos=whole_words)


def sentencepiece(prefix: bool) -> PreTrainedTokenizerFast:
    """A BPE with visible spaces and byte fallback, as Llama 2, Mistral (with `prefix`) and Gemma (without) have."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if prefix else spaces)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *([decoders.Strip(" ", 1)] * prefix)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 8, special_tokens=[*SPECIAL, *bytes_], show_progress=False)
    space = "" if prefix else " "
    backend.train_from_iterator((space + word for line in TEXT for word in line.split(" ")), trainer)
    described = json.loads(backend.to_str())
    described["added_tokens"] = described["added_tokens"][: len(SPECIAL)]  # the bytes are ordinary tokens
    return _finish(Tokenizer.from_str(json.dumps(described)), adds_bos=True)


def _finish(backend: Tokenizer, adds_bos: bool) -> PreTrainedTokenizerFast:
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer

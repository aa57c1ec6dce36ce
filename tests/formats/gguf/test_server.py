"""A file in llama.cpp's own server: generation and chat."""

from __future__ import annotations

import json

import pytest

from peft_lrqat import export
from tests.models import adapted, tiny
from tests.tokenizers import VOCAB, bytewise, sentencepiece

xllamacpp = pytest.importorskip("xllamacpp")


def answer(reply):
    return reply if isinstance(reply, dict) else json.loads(reply)


@pytest.mark.parametrize(
    "make", [lambda: bytewise("llama-bpe"), lambda: sentencepiece(prefix=False)], ids=["bpe", "spm"]
)
def test_the_server_completes_and_applies_the_chat_template(make, tmp_path):
    tokenizer = make()
    model = adapted(
        tiny("llama", vocab_size=VOCAB), bits=4, group_size=32, range_method="minmax", target_modules=["q_proj"]
    )
    export(model, tmp_path / "out", format="gguf", tokenizer=tokenizer, progress=False)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(next((tmp_path / "out").glob("*.gguf")))
    parameters.n_ctx, parameters.warmup = 64, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(parameters)

    done = answer(server.handle_completions({"prompt": "Hello", "max_tokens": 5, "temperature": 0, "ignore_eos": True}))
    assert done["usage"]["prompt_tokens"] == len(tokenizer("Hello")["input_ids"])
    assert done["usage"]["completion_tokens"] == 5

    messages = [{"role": "user", "content": "one two"}]
    said = answer(server.handle_chat_completions({"messages": messages, "max_tokens": 3, "ignore_eos": True}))
    prompt = tokenizer.apply_chat_template(messages, tokenize=False)
    assert prompt == "[user] one two</s>"
    assert said["usage"]["prompt_tokens"] == len(tokenizer(prompt)["input_ids"])

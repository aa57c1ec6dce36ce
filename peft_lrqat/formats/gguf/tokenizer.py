"""A tokenizer of transformers as llama.cpp's metadata.

llama.cpp has its own implementation of each kind of tokenizer. Two kinds matter for the supported architectures:

* "gpt2": byte-level BPE with a list of merges. How text is cut into words first is chosen by a *name*, for which
  llama.cpp has the code. It is found by what the tokenizer does (its pre-tokenizer), so that a tokenizer with added
  tokens, or a new one of a known kind, is recognised.
* "llama": SentencePiece's BPE, in which the token with the highest score is merged first. transformers keeps the merges
  in that order, so minus a token's place among them serves as its score.
"""

from __future__ import annotations

import json
from typing import Any

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: (what cuts text into words, whether whole words in the vocabulary skip the merges) -> llama.cpp's name.
PRE_TOKENIZERS: dict[tuple[str, bool], str] = {
    ("ByteLevel", False): "gpt-2",
    ("Digits ByteLevel", False): "smollm",
    (_CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
    (_CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST, False): "smaug-bpe",
    (_CONTRACTIONS + _WORDS + r"\p{N}" + _REST, False): "qwen2",
    (_TEKKEN, True): "tekken",
}

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "\u2581"  # SentencePiece's visible space


class UnsupportedTokenizer(ValueError):
    """llama.cpp would split text differently; the message says what was found."""


def write_tokenizer(writer: Any, tokenizer: Any, vocab_size: int, eos: list[int], pre: str | None = None) -> list[str]:
    """Put a tokenizer into a `gguf.GGUFWriter`.

    Args:
        tokenizer: a fast tokenizer of transformers.
        vocab_size: rows of the model's embedding; rows without a token get an unused one.
        eos: the tokens at which generation stops, from the generation configuration.
        pre: llama.cpp's name of the pre-tokenizer, where it is not recognised.

    Returns:
        Where llama.cpp splits text otherwise, in words for the user.

    Raises:
        UnsupportedTokenizer: it is of no known kind, or has more tokens than the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedTokenizer(
            f"a {type(tokenizer).__name__} has no fast version; load the tokenizer with AutoTokenizer"
        )
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise UnsupportedTokenizer(f"the tokenizer is of type {model['type']}; BPE tokenizers can be written")
    bytewise = any(step["type"] == "ByteLevel" for step in _steps(described["pre_tokenizer"]))
    tokens, kinds = _vocabulary(tokenizer, model, described["added_tokens"], vocab_size)
    notes = []
    merges = [tuple(pair) if not isinstance(pair, str) else tuple(pair.split(" ", 1)) for pair in model["merges"]]
    if bytewise:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or pre_tokenizer(described))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    elif model["byte_fallback"]:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, kinds, merges))
        writer.add_add_space_prefix(_adds_space(tokenizer, "x"))
        notes = _notes(tokenizer)
        tokens = [
            text.replace(_SPACE, " ") if kind == _USER_DEFINED else text
            for text, kind in zip(tokens, kinds, strict=True)
        ]
    else:
        raise UnsupportedTokenizer("the tokenizer is a BPE without bytes: neither byte-level nor with byte fallback")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    _write_special(writer, tokenizer, eos)
    return notes


def pre_tokenizer(described: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level BPE (its tokenizer.json) cuts text into words.

    Raises:
        UnsupportedTokenizer: llama.cpp has no name for it, or none that is known here.
    """
    parts = []
    for step in _steps(described["pre_tokenizer"]):
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            parts.append(step["pattern"].get("Regex", ""))
        elif step["type"] == "Digits" and step["individual_digits"]:
            parts.append("Digits")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            parts += ["ByteLevel"] if step["use_regex"] else []
        else:
            parts.append(json.dumps(step))
    found = " ".join(parts)
    name = PRE_TOKENIZERS.get((found, bool(described["model"].get("ignore_merges"))))
    if name is None:
        raise UnsupportedTokenizer(
            f"the tokenizer cuts text by {found!r} (ignore_merges={described['model'].get('ignore_merges')}), which is "
            f"none of those known here ({', '.join(PRE_TOKENIZERS.values())}). If llama.cpp has a name for it, give it "
            "as `tokenizer_pre`"
        )
    return name


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [s for part in step["pretokenizers"] for s in _steps(part)] if step["type"] == "Sequence" else [step]


def _vocabulary(
    tokenizer: Any, model: dict[str, Any], added: list[dict[str, Any]], vocab_size: int
) -> tuple[list[str], list[int]]:
    """Texts and kinds of all tokens, in order."""
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    if max(texts) >= vocab_size:
        raise UnsupportedTokenizer(
            f"the tokenizer has tokens up to {max(texts)}, but the model's embedding has {vocab_size} rows: it belongs "
            "to another model, or tokens were added without resize_token_embeddings"
        )
    kinds = dict.fromkeys(texts, _NORMAL)
    for token in added:
        kinds[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
        texts[token["id"]] = token["content"]
    if model["byte_fallback"]:
        kinds |= {i: _BYTE for i, text in texts.items() if len(text) == 6 and text.startswith("<0x")}
    if model["byte_fallback"] and tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = _UNKNOWN
    every = range(vocab_size)
    return [texts.get(i, f"[PAD{i}]") for i in every], [kinds.get(i, _UNUSED) for i in every]


def _scores(tokens: list[str], kinds: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """Minus a token's place among the merges; behind all of them for tokens that no merge makes."""
    place: dict[str, int] = {}
    for i, pair in enumerate(merges):
        place.setdefault("".join(pair), i)
    last = len(merges)
    return [
        0.0 if kind in (_BYTE, _CONTROL, _UNKNOWN) else -float(place.get(text, last))
        for text, kind in zip(tokens, kinds, strict=True)
    ]


def _adds_space(tokenizer: Any, text: str) -> bool:
    """Whether the letter in `text`, which may follow a special token, gets a space that was not there."""
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
    return next(piece for piece in pieces if piece not in tokenizer.all_special_tokens).startswith(_SPACE)


def _notes(tokenizer: Any) -> list[str]:
    if not _adds_space(tokenizer, "x"):
        return []
    plain, spaced = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("x", " x"))
    where = ["that begin with a space"] if plain == spaced else []
    if tokenizer.bos_token and not _adds_space(tokenizer, tokenizer.bos_token + "x"):
        where.append("that follow a special token")
    if not where:
        return []
    return [
        f"The tokenizer puts a space before a text, but not before texts {' or '.join(where)}; llama.cpp does so "
        "always, and splits those a little differently."
    ]


def _write_special(writer: Any, tokenizer: Any, eos: list[int]) -> None:
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    if others := [index for index in eos if index != tokenizer.eos_token_id]:
        writer.add_eot_token_id(others[0])
    plain, full = (tokenizer("x", add_special_tokens=special)["input_ids"] for special in (False, True))
    before, after = _around(full, plain)
    for what, ids, known, write in (
        ("before", before, tokenizer.bos_token_id, writer.add_add_bos_token),
        ("after", after, tokenizer.eos_token_id, writer.add_add_eos_token),
    ):
        if ids not in ([], [known]):
            raise UnsupportedTokenizer(f"the tokenizer puts the tokens {ids} {what} a text; llama.cpp one bos, one eos")
        write(bool(ids))
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _around(full: list[int], plain: list[int]) -> tuple[list[int], list[int]]:
    """What stands before and after `plain` in `full`."""
    start = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    return full[:start], full[start + len(plain) :]

"""The tokenizer in a GGUF file's metadata ⇄ a tokenizer.json."""

import json
from collections.abc import Callable
from typing import Any

from gptjax.errors import UserError
from gptjax.exchange.gguf_file import GgufFile
from gptjax.exchange.hf_tokenizer import library_content
from gptjax.exchange.tokenizer_files import TokenizerFiles, content_text
from gptjax.text.tokenizers.base import Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types of llama.cpp
HF_JSON = "tokenizer.huggingface.json"
SPACE = "\u2581"

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_TAIL_SLASH = _TAIL.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_TEKKEN = "|".join((*_WORDS, r"\p{N}", _TAIL_SLASH))
_GPT4O = "|".join((*(f"{word}{_CONTRACTIONS}?" for word in _WORDS), r"\p{N}{1,3}", _TAIL_SLASH))
# The pre-tokenization pattern of gptjax's own encodings; it splits text like Llama 3's pattern.
_OWN = r"'(?i:[sdmt]|ll|ve|re)" + _LLAMA3.removeprefix(_CONTRACTIONS)


def _byte_level(use_regex: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> dict:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}


_DIGITS = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(True)],
}
PRE_TOKENIZERS = {
    **dict.fromkeys(("gpt-2", "olmo", "mpt", "jais", "phi-2"), _byte_level(True)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe", "falcon3"), _split(_LLAMA3)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), _split(_QWEN2)),
    **dict.fromkeys(("gpt-4o", "llama4"), _split(_GPT4O)),
    "tekken": _split(_TEKKEN),
}
"""Pre-tokenization by `tokenizer.ggml.pre`. Exports write the first name of each."""
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")
"""Values for which a word that is a token becomes that token even if merges do not produce it."""


def gguf_tokenizer_files(file: GgufFile, notify: Callable[[str], None]) -> TokenizerFiles:
    """The tokenizer of a file.

    If the file contains a complete tokenizer.json, that is used; otherwise one is built from the list of tokens.

    Raises:
        UserError: The metadata is damaged.
    """
    key = {name.removeprefix("tokenizer.ggml."): value for name, value in file.metadata.items()}
    tokens = key.get("tokens") or []
    ends = tuple(dict.fromkeys(key[name] for name in ("eos_token_id", "eot_token_id") if name in key))
    settings = {
        name: tokens[key[f"{name}_id"]]
        for name in ("bos_token", "eos_token")
        if key.get(f"{name}_id", len(tokens)) < len(tokens)
    }
    settings["chat_template"] = file.metadata.get("tokenizer.chat_template", "")
    try:
        content = _content(file, key, tokens, notify)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file.where}: no valid tokenizer: {type(error).__name__}: {error}") from None
    return TokenizerFiles(where=file.where, content=content, settings=settings, end_ids=ends)


def write_tokenizer(
    gguf: Any, writer: Any, tokenizer: Tokenizer, vocab_size: int, where: str, notify: Callable[[str], None]
) -> None:
    """Writes a tokenizer's keys; `notify` receives a line if llama.cpp does not support its pre-tokenization."""
    content = library_content(tokenizer)
    if content is None:
        notify(f"{where}: exported without a tokenizer: kind {tokenizer.kind} has no form in GGUF")
        return
    writer.add_string(HF_JSON, content_text(content))
    if (end := tokenizer.end_of_text) is not None:
        writer.add_eos_token_id(end)
        writer.add_bos_token_id(end)
    writer.add_add_bos_token(False)
    pre = next((name for name, steps in PRE_TOKENIZERS.items() if _cuts_like(content, steps)), None)
    if pre is None:
        notify(
            f"{where}: llama.cpp has no name for the way that this tokenizer cuts text; it is kept as {HF_JSON} only"
        )
        return
    special = {token["content"]: token["special"] for token in content["added_tokens"]}
    name_of = {i: name for name, i in content["model"]["vocab"].items()}
    name_of |= {token["id"]: token["content"] for token in content["added_tokens"]}
    names = [name_of.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    kinds = {True: CONTROL, False: USER_DEFINED, None: NORMAL}
    types = [kinds[special.get(name)] if i in name_of else UNUSED for i, name in enumerate(names)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(names)
    writer.add_token_types(types)
    merges = content["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])


def _content(file: GgufFile, key: dict, tokens: list[str], notify: Callable[[str], None]) -> dict | None:
    if HF_JSON in file.metadata:
        return json.loads(file.metadata[HF_JSON])
    if not tokens:
        return None
    model, pre = key.get("model"), key.get("pre", "default")
    if model not in ("gpt2", "llama"):
        notify(f"{file.where}: tokenizer.ggml.model={model!r} is not read; must be gpt2 or llama")
        return None
    if model == "gpt2" and pre not in PRE_TOKENIZERS:
        notify(f"{file.where}: tokenizer.ggml.pre={pre!r} is not known; known: {', '.join(PRE_TOKENIZERS)}")
        return None
    types = key.get("token_type") or [NORMAL] * len(tokens)
    added = [
        _added_token(i, tokens[i], kind == CONTROL) for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    if model == "llama":
        return {"version": "1.0", "added_tokens": added} | _pieces(key, vocab)
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "decoder": _byte_level(True),
        "model": {
            "type": "BPE",
            "ignore_merges": pre in WHOLE_WORDS,
            "vocab": vocab,
            "merges": [pair.split(" ", 1) for pair in key.get("merges", [])],
        },
    }


def _pieces(key: dict, vocab: dict[str, int]) -> dict:
    """A SentencePiece BPE tokenizer: merges are the splits of each piece into two pieces, ordered by the piece's score.

    Source: the converter of transformers, which builds the same list of merges.
    """
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = [{"type": "Prepend", "prepend": SPACE}] if key.get("add_space_prefix", True) else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "fuse_unk": True,
            "vocab": vocab,
            "merges": _merges(vocab, key["scores"]),
        },
    }


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    found = []
    for piece, i in vocab.items():
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        pairs = [pair for pair in cuts if pair[0] in vocab and pair[1] in vocab]
        pairs.sort(key=lambda pair: (scores[vocab[pair[0]]], scores[vocab[pair[1]]]), reverse=True)
        found += [(scores[i], pair) for pair in pairs]
    found.sort(key=lambda entry: entry[0], reverse=True)
    return [pair for _, pair in found]


def _added_token(i: int, content: str, special: bool) -> dict:
    how = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, "special": special, **how}


def _cuts_like(content: dict, steps: dict) -> bool:
    if content.get("normalizer") not in (None, {"type": "NFC"}):
        return False
    if content["model"].get("byte_fallback") or content.get("pre_tokenizer") is None:
        return False
    found = json.loads(json.dumps(content["pre_tokenizer"]))
    known = [step for step in found.get("pretokenizers", []) if step["type"] == "Split"]
    if known and known[0]["pattern"].get("Regex") == _OWN:
        known[0]["pattern"]["Regex"] = _LLAMA3
    return _without_offsets(found) == _without_offsets(steps)


def _without_offsets(steps: dict) -> dict:
    """The steps without settings that only affect token offsets."""
    inner = [_without_offsets(step) for step in steps.get("pretokenizers", [])]
    rest = {name: value for name, value in steps.items() if name not in ("trim_offsets", "pretokenizers")}
    return rest | ({"pretokenizers": inner} if inner else {})

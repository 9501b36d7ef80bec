"""Converts tokenizers between the files of a Hugging Face model folder and gptjax."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptjax.errors import UserError
from gptjax.exchange.byte_pairs import (
    GPT2_PATTERN,
    BytePairs,
    NotConvertible,
    library_tokenizer,
    make_pairs,
    read_pairs,
    recover_merges,
)
from gptjax.exchange.hf_files import write_json
from gptjax.exchange.mixed_texts import mixed_texts
from gptjax.exchange.tokenizer_files import TokenizerFiles, content_text, token_text
from gptjax.text.tokenizers.base import END_OF_TEXT, Tokenizer
from gptjax.text.tokenizers.byte_pair import BytePairTokenizer, bpe_tokenizer_from_ranks
from gptjax.text.tokenizers.library import LibraryTokenizer
from gptjax.text.tokenizers.plain import ByteTokenizer

# Fingerprint of tiktoken's gpt2: an imported gpt2 is the same tokenizer, so data prepared with either fits.
GPT2_FINGERPRINT = "592fc644bd6e35ef7aed2208176abe31b3da11abac1159c05bbc6e4e7c1da936"
_SHOWN = 5  # names in a message


def import_tokenizer(files: TokenizerFiles, vocab_size: int, notify: Callable[[str], None]) -> Tokenizer | None:
    """Converts the tokenizer of another program's model. Returns None, and calls `notify`, if that is not exact.

    The result is compared with the tokenizers library on a few thousand mixed texts. The end token is the one in the
    model's config.

    Args:
        files: The model's tokenizer files.
        vocab_size: Vocabulary size of the model; ids that the tokenizer does not have become reserved tokens.
        notify: Receives a line if the tokenizer is left out, and one for each of its properties that is lost.

    Raises:
        UserError: A file is damaged.
    """
    try:
        pairs, theirs = _read(files)
        _check_order(pairs)
        end_token = _find_end_token(files, pairs, notify)
        tokenizer = _from_pairs(pairs, vocab_size, end_token)
        if example := _first_difference(tokenizer, theirs, pairs):
            raise NotConvertible(f"tiktoken would encode some text to other ids, such as {example!r}")
    except NotConvertible as reason:
        return _through_library(files, vocab_size, str(reason), notify)
    _report_added(files.where, theirs, notify)
    return tokenizer


def _through_library(
    files: TokenizerFiles, vocab_size: int, reason: str, notify: Callable[[str], None]
) -> LibraryTokenizer | None:
    """A tokenizer that runs tokenizer.json with the tokenizers library, if it works on bytes; otherwise returns None
    and calls `notify`.
    """
    if files.content is None or not _works_on_bytes(files.content):
        notify(f"{files.where}: imported without a tokenizer: {reason}")
        return None
    library = _library(files)
    special = {token.content: i for i, token in library.get_added_tokens_decoder().items() if token.special}
    size = 1 + max(library.get_vocab().values())
    if size > vocab_size:
        notify(f"{files.where}: imported without a tokenizer: it has {size:,} tokens, the model {vocab_size:,}")
        return None
    tokenizer = LibraryTokenizer(library.to_str(), vocab_size, END_OF_TEXT)
    sample = "It's 12 o'clock.\n  Two  spaces\tand a tab "
    space = " " if files.content["model"].get("byte_fallback") else ""  # SentencePiece puts one before a text
    if tokenizer.decode(tokenizer.encode(sample)).removeprefix(space) != sample:
        notify(f"{files.where}: imported without a tokenizer: {reason}, and it changes the text")
        return None
    notify(f"{files.where}: its tokenizer is run by the tokenizers library, as it is no tiktoken encoding: {reason}")
    end = _find_end_token(files, BytePairs({}, [], "", special), notify)
    return dataclasses.replace(tokenizer, end_token=end)


def _works_on_bytes(content: dict) -> bool:
    """Whether every text can be encoded, and each id always decodes to the same bytes."""
    model, decoder = content["model"], content.get("decoder") or {}
    if model.get("type") != "BPE":
        return False
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    return any(step.get("type") == "ByteLevel" for step in decoder.get("decoders", [decoder]))


def pad_token(tokenizer: Tokenizer | None) -> int | None:
    """A token for padding: it occurs in no text and is not the end token. None if there is no such token."""
    special = {} if tokenizer is None else tokenizer.special_tokens
    return next((i for name, i in special.items() if tokenizer and i != tokenizer.end_of_text), None)


def export_tokenizer(
    tokenizer: Tokenizer, block_size: int, to: Path, notify: Callable[[str], None], labels: str = ""
) -> None:
    """Writes tokenizer.json and tokenizer_config.json, and with GPT-2's pre-tokenization also vocab.json and
    merges.txt.

    `labels` is the kind of task whose head is written: the tokenizer then adds the end tokens that gptjax adds for this
    task. `notify` receives a line if the tokenizer is left out because it is no byte-pair encoding, or if the
    tokenizers library encodes a text to other ids.
    """
    if labels or isinstance(tokenizer, LibraryTokenizer):
        _export_content(tokenizer, block_size, to, notify, labels)
        return
    pairs = _byte_pairs(tokenizer)
    if pairs is None:
        notify(f"{to}: exported without a tokenizer: kind {tokenizer.kind} has no form that transformers reads")
        return
    theirs = library_tokenizer(pairs)
    theirs.save(str(to / "tokenizer.json"))
    end = tokenizer.end_token if tokenizer.end_token in pairs.special else None
    is_gpt2 = pairs.pattern == GPT2_PATTERN
    config = {"tokenizer_class": "GPT2Tokenizer" if is_gpt2 else "PreTrainedTokenizerFast"}
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
    write_json(
        to / "tokenizer_config.json", config | ends | {"model_max_length": block_size, "add_prefix_space": False}
    )
    if is_gpt2:
        write_json(to / "vocab.json", pairs.named_ids())
        lines = [" ".join(pair) for pair in pairs.named_merges()]
        (to / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n", encoding="utf-8")
    if example := _first_difference(tokenizer, theirs, pairs):
        notify(f"{to}: transformers encodes some text to other ids than this run, such as {example!r}")


def _export_content(
    tokenizer: Tokenizer, block_size: int, to: Path, notify: Callable[[str], None], labels: str
) -> None:
    """Writes the stored tokenizer.json with the end tokens of a task, and tokenizer_config.json."""
    content = library_content(tokenizer)
    if content is None:
        notify(f"{to}: exported without a tokenizer: kind {tokenizer.kind} has no form that transformers reads")
        return
    end = None if tokenizer.end_of_text is None else tokenizer.end_token
    if labels and end is not None:
        token = {"SpecialToken": {"id": end, "type_id": 0}}
        around = [token, {"Sequence": {"id": "A", "type_id": 0}}, *([token] if labels == "classify" else [])]
        known = {end: {"id": end, "ids": [tokenizer.end_of_text], "tokens": [end]}}
        pair = [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")]
        content["post_processor"] = {
            **{"type": "TemplateProcessing", "single": around, "pair": pair},
            "special_tokens": known,
        }
    (to / "tokenizer.json").write_text(content_text(content), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "model_max_length": block_size}
    if labels:
        number = pad_token(tokenizer)
        config["pad_token"] = next((name for name, i in tokenizer.special_tokens.items() if i == number), None)
    write_json(to / "tokenizer_config.json", config)


def library_content(tokenizer: Tokenizer) -> dict | None:
    """The content of a tokenizer.json; None if the tokenizer cannot be written in this format."""
    if isinstance(tokenizer, LibraryTokenizer):
        return json.loads(tokenizer.content)
    pairs = _byte_pairs(tokenizer)
    return None if pairs is None else json.loads(library_tokenizer(pairs).to_str())


def _byte_pairs(tokenizer: Tokenizer) -> BytePairs | None:
    match tokenizer:
        case BytePairTokenizer(ranks=ranks, pattern=pattern, special=special):
            return BytePairs(ranks, recover_merges(ranks), pattern, special)
        case ByteTokenizer():
            ids = {bytes([byte]): byte for byte in range(256)}
            return BytePairs(ids, [], GPT2_PATTERN, {END_OF_TEXT: tokenizer.end_of_text})
        case _:
            return None


def _read(files: TokenizerFiles) -> tuple[BytePairs, Any]:
    """Reads the files as byte pairs, and with the tokenizers library."""
    if files.content is not None:
        try:
            pairs = read_pairs(files.content, files.added)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise UserError(
                f"{files.where}: tokenizer.json: no valid tokenizer: {type(error).__name__}: {error}"
            ) from None
        return pairs, _library(files)
    if files.vocab is not None:
        pairs = make_pairs(files.vocab, files.merges, GPT2_PATTERN, files.added, False)
        return pairs, _slow_tokenizer(files.vocab, files.merges)
    raise NotConvertible("there is none (no tokenizer.json, no vocab.json with merges.txt)")


def _library(files: TokenizerFiles) -> Any:
    """Reads tokenizer.json with the tokenizers library."""
    from tokenizers import Tokenizer as Library

    assert files.content is not None
    try:
        library = Library.from_str(content_text(files.content))
    except Exception as error:  # the library raises plain exceptions
        raise UserError(f"{files.where}: tokenizer.json: no valid tokenizer: {error}") from None
    library.no_truncation()
    library.no_padding()
    return library


def _slow_tokenizer(vocab: dict[str, int], merges: tuple[tuple, ...]) -> Any:
    """Reads vocab.json and merges.txt with the tokenizers library."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    try:
        library = Library(models.BPE(vocab=vocab, merges=list(merges)))
    except Exception as error:  # the library raises plain exceptions
        raise UserError(f"vocab.json and merges.txt do not fit together: {error}") from None
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return library


def _find_end_token(files: TokenizerFiles, pairs: BytePairs, notify: Callable[[str], None]) -> str:
    """The name of the end token: from the model's config, the tokenizer's config, or the usual names; otherwise
    empty.
    """
    where, ids = files.where, files.end_ids
    name_of = {i: name for name, i in pairs.special.items()}
    names = [name_of[i] for i in ids if i in name_of]
    candidates = [*names, token_text(files.settings.get("eos_token")), END_OF_TEXT]
    end = next((name for name in candidates if name in pairs.special), None)
    if end is None:
        ordinary = [i for i in ids if i in pairs.ids.values()]
        why = f" (id {ordinary[0]}, which its config names, also stands for text)" if ordinary else ""
        notify(f"{where}: has no end token{why}; documents get no start token, and samples end at max_new_tokens only")
        return END_OF_TEXT
    if others := [i for i in ids if i != pairs.special[end] and (i in name_of or i in pairs.ids.values())]:
        notify(f"{where}: of its end tokens only {end!r} is kept; sampling does not stop at ids {others}")
    begin = token_text(files.settings.get("bos_token"))
    if begin in pairs.special and begin != end:
        notify(f"{where}: documents begin with {end!r} here, not with its start token {begin!r}")
    return end


def _report_added(where: str, theirs: Any, notify: Callable[[str], None]) -> None:
    """Reports differences between the library's processing of text and gptjax's."""
    words = [token.content for token in theirs.get_added_tokens_decoder().values() if not token.special]
    if words:
        shown = ", ".join(map(repr, words[:_SHOWN])) + (f" and {len(words) - _SHOWN} more" if words[_SHOWN:] else "")
        notify(f"{where}: its added tokens {shown} are not matched in text here; such text is split like any other")
    if theirs.encode("a").ids != theirs.encode("a", add_special_tokens=False).ids:
        notify(f"{where}: its tokenizer adds {theirs.encode('a').tokens} around the text 'a'; gptjax does not")


def _first_difference(tokenizer: Tokenizer, theirs: Any, pairs: BytePairs) -> str | None:
    """The shortest of many texts that both encode differently, ignoring texts with an added token; None: no such
    text.
    """
    tokens = [token.decode() for token in sorted(pairs.ids, key=pairs.ids.__getitem__) if _is_utf8(token)]
    texts = [*mixed_texts(tokens), "".join(tokens), "\n".join(tokens), " and ".join(tokens)]
    added = {token.content for token in theirs.get_added_tokens_decoder().values()}
    if added:
        names = re.compile("|".join(map(re.escape, added)))
        texts = [text for text in texts if not names.search(text)]
    found = zip(texts, theirs.encode_batch(texts, add_special_tokens=False), tokenizer.encode_batch(texts), strict=True)
    different = [text for text, their_ids, ids in found if their_ids.ids != ids.tolist()]
    return min(different, key=len)[:60] if different else None


def _is_utf8(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def _check_order(pairs: BytePairs) -> None:
    last = -1
    for left, right in pairs.merges:
        new = pairs.ids.get(left + right, -1)
        if new <= last:
            raise NotConvertible(f"the id of token {left + right!r} does not follow the order of merges")
        last = new


def _from_pairs(pairs: BytePairs, vocab_size: int, end_token: str) -> Tokenizer:
    size = 1 + max([*pairs.ids.values(), *pairs.special.values()])
    if size > vocab_size:
        raise NotConvertible(f"it has {size:,} tokens, the model {vocab_size:,}")
    gpt2 = BytePairTokenizer("tiktoken", "gpt2", pairs.pattern, pairs.ids, pairs.special, end_token)
    if size == vocab_size == len(pairs.ids) + len(pairs.special) and gpt2.fingerprint == GPT2_FINGERPRINT:
        return gpt2
    reserved = {f"<|reserved_{i}|>": i for i in range(size, vocab_size)}
    try:
        return bpe_tokenizer_from_ranks(pairs.ids, pairs.pattern, pairs.special | reserved, end_token)
    except UserError as error:
        raise NotConvertible(str(error)) from None

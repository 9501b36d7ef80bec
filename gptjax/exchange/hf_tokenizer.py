"""Converts byte-pair encodings between the format of the tokenizers library and that of tiktoken, which gptjax uses.

Both merge the pair with the lowest rank first. The tokenizers library has a list of merges; tiktoken uses the id of the
merged token as its rank. So an encoding can be converted if the ids of merged tokens increase along the list.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gptjax.errors import UserError
from gptjax.exchange.hf_files import write_json
from gptjax.exchange.mixed_texts import mixed_texts
from gptjax.exchange.tokenizer_files import TokenizerFiles, content_text, token_text
from gptjax.text.tokenizers.base import END_OF_TEXT, Tokenizer
from gptjax.text.tokenizers.byte_pair import BytePairTokenizer, bpe_tokenizer_from_ranks
from gptjax.text.tokenizers.library import LibraryTokenizer
from gptjax.text.tokenizers.plain import ByteTokenizer
from gptjax.text.train_bpe import byte_of_character

# The pattern of the tokenizers library's ByteLevel, in tiktoken's syntax.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Fingerprint of tiktoken's gpt2: an imported gpt2 is the same tokenizer, so data prepared with either fits.
GPT2_FINGERPRINT = "592fc644bd6e35ef7aed2208176abe31b3da11abac1159c05bbc6e4e7c1da936"
# The operand of a counted repetition: a class, an escape, a group without inner groups, or a character.
_ATOM = r"(\\[pP]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])*\]|\((?:\\.|[^()\\])*\)|[^\\\[\]()|])"
_POSSESSIVE = re.compile(_ATOM + r"(\{\d+(?:,\d*)?\})\+")
_ATOMIC = re.compile(r"\(\?>" + _ATOM + r"(\{\d+(?:,\d*)?\})\)")
_SHOWN = 5  # names in a message


class _NotConvertible(Exception):
    """The reason why a folder's tokenizer cannot be converted exactly."""


@dataclasses.dataclass(frozen=True)
class _BytePairs:
    ids: dict[bytes, int]
    merges: list[tuple[bytes, bytes]]
    pattern: str
    special: dict[str, int]


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
            raise _NotConvertible(f"tiktoken would encode some text to other ids, such as {example!r}")
    except _NotConvertible as reason:
        return _through_library(files, vocab_size, str(reason), notify)
    _report_added(files.where, theirs, notify)
    return tokenizer


def _through_library(
    files: TokenizerFiles, vocab_size: int, reason: str, notify: Callable[[str], None]
) -> LibraryTokenizer | None:
    """A tokenizer that runs tokenizer.json with the tokenizers library, if it works on bytes; otherwise returns None
    and calls `notify`.
    """
    if files.content is None:
        notify(f"{files.where}: imported without a tokenizer: {reason}")
        return None
    if not _works_on_bytes(files.content):
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
    end = _find_end_token(files, _BytePairs({}, [], "", special), notify)
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
    theirs = _hf_tokenizer(pairs)
    theirs.save(str(to / "tokenizer.json"))
    end = tokenizer.end_token if tokenizer.end_token in pairs.special else None
    is_gpt2 = pairs.pattern == GPT2_PATTERN
    config = {"tokenizer_class": "GPT2Tokenizer" if is_gpt2 else "PreTrainedTokenizerFast"}
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
    write_json(
        to / "tokenizer_config.json", config | ends | {"model_max_length": block_size, "add_prefix_space": False}
    )
    if is_gpt2:
        write_json(to / "vocab.json", _named(pairs))
        lines = [" ".join(pair) for pair in _named_merges(pairs)]
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
    return None if pairs is None else json.loads(_hf_tokenizer(pairs).to_str())


def _byte_pairs(tokenizer: Tokenizer) -> _BytePairs | None:
    match tokenizer:
        case BytePairTokenizer(ranks=ranks, pattern=pattern, special=special):
            return _BytePairs(ranks, _recover_merges(ranks), pattern, special)
        case ByteTokenizer():
            ids = {bytes([byte]): byte for byte in range(256)}
            return _BytePairs(ids, [], GPT2_PATTERN, {END_OF_TEXT: tokenizer.end_of_text})
        case _:
            return None


def _read(files: TokenizerFiles) -> tuple[_BytePairs, Any]:
    """Reads the files as byte pairs, and with the tokenizers library."""
    if files.content is not None:
        try:
            pairs = _from_json(files.content, files.added)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise UserError(
                f"{files.where}: tokenizer.json: no valid tokenizer: {type(error).__name__}: {error}"
            ) from None
        return pairs, _library(files)
    if files.vocab is not None:
        pairs = _pairs(files.vocab, files.merges, GPT2_PATTERN, files.added, False)
        return pairs, _slow_tokenizer(files.vocab, files.merges)
    raise _NotConvertible("there is none (no tokenizer.json, no vocab.json with merges.txt)")


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


def _find_end_token(files: TokenizerFiles, pairs: _BytePairs, notify: Callable[[str], None]) -> str:
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


def _first_difference(tokenizer: Tokenizer, theirs: Any, pairs: _BytePairs) -> str | None:
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


def _to_library(pattern: str) -> str:
    """Translates a regular expression of tiktoken to Oniguruma's syntax, which the tokenizers library uses.

    In tiktoken `X{1,3}+` is a possessive quantifier; in Oniguruma it means `(?:X{1,3})+`.
    """
    return _POSSESSIVE.sub(r"(?>\1\2)", pattern)


def _from_library(pattern: str) -> str:
    """Inverse of `_to_library`."""
    return _ATOMIC.sub(r"\1\2+", _POSSESSIVE.sub(r"(?:\1\2)+", pattern))


def _from_json(content: dict, extra: dict[str, int]) -> _BytePairs:
    model = content["model"]
    if model.get("type") != "BPE":
        raise _NotConvertible(f"its model is {model.get('type')}, not byte-level BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise _NotConvertible(f"it uses {name}")
    if content.get("normalizer"):
        raise _NotConvertible("it changes the text before encoding it (normalizer)")
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    added = extra | {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    return _pairs(model["vocab"], merges, _pattern(content["pre_tokenizer"]), added, bool(model.get("ignore_merges")))


def _pattern(pre_tokenizer: dict) -> str:
    """The regular expression that splits text."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *splits, last = steps
    if last["type"] != "ByteLevel":
        raise _NotConvertible("it does not work on bytes")
    if last.get("add_prefix_space"):
        raise _NotConvertible("it puts a space before the text (add_prefix_space)")
    if not splits and last.get("use_regex", True):
        return GPT2_PATTERN
    if len(splits) != 1 or last.get("use_regex", True) or splits[0]["type"] != "Split":
        raise _NotConvertible("it cuts text in several steps")
    if splits[0]["behavior"] != "Isolated" or splits[0].get("invert") or "Regex" not in splits[0]["pattern"]:
        raise _NotConvertible("it does not cut text by one regular expression")
    return _from_library(splits[0]["pattern"]["Regex"])


def _pairs(
    vocab: dict[str, int], merges: Iterable[tuple], pattern: str, added: dict[str, int], whole_words: bool
) -> _BytePairs:
    """Converts names to bytes. A token is special if no text encodes to it: no byte, not merged, and no word."""
    byte_of = byte_of_character()

    def to_bytes(name: str) -> bytes:
        if unknown := next((c for c in name if c not in byte_of), None):
            raise _NotConvertible(f"token {name!r} has {unknown!r}, which is no byte's name")
        return bytes(byte_of[c] for c in name)

    merges = [(to_bytes(left), to_bytes(right)) for left, right in merges]
    merged = {left + right for left, right in merges}

    def is_plain(name: str) -> bool:
        if name in added or not set(name) <= byte_of.keys():
            return False
        return whole_words or len(name) == 1 or to_bytes(name) in merged

    special = added | {name: i for name, i in vocab.items() if not is_plain(name)}
    ids = {to_bytes(name): i for name, i in vocab.items() if is_plain(name)}
    return _BytePairs(ids, merges, pattern, special)


def _check_order(pairs: _BytePairs) -> None:
    last = -1
    for left, right in pairs.merges:
        new = pairs.ids.get(left + right, -1)
        if new <= last:
            raise _NotConvertible(f"the id of token {left + right!r} does not follow the order of merges")
        last = new


def _from_pairs(pairs: _BytePairs, vocab_size: int, end_token: str) -> Tokenizer:
    size = 1 + max([*pairs.ids.values(), *pairs.special.values()])
    if size > vocab_size:
        raise _NotConvertible(f"it has {size:,} tokens, the model {vocab_size:,}")
    gpt2 = BytePairTokenizer("tiktoken", "gpt2", pairs.pattern, pairs.ids, pairs.special, end_token)
    if size == vocab_size == len(pairs.ids) + len(pairs.special) and gpt2.fingerprint == GPT2_FINGERPRINT:
        return gpt2
    reserved = {f"<|reserved_{i}|>": i for i in range(size, vocab_size)}
    try:
        return bpe_tokenizer_from_ranks(pairs.ids, pairs.pattern, pairs.special | reserved, end_token)
    except UserError as error:
        raise _NotConvertible(str(error)) from None


def _hf_tokenizer(pairs: _BytePairs):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    # Like tiktoken, a word that is a token becomes that token even if merges do not produce it.
    tokenizer = Tokenizer(models.BPE(vocab=_named(pairs), merges=_named_merges(pairs), ignore_merges=True))
    if pairs.pattern == GPT2_PATTERN:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_to_library(pairs.pattern)), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    special = sorted(pairs.special, key=pairs.special.__getitem__)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return tokenizer


def _named(pairs: _BytePairs) -> dict[str, int]:
    vocab = {_name(token): i for token, i in pairs.ids.items()} | pairs.special
    return dict(sorted(vocab.items(), key=lambda item: item[1]))


def _named_merges(pairs: _BytePairs) -> list[tuple[str, str]]:
    return [(_name(left), _name(right)) for left, right in pairs.merges]


_CHARACTER_OF = {byte: character for character, byte in byte_of_character().items()}


def _name(token: bytes) -> str:
    return "".join(_CHARACTER_OF[byte] for byte in token)


def _recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that is merged to each token, found by applying merges of lower rank. Some tokens have no such pair."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = _merge_below(ranks, token, rank)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def _merge_below(ranks: dict[bytes, int], token: bytes, rank: int) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        best, at = min((ranks.get(left + right, rank), i) for i, (left, right) in enumerate(itertools.pairwise(parts)))
        if best >= rank:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
